"""The control channel: whatever ends a process, all others end within ten seconds and say why."""

import concurrent.futures
import contextlib
import http.client
import os
import re
import signal
import socket
import subprocess
import time
import xmlrpc.client
from pathlib import Path

import pytest
from helpers_channel import CHANNEL, ELSEWHERE, Processes
from helpers_hosts import ip, two_hosts

from kbtrain.distributed.control.addresses import listen_at
from kbtrain.distributed.control.members import Members
from kbtrain.distributed.control.reports import Report
from kbtrain.distributed.control.server import ControlServer
from kbtrain.distributed.control.states import Watcher
from kbtrain.distributed.control.watcher import process_state
from kbtrain.utils.machine.processes import ProcessGroup

pytestmark = pytest.mark.neutral

RAISE = "channel.done(error); raise error"  # as fit does
RESTORED_HOOK = "barrier = 60; sys.excepthook = sys.__excepthook__; raise ValueError('bad sample')"


def tell(rank, command):
    return lambda processes: processes.tell(rank, command)


def send(rank, number):
    return lambda processes: processes.signal(rank, number)


def pause(rank):
    """Suspend a process and its watcher, as a container or a job is suspended."""

    def happens(processes):
        processes.suspend_watcher(rank)
        processes.signal(rank, signal.SIGSTOP)

    return happens


def stay_behind(processes):
    for rank in (0, 2):
        processes.tell(rank, "channel.at('update 18')")


def fall_out(processes):
    processes.signal(1, signal.SIGKILL)
    # As the framework's collective operation does, where it notices first.
    processes.tell(0, "raise RuntimeError('connection closed by peer')")


def leave_and_be_noticed(rank):
    def happens(processes):
        processes.tell(rank, "sys.exit()")
        processes[rank].wait(10)
        command = "error = RuntimeError('connection closed by peer'); " + RAISE
        processes.tell(1 - rank, command)

    return happens


def leave_all(processes):
    for rank in range(len(processes)):
        processes.tell(rank, "channel.done(); sys.exit()")


def hold_the_interpreter_lock(processes):
    """Native code holds it in two processes for longer than a process may be silent."""
    for rank in (0, 1):
        processes.tell(rank, "import ctypes; ctypes.PyDLL(None).sleep(7)")
    for rank in (0, 1):
        processes[rank].stdout.readline()
    leave_all(processes)


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
    # name: what happens, the exit code of each process, the message of those that did not fail
    "raises": (
        tell(1, "channel.at('update 18'); error = ValueError('bad\\x1b sample'); " + RAISE),
        [1, 1, 1],
        WHO.format(1) + r"failed at update 18: ValueError: bad\? sample",
    ),
    "process 0 raises": (
        tell(0, "barrier = 60; raise ValueError('bad sample')"),
        [1, 1],
        WHO.format(0) + "failed at update 17: ValueError: bad sample",
    ),
    "raises past the hook": (
        tell(1, RESTORED_HOOK),
        [1, 1],
        WHO.format(1) + "failed at update 17: ValueError: bad sample",
    ),
    "interrupted": (send(1, signal.SIGINT), [1, 130], WHO.format(1) + ".*KeyboardInterrupt"),
    "killed": (send(1, signal.SIGKILL), [1, -9, 1], KILLED.format(1)),
    "terminated": (send(1, signal.SIGTERM), [1, -15], KILLED.format(1)),
    "process 0 killed": (send(0, signal.SIGKILL), [-9, 1], KILLED.format(0)),
    "killed and noticed": (fall_out, [1, -9], KILLED.format(1)),
    "suspended": (send(1, signal.SIGSTOP), [1, None], SUSPENDED.format(1)),
    "process 0 suspended": (send(0, signal.SIGSTOP), [None, 1], SUSPENDED.format(0)),
    "suspended elsewhere": (send(1, signal.SIGSTOP), [1, None, 1], SUSPENDED.format(1)),
    "process 0 suspended elsewhere": (send(0, signal.SIGSTOP), [None, 1], SUSPENDED.format(0)),
    "paused elsewhere": (pause(1), [1, None], WHO.format(1) + "failed: neither it, for"),
    "process 0 paused elsewhere": (pause(0), [None, 1], WHO.format(0) + "failed: neither it, for"),
    "busy elsewhere": (hold_the_interpreter_lock, [0, 0], None),
    "leaves": (tell(1, "sys.exit()"), [1, 0], ENDED.format(1, "at update 17")),
    "leaves and waits at exit": (
        tell(1, "barrier = 60; sys.exit()"),
        [1, 1],
        ENDED.format(1, "at update 17"),
    ),
    "process 0 leaves": (tell(0, "sys.exit()"), [0, 1], ENDED.format(0, "at update 17")),
    "leaves after an exception": (
        tell(1, INTERRUPTED),
        [1, 3],
        ENDED.format(1, "at update 17 after SystemExit: 3"),
    ),
    "leaves and is noticed": (leave_and_be_noticed(1), [1, 0], ENDED.format(1, "at update 17")),
    "process 0 leaves and is noticed": (
        leave_and_be_noticed(0),
        [0, 1],
        ENDED.format(0, "at update 17"),
    ),
    "hangs": (
        stay_behind,
        [1, 1, 1],
        WHO.format(1)
        + "hangs at update 17: .* process 0 waits for it at update 18 for more than 2 s",
    ),
    "busy": (hold_the_interpreter_lock, [0, 0], None),
    "all leave": (leave_all, [0, 0, 0], None),
    "process 0 leaves last": (leave_early, [0, 0, 0], None),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """All cases at once: most of their time is waiting."""

    folders = {name: tmp_path_factory.mktemp("exchange") for name in CASES}

    def run(name):
        happens, codes, _ = CASES[name]
        timeout = 2 if name == "hangs" else 1800
        program = ELSEWHERE if name.endswith("elsewhere") else CHANNEL
        with Processes(folders[name], len(codes), program, timeout) as processes:
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
    # A pause takes 8.5 s by itself, and the processes of all cases share the machine here.
    assert seconds < (15 if "paused" in name else 10)
    if message is None:
        assert set(errors) == {""}
        return
    culprit = int(re.match(r"process (\d)", message)[1])
    for rank, text in zip(ranks, errors, strict=True):
        if rank != culprit:
            assert re.search(message, text), text
            assert text.count("cannot go on without it and ends") == 1, text
        if rank == culprit and "raises" in name:
            assert text.startswith("Traceback")
            assert "ValueError: bad" in text.splitlines()[-1]


