"""kill -9, again and again: every restart succeeds unaided, and nothing tells the runs apart."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile

import numpy as np
import pytest
from helpers import without_timings
from helpers_kill import STEPS
from paths import SUPPORT

from kbtrain.checkpoint import CheckpointStore
from kbtrain.checkpoint.storage.lock import LOCK_NAME


@contextlib.contextmanager
def lives(folder):
    """``live(**task)`` of helpers_kill.py, in forks of one process that has imported everything."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(SUPPORT), os.environ.get("PYTHONPATH", "")]),
        # XLA's compiler takes longer than the training.
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    command = [sys.executable, str(SUPPORT / "helpers_kill.py"), str(folder / "modules.json")]
    with (
        tempfile.TemporaryFile("w+") as said,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            env=environment,
        ) as process,
    ):

        def live(folder, **death):
            print(json.dumps({"folder": str(folder), **death}), file=process.stdin, flush=True)
            answer = process.stdout.readline()
            said.seek(0)
            assert answer.strip() in ("0", str(-signal.SIGKILL)), said.read()[-4000:]
            return int(answer)

        yield live
        process.stdin.close()


def deaths(generator):
    """In the middle of calls to the disk, some time after some step, and while all is beginning."""
    calls = [{"disk": int(call)} for call in generator.integers(1, 500, size=10)]
    later = [
        {"step": int(step), "seconds": seconds}
        for step, seconds in zip(
            generator.integers(1, 4, size=10), generator.uniform(0, 0.02, size=10), strict=True
        )
    ]
    early = [{"step": 0, "seconds": seconds} for seconds in generator.uniform(0, 0.2, size=2)]
    return generator.permutation(calls + later + early)


def log_lines(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return without_timings(lines)


@pytest.mark.slow
def test_killed_again_and_again_a_run_comes_to_the_same_end(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    died, torn, steps = 0, 0, []
    store = CheckpointStore(killed)
    with lives(tmp_path) as live:
        assert live(whole) == 0
        for death in deaths(np.random.default_rng(0)):
            if live(killed, **death) == 0:
                break
            died += 1
            listed = store.list()
            assert [store.verify(path) for _, path in listed] == [[]] * len(listed)
            if killed.exists():
                torn += any(path.name.startswith(".tmp-") for path in killed.iterdir())
            steps.append(max((step for step, _ in listed), default=0))
        assert live(killed) == 0

    assert died >= 20, f"the run was over after {died} deaths: it must be longer"
    assert torn >= 5, "the deaths do not meet the writes"
    assert steps == sorted(steps), "a checkpoint that was there is lost"
    with np.load(whole / "final.npz") as first, np.load(killed / "final.npz") as second:
        assert first.files == second.files
        assert [n for n in first.files if first[n].tobytes() != second[n].tobytes()] == []
    assert log_lines(killed) == log_lines(whole)
    logged = [line["step"] for line in log_lines(killed) if "loss" in line]
    assert logged == list(range(1, STEPS + 1))
    left = [path.name for path in killed.iterdir()]
    assert sorted(left) == [
        f"checkpoint-{STEPS - 2}", f"checkpoint-{STEPS}", "final.npz", "log.jsonl", "run.json",
    ]  # fmt: skip
    assert LOCK_NAME not in left
