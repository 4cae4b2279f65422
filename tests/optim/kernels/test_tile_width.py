"""How much memory an update takes on a GPU besides the state: no more than a tile's."""

import importlib
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from paths import ROOT

pytestmark = pytest.mark.cross  # needs PyTorch, whatever Keras runs on

MODULES = ("adafactor", "eight_bit", "elementwise")


@pytest.fixture(scope="module")
def torch():
    return importlib.import_module("torch")


@pytest.mark.parametrize("name", MODULES)
def test_a_tile_on_a_gpu_is_bounded_whatever_the_largest_tensor_is(name, torch):
    module = importlib.import_module(f"optim.kernels.torch.{name}")
    width = module.tile_width(module._TILE, 1 << 31, torch.device("cuda", 1))
    assert width == 1 << 24
    assert width % module.tile_width(module._TILE, 1 << 8, torch.device("cuda")) == 0
    assert module.tile_width(module._TILE, 1000, torch.device("cuda")) == 1000


@pytest.mark.parametrize("name", MODULES)
def test_numbers_do_not_depend_on_the_tiles_of_a_gpu(name, torch, monkeypatch):
    if name == "elementwise" and keras.backend.backend() != "torch":
        _test_on_torch()  # these rules are written in keras.ops
        return
    module = importlib.import_module(f"optim.kernels.torch.{name}")
    custom_op = importlib.import_module("optim.kernels.torch.custom_op")
    on_gpu = torch.device("cuda")
    monkeypatch.setattr(
        module, "tile_width", lambda each, largest, _: custom_op.tile_width(each, largest, on_gpu)
    )
    results = []
    for most in (1 << 24, 1 << 11):
        monkeypatch.setattr(custom_op, "MOST_ELEMENTS", most)
        results.append(_updated(name, torch))
    for whole, tiled in zip(*results, strict=True):
        # The sums of Adafactor's rule are added in another order.
        np.testing.assert_allclose(tiled, whole, rtol=1e-6 * (name == "adafactor"), atol=1e-8)


def _test_on_torch():
    """Run the test once more, in a process whose Keras runs on PyTorch."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "cross"]
    command += ["-k", "do_not_depend and elementwise", __file__]
    environ = {n: v for n, v in os.environ.items() if not n.startswith("PYTEST_")}
    done = subprocess.run(
        command, env=environ | {"KERAS_BACKEND": "torch"}, cwd=ROOT,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout


def _updated(name, torch):
    """Parameters after two updates by a kernel, on a CPU."""
    draw = np.random.default_rng(0)
    shapes = [(130, 70), (5000,), (3,)]
    parameters = [torch.tensor(draw.normal(size=s).astype("float32")) for s in shapes]
    step, rate = torch.tensor(1.0), torch.tensor(1e-2)
    optim = importlib.import_module("optim")
    kernels = importlib.import_module("optim.kernels.torch")
    rule = {
        "adafactor": lambda: optim.Adafactor(1e-2),
        "eight_bit": lambda: optim.AdamW8bit(1e-2),
        "elementwise": lambda: optim.Lion(1e-2),
    }[name]()
    slots = {}
    for parameter in parameters:
        for key, slot in _slots(rule, tuple(parameter.shape)).items():
            slots.setdefault(key, []).append(torch.tensor(slot))
    for _ in range(2):
        gradients = [torch.tensor(draw.normal(size=s).astype("float32")) for s in shapes]
        with torch.no_grad():
            kernels._fused(rule)(rule, parameters, gradients, slots, step, rate, 0.01)
        step = step + 1
    return [p.numpy() for p in parameters]


def _slots(rule, shape):
    """The initial state of one parameter, as NumPy arrays."""
    found = {}
    for name, slot in rule.slot_shapes(shape).items():
        if isinstance(slot, tuple):
            found[name] = np.zeros(slot, "float32")
        else:
            found[name] = np.zeros(slot.shape, slot.dtype)
    return found