def test_children_do_not_keep_the_connections_open(tmp_path):
    links = "[os.readlink(f'/proc/self/fd/{n}') for n in channel.file_numbers()]"
    with Processes(tmp_path, size=2) as processes:
        for rank, connections in ((0, 2), (1, 1)):
            processes.tell(
                rank,
                "import warnings; warnings.simplefilter('ignore'); pid = os.fork(); "
                f"print(*{links}, flush=True) if pid == 0 else os.waitpid(pid, 0); "
                "pid or os._exit(0)",
            )
            assert processes[rank].stdout.readline().split() == connections * ["/dev/null"]
            assert processes[rank].stdout.readline() == "done\n"
        for rank in (0, 1):
            processes.tell(rank, f"print(*{links}, flush=True)")
            assert "/dev/null" not in processes[rank].stdout.readline()


def test_processes_started_by_one_that_fails_end_with_it(tmp_path):
    with Processes(tmp_path, size=2) as processes:
        processes.tell(
            0,
            "import warnings; warnings.simplefilter('ignore'); import multiprocessing as m; "
            "child = m.get_context('fork').Process(target=time.sleep, args=(60,)); "
            "child.start(); print(child.pid, flush=True)",
        )
        child = int(processes[0].stdout.readline())
        processes.signal(1, signal.SIGKILL)
        processes.ends()
        assert process_state(child) in ("", "Z")


@pytest.fixture
def server():
    reports = [Report(rank, "host", 100 + rank) for rank in range(2)]
    members = Members(reports, 1800.0, time.monotonic())
    server = ControlServer(ProcessGroup(size=2), members, "token", local=True)
    yield server
    server.close()


def test_a_stranger_is_refused(server):
    address, _, token = server.urls[0].removeprefix("http://").partition("/")
    report = Report(1, "host", 101).at("update 2")
    request = xmlrpc.client.dumps((report.to_wire(),), "update")
    answers = []
    for path in ("/", f"/{token[:-1]}", f"/{token}x", "/RPC2", f"/{token}"):
        connection = http.client.HTTPConnection(address, timeout=5)
        with contextlib.closing(connection):
            connection.request("POST", path, request, {"Content-Type": "text/xml"})
            answer = connection.getresponse()
            answer.read()
        answers.append((answer.status, server.members[1].report == report))
    assert answers == 4 * [(404, False)] + [(200, True)]


def test_a_process_that_does_not_reach_the_others_is_named_by_all(tmp_path):
    # Its network namespace has another loopback, and no interface else.
    unshare = ["unshare", "-rn"]
    if subprocess.run([*unshare, "true"], capture_output=True, timeout=30).returncode:
        pytest.skip("no network namespaces here")
    with Processes(tmp_path, prefixes=[[], [], unshare]) as processes:
        processes.started = time.monotonic()
        seconds, codes, errors = processes.ends()
    assert seconds < 10
    assert codes == [1, 1, 1]
    for text in errors:
        assert re.search(
            r"DistributedError: process 2 \(host \S+, pid \d+\) cannot reach process 0 \(.*\) at "
            r"127.0.0.1:\d+ \(.*\)",
            text,
        )


