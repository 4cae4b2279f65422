"""Every optimizer's state, written on one backend and read on the next."""

import os
import subprocess
import sys

import numpy as np
import pytest
from helpers_contract import NAMES
from paths import SUPPORT

pytestmark = [pytest.mark.cross, pytest.mark.slow]

# The others go on from the state that the first has written.
CHAIN = ["torch", "jax", "tensorflow"]


def on_backend(backend, *folders):
    environment = {**os.environ, "KERAS_BACKEND": backend}
    script = SUPPORT / "helpers_optim_cross.py"
    result = subprocess.run(
        [sys.executable, str(script), *map(str, folders)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    found = {}
    for backend in CHAIN:
        found[backend] = tmp_path_factory.mktemp(backend)
        on_backend(backend, found[backend], *([found["torch"]] if backend != "torch" else []))
    return found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", CHAIN[1:])
def test_the_next_update_is_the_same(folders, name, backend):
    with (
        np.load(folders["torch"] / f"{name}.npz") as ours,
        np.load(folders[backend] / f"{name}.npz") as theirs,
    ):
        assert ours.files == theirs.files
        for key in ours.files:
            np.testing.assert_allclose(theirs[key], ours[key], rtol=2e-4, atol=2e-6)
