"""Runs that go on in another number of processes, on other backends, or after one was killed."""

import json
import os
import re
import subprocess
import sys

import helpers_moving as moving
import numpy as np
import pytest
from helpers_together import JOINED, SUPPORT, run_processes

from kbtrain import backends

pytestmark = pytest.mark.slow

SCRIPT = SUPPORT / "helpers_moving.py"
TOLERANCE = 1.5e-5 if backends.load().name == "tensorflow" else 3e-6


def in_processes(size, *tasks, backend=None):
    """Train in several processes, which end alike: what each task gave."""
    more = {} if backend is None else {"KERAS_BACKEND": backend}
    run_processes(size, SCRIPT, json.dumps(tasks, default=str), timeout=540, more=more)
    return [alike(task["folder"], size) for task in tasks]


def alike(folder, size):
    """The results of process 0, after those of the others were found to have the same bits."""
    first, *others = moving.results(folder, size)
    for other in others:
        assert different(other, first) == []
    return first


def different(found, expected):
    """The names of the values that differ in a bit."""
    assert found.keys() == expected.keys()
    return [name for name in found if found[name].tobytes() != expected[name].tobytes()]


def assert_close(found, expected, tolerance=TOLERANCE):
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, tolerance, tolerance, err_msg=name)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run in one process, without an interruption."""
    return moving.train(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def on_two(tmp_path_factory):
    """Folders of runs that were stopped on two processes at step 6."""
    folder = tmp_path_factory.mktemp("on two")
    moving.train(folder / "split", stop=3)
    per_device = {"per_device_train_batch_size": 3, "split_batches": False}
    in_processes(
        2,
        {"folder": folder / "split", "stop": 6},
        {"folder": folder / "per device", "stop": 6, **per_device},
    )
    return folder


def test_from_one_process_to_two_to_three_and_back(on_two, whole):
    in_processes(3, {"folder": on_two / "split", "stop": 9})
    assert_close(moving.train(on_two / "split"), whole)
    assert moving.beginnings(on_two / "split") == [(0, 1), (3, 2), (6, 3), (9, 1)]


def test_fewer_processes_without_split_batches_are_told_what_to_set(on_two, whole, caplog):
    settings = {"split_batches": False}
    moving.train(on_two / "per device", stop=7, per_device_train_batch_size=3, **settings)
    assert "An update had 12 samples and has 6 now" in caplog.text
    assert "set per_device_train_batch_size=6, or gradient_accumulation_steps=4" in caplog.text

    # It has saved nothing since step 6.
    found = moving.train(on_two / "per device", per_device_train_batch_size=6, **settings)
    assert_close(found, whole)


@pytest.mark.parametrize(
    "command",
    [
        [sys.executable, "-m", "kbtrain", "launch", "-n", "2"],
        pytest.param(
            [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"],
            marks=pytest.mark.cross,  # it is part of PyTorch
        ),
    ],
    ids=["kbtrain launch", "torchrun"],
)
def test_a_killed_process_is_started_again_and_nothing_is_lost(tmp_path, whole, command):
    tasks = [{"folder": tmp_path / "undisturbed"}, {"folder": tmp_path / "killed", "kill": 8}]
    inherited = {name: value for name, value in os.environ.items() if name not in JOINED}
    done = subprocess.run(
        [*command, "--max-restarts", "1", SCRIPT, json.dumps(tasks, default=str)],
        env=inherited | {"PYTHONPATH": os.pathsep.join([str(SUPPORT), *filter(None, sys.path)])},
        capture_output=True,
        text=True,
        timeout=540,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert moving.beginnings(tmp_path / "killed", rank=1) == [(0, 2), (6, 2)]
    found = alike(tmp_path / "killed", 2)
    assert different(found, alike(tmp_path / "undisturbed", 2)) == []
    assert_close(found, whole)
    if "torch.distributed.run" not in command:  # torchrun ends the other before it can say why
        # Its last report is up to a second old, in which this run comes a long way.
        named = r"process 1 .* failed: it was killed.* last seen .*, a second before or less"
        assert re.search(named, done.stderr), done.stderr


@pytest.mark.cross
def test_other_processes_on_other_backends(tmp_path):
    task = {"folder": tmp_path / "moved", "dropout": 0.0}
    for size, backend, stop in [(2, "torch", 3), (1, "tensorflow", 6), (2, "jax", 9)]:
        in_processes(size, task | {"stop": stop}, backend=backend)
    (found,) = in_processes(2, task, backend="tensorflow")
    assert moving.beginnings(task["folder"]) == [(0, 2), (3, 1), (6, 2), (9, 2)]
    assert_close(found, moving.train(tmp_path / "whole", dropout=0.0), 1e-5)