@pytest.fixture
def hosts():
    """The names of two network namespaces with a cable between them, whose ends have those, too."""
    with two_hosts() as names:
        yield names


@pytest.mark.slow
@pytest.mark.parametrize("cut_off", [0, 1])
def test_a_host_that_is_cut_off_is_named(cut_off, hosts, tmp_path):
    inside = [["ip", "netns", "exec", hosts[number]] for number in (0, 1, 1)]
    with Processes(tmp_path, address="10.77.0.1", prefixes=inside) as processes:
        ip(f"-n {hosts[cut_off]} link set {hosts[cut_off]} down")
        processes.started = time.monotonic()
        seconds, codes, errors = processes.ends()
    assert seconds < 10
    assert codes == [1, 1, 1]
    for text, other in zip(errors, ("[12]", "0", "0"), strict=True):
        assert re.search(rf"process {other} \(.*\) failed: it has not been reachable for 5 s", text)


@pytest.mark.slow
def test_a_process_that_is_suspended_on_another_host_is_named(hosts, tmp_path):
    # A process id namespace is another machine to /proc, too.
    machine = ["unshare", "-pf", "--kill-child", "--mount-proc"]
    inside = [["ip", "netns", "exec", name, *machine] for name in hosts]
    with Processes(tmp_path, 2, address="10.77.0.1", prefixes=inside) as processes:
        pid = processes[1].pid
        process = int(Path(f"/proc/{pid}/task/{pid}/children").read_text())
        processes.started = time.monotonic()
        os.kill(process, signal.SIGSTOP)
        seconds, codes, errors = processes.ends([0])
    assert seconds < 10
    assert codes == [1]
    assert re.search(SUSPENDED.format(1), errors[0])


def test_a_process_that_others_wait_for_shows_what_it_does(tmp_path):
    sooner = "if rank == 0: channel._server.members.notice = 0.3\nchannel.at"
    program = CHANNEL.replace("channel.at", sooner)
    with Processes(tmp_path, 2, program) as processes:
        processes.tell(1, "import threading; threading.Event().wait(2); sys.exit()")
        processes.tell(0, "channel.at('update 18')")
        _, codes, errors = processes.ends()
    who = WHO.format(1).rstrip()
    assert re.search(rf"Process 0 has waited \d s at update 18 for {who}, which is", errors[0])
    assert re.search(f"Others wait for {who}, which is at update 17. Its main thread", errors[1])
    assert "in wait" in errors[1]


@pytest.mark.parametrize("end", ["kill", "close"])
def test_a_watcher_ends_with_its_process(end, tmp_path):
    with Processes(tmp_path, 2, ELSEWHERE) as processes:
        watcher = processes.watcher(1)
        # A child of the process holds what it has open.
        processes.tell(
            1,
            "import warnings; warnings.simplefilter('ignore'); "
            "os.fork() or (os.closerange(0, 3), time.sleep(5), os._exit(0))",
        )
        processes[1].stdout.readline()
        assert process_state(watcher) in ("S", "R")
        if end == "kill":
            processes.signal(1, signal.SIGKILL)
        else:
            processes.tell(1, "channel.close()")
        limit = time.monotonic() + 5
        while process_state(watcher) not in ("", "Z") and time.monotonic() < limit:
            time.sleep(0.02)
        assert process_state(watcher) in ("", "Z")


def test_a_watcher_answers_nobody_without_the_token():
    watcher = Watcher("token", "127.0.0.1")
    address = "127.0.0.1", watcher.port
    answers = []
    for question in (b"tokem", b"", b"token"):
        with socket.create_connection(address, timeout=10) as connection:
            connection.sendall(question)
            connection.shutdown(socket.SHUT_WR)
            answers.append(connection.recv(10))
    watcher.close()
    assert answers[:2] == [b"", b""]
    assert answers[2] in (b"S", b"R")


def test_a_watcher_listens_only_where_the_others_come_from(tmp_path):
    with Processes(tmp_path, 2, ELSEWHERE) as processes:
        processes.tell(1, "print(channel._own_address())")
        assert processes[1].stdout.readline() == "127.0.0.1\n"
    with listen_at("127.0.0.1") as one, listen_at("192.0.2.1") as anywhere:
        assert one.getsockname()[0] == "127.0.0.1"
        assert anywhere.getsockname()[0] in ("::", "0.0.0.0")  # no interface has that address


def test_an_exception_before_the_channel_is_there_ends_the_process_at_once(tmp_path):
    program = CHANNEL.replace("barrier = 0.0", "barrier = 60; exchange = None")
    with Processes(tmp_path, 2, program) as processes:
        processes.started = time.monotonic()
        seconds, codes, errors = processes.ends()
    assert seconds < 10
    assert codes == [1, 1]
    for text in errors:
        assert text.startswith("Traceback")
        assert text.endswith("TypeError: 'NoneType' object is not callable\n")
