"""Ray Train on a cluster of two local nodes: a worker is killed, and the page's script."""

import json
import os
import re
import subprocess
import sys

import helpers_moving as moving
import numpy as np
import pytest
from helpers_together import JOINED, SUPPORT
from paths import ROOT

from kbtrain.distributed import ray


def test_outside_of_ray_train_there_are_no_workers():
    assert ray.detect() is None


def run_with_ray(backend, *words):
    """Run ``helpers_ray.py`` to its end."""
    inherited = {name: value for name, value in os.environ.items() if name not in JOINED}
    process = subprocess.Popen(
        [sys.executable, SUPPORT / "helpers_ray.py", *words],
        env=inherited
        | {
            "PYTHONPATH": os.pathsep.join([str(SUPPORT), *filter(None, sys.path)]),
            "OMP_NUM_THREADS": "1",
            "KERAS_BACKEND": backend,
            "RAY_worker_niceness": "0",  # or the other tests leave the workers no time
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = process.communicate(timeout=540)
    except subprocess.TimeoutExpired:
        process.terminate()  # it ends the cluster
        output, _ = process.communicate(timeout=60)
        raise AssertionError(f"It takes too long: {output}") from None
    assert process.returncode == 0, output


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run in one process, on this backend."""
    pytest.importorskip("ray")
    return moving.train(tmp_path_factory.mktemp("whole"), dropout=0.0)


@pytest.mark.cross
@pytest.mark.slow
@pytest.mark.parametrize("backend", ["jax", "tensorflow", "torch"])
def test_a_worker_is_killed_and_the_run_ends_as_without_that(tmp_path, whole, backend):
    task = {"folder": str(tmp_path), "kill": 8, "dropout": 0.0}
    run_with_ray(backend, backend, json.dumps(task))
    assert moving.beginnings(tmp_path, rank=1) == [(0, 2), (6, 2)]
    both = moving.results(tmp_path, 2)
    for name, values in whole.items():
        assert both[0][name].tobytes() == both[1][name].tobytes()
        np.testing.assert_allclose(both[0][name], values, 1e-5, 1e-5, err_msg=name)


@pytest.mark.cross
@pytest.mark.slow
def test_the_script_of_the_page_runs(tmp_path):
    pytest.importorskip("ray")
    page = (ROOT / "docs" / "clusters.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    path = tmp_path / "train_ray.py"
    path.write_text(script, encoding="utf-8")
    run_with_ray("jax", path, tmp_path / "out")
    state = json.loads((tmp_path / "out" / "checkpoint-32" / "trainer_state.json").read_text())
    assert state["global_step"] == 2 * 256 // 16  # as with one process
    assert state["train_batch_size"] == 16
