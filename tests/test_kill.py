"""kill -9, again and again: every restart succeeds unaided, and nothing tells the runs apart."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import without_timings
from helpers_kill import STEPS

from kbtrain.checkpoint import CheckpointStore
from kbtrain.checkpoint.lock import LOCK_NAME


def live(folder, at=0, seconds=None):
    """One life of the program: it dies at a flush or rename, or some time after its first step.

    Returns its exit code.
    """
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(here / "helpers_kill.py"), str(folder), str(at)]
    with (
        tempfile.TemporaryFile("w+") as said,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        ) as process,
    ):
        for line in process.stdout:
            if line.startswith("step") and seconds is not None:
                time.sleep(seconds)
                process.kill()
                seconds = None
        code = process.wait(timeout=120)
        said.seek(0)
        assert code in (0, -signal.SIGKILL), said.read()[-4000:]
    return code


def log_lines(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return without_timings(lines)


@pytest.mark.slow
def test_killed_again_and_again_a_run_comes_to_the_same_end(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert live(whole) == 0

    generator = np.random.default_rng(0)
    deaths = [{"seconds": s} for s in generator.uniform(0.0, 0.02, size=1)]
    deaths += [{"at": int(n)} for n in generator.integers(1, 40, size=1)]
    generator.shuffle(deaths)
    killed_lives, torn, steps = 0, 0, []
    for death in deaths:
        code = live(killed, **death)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        killed_lives += 1
        store = CheckpointStore(killed)
        assert [store.verify(path) for _, path in store.list()] == [[]] * len(store.list())
        torn += any(path.name.startswith(".tmp") for path in killed.iterdir())
        steps.append(max((step for step, _ in store.list()), default=0))
    assert live(killed) == 0

    assert killed_lives >= 2, "the run was over too soon: it must be longer"
    assert torn > 0, "no death met a write"
    assert steps == sorted(steps), "a checkpoint that was there is lost"
    with np.load(whole / "final.npz") as first, np.load(killed / "final.npz") as second:
        assert first.files == second.files
        assert [n for n in first.files if first[n].tobytes() != second[n].tobytes()] == []
    assert log_lines(killed) == log_lines(whole)
    logged = [line["step"] for line in log_lines(killed) if "loss" in line]
    assert logged == list(range(1, STEPS + 1))
    left = [path.name for path in killed.iterdir()]
    assert sorted(left) == [
        f"checkpoint-{STEPS - 2}", f"checkpoint-{STEPS}", "final.npz", "log.jsonl",
    ]  # fmt: skip
    assert LOCK_NAME not in left
