"""The control channel: whatever ends a process, all others end within ten seconds and say why."""

import concurrent.futures
import re
import signal

import pytest
from helpers_processes import Processes

pytestmark = pytest.mark.core


def tell(rank, command):
    return lambda processes: processes.tell(rank, command)


def send(rank, number):
    return lambda processes: processes.signal(rank, number)


def stay_behind(processes):
    for rank in (0, 2):
        processes.tell(rank, "channel.at('update 18')")


def fall_out(processes):
    processes.signal(1, signal.SIGKILL)
    # As the framework's collective operation does, where it notices first.
    processes.tell(0, "raise RuntimeError('connection closed by peer')")


def leave_all(processes):
    for rank in range(3):
        processes.tell(rank, "channel.done(); sys.exit()")


def leave_early(processes):
    """Process 0 has work left at the last place that all have passed; the others end before."""
    for rank in (1, 2):
        processes.tell(rank, "channel.done(); sys.exit()")
    processes[1].wait(10)
    processes[2].wait(10)
    processes.tell(0, "time.sleep(6); sys.exit()")


WHO = r"process {} \(host \S+, pid \d+\) "
KILLED = WHO + "failed: it was killed, or crashed .* last seen (at update 17|before fit)"
SUSPENDED = WHO + "failed: it has been suspended .* last seen (at update 17|before fit)"
ENDED = WHO + "ended its program {}, while process . waits for it at update 17"
INTERRUPTED = "channel.done(SystemExit(3)); sys.exit(3)"

CASES = {
    # name: what happens, exit codes, message of those that did not fail
    "raises": (
        tell(1, "channel.at('update 18'); raise ValueError('bad\\x1b sample')"),
        [1, 1, 1],
        WHO.format(1) + r"failed at update 18: ValueError: bad\? sample",
    ),
    "process 0 raises": (
        tell(0, "raise ValueError('bad sample')"),
        [1, 1, 1],
        WHO.format(0) + "failed at update 17: ValueError: bad sample",
    ),
    "interrupted": (send(1, signal.SIGINT), [1, 130, 1], WHO.format(1) + ".*KeyboardInterrupt"),
    "killed": (send(1, signal.SIGKILL), [1, -9, 1], KILLED.format(1)),
    "terminated": (send(2, signal.SIGTERM), [1, 1, -15], KILLED.format(2)),
    "process 0 killed": (send(0, signal.SIGKILL), [-9, 1, 1], KILLED.format(0)),
    "killed and noticed": (fall_out, [1, -9, 1], KILLED.format(1)),
    "suspended": (send(1, signal.SIGSTOP), [1, None, 1], SUSPENDED.format(1)),
    "process 0 suspended": (send(0, signal.SIGSTOP), [None, 1, 1], SUSPENDED.format(0)),
    "leaves": (tell(1, "sys.exit()"), [1, 0, 1], ENDED.format(1, "at update 17")),
    "process 0 leaves": (tell(0, "sys.exit()"), [0, 1, 1], ENDED.format(0, "at update 17")),
    "leaves after an exception": (
        tell(1, INTERRUPTED),
        [1, 3, 1],
        ENDED.format(1, r"after SystemExit: 3 \(at update 17\)"),
    ),
    "hangs": (
        stay_behind,
        [1, 1, 1],
        WHO.format(1) + r"hangs at update 17: .* more than 2 s \(process . is at update 18\)",
    ),
    "all leave": (leave_all, [0, 0, 0], None),
    "process 0 leaves last": (leave_early, [0, 0, 0], None),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """All cases at once: most of their time is waiting."""

    folders = {name: tmp_path_factory.mktemp("exchange") for name in CASES}

    def run(name):
        happens, codes, _ = CASES[name]
        with Processes(folders[name], timeout=2) as processes:
            happens(processes)
            ends = [rank for rank, code in enumerate(codes) if code is not None]
            return ends, *processes.ends(ends)

    with concurrent.futures.ThreadPoolExecutor(len(CASES)) as pool:
        return dict(zip(CASES, pool.map(run, CASES), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_the_failure_is_named(name, outcomes):
    ranks, seconds, found, errors = outcomes[name]
    _, codes, message = CASES[name]
    assert found == [code for code in codes if code is not None]
    assert seconds < 10
    if message is None:
        assert errors == ["", "", ""]
        return
    culprit = int(re.match(r"process (\d)", message)[1])
    for rank, text in zip(ranks, errors, strict=True):
        if rank != culprit:
            assert re.search(message, text), text
            assert text.count("cannot go on without it and ends") == 1, text
        if rank == culprit and "raises" in name:
            assert text.startswith("Traceback")
            assert "ValueError: bad" in text.splitlines()[-1]
