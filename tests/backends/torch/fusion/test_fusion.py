"""Steps of few kernels on PyTorch, counted on a CPU, and numbers of their Triton kernel.

No GPU is needed: the kernel is run by Triton's interpreter, and compiled for two GPUs.
"""

import json
import sys

import pytest
from helpers_resume import run_script
from paths import ROOT, SUPPORT

pytestmark = [
    pytest.mark.cross,  # needs PyTorch and Triton, whatever Keras runs on
    pytest.mark.skipif(sys.platform != "linux", reason="Triton has wheels for Linux only"),
]

FORWARD_BACKWARD, TAIL = "forward, backward", "clipping, checks"
OPTIMIZER, STATE = "optimizer", "state, metrics, results"


def run(what, folder, **environ):
    """What the program prints, on PyTorch."""
    environ["OMP_NUM_THREADS"] = "1"
    program = SUPPORT / "helpers_fusion.py"
    printed = run_script(program, [what, folder], "torch", [ROOT], timeout=300, **environ)
    return json.loads(printed.splitlines()[-1])


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    return run("steps", tmp_path_factory.mktemp("steps"))


def test_what_is_computed_of_scalars_is_one_kernel(steps):
    """Three for the norm of all gradients, however many there are, and this one."""
    counts = steps["counts"]
    assert counts["mlp"][TAIL] == counts["cosine"][TAIL] == counts["deep"][TAIL] == 4
    assert counts["mlp"][STATE] == 0
    assert counts["mlp"][FORWARD_BACKWARD] <= 24
    assert sum(counts["mlp"].values()) <= 30  # 67 operations were recorded


def test_gradients_are_added_in_one_kernel_of_a_micro_batch(steps):
    """Beside its loss: sums of gradients are state, neither inputs nor results."""
    forward_backward = steps["counts"]["mlp"][FORWARD_BACKWARD]
    assert sum(steps["counts"]["accumulated"].values()) == forward_backward + 2


def test_moving_statistics_take_no_more_kernels_for_more_layers(steps):
    few, many = steps["counts"]["normalized"]
    assert few[TAIL] == many[TAIL]
    assert few[STATE] == many[STATE] == 0
    # A layer has 9: convolution, bias and normalization, forward and backward.
    assert many[FORWARD_BACKWARD] - few[FORWARD_BACKWARD] <= 3 * 9
    # With the copies of kernels' gradients to the layout of the kernels.
    assert many[OPTIMIZER] - few[OPTIMIZER] <= 3 + 1


def test_the_numbers_are_those_of_the_step_as_recorded(steps):
    assert steps["plain"] < 5e-6
    assert steps["accumulation"] < 5e-6
    assert steps["not finite"] < 5e-6


def test_kernels_compile_for_gpus(steps):
    assert len(steps["compiled"]) == 4 + 6 + 4
    assert all(size > 1000 for size in steps["compiled"].values())


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    return run("numbers", tmp_path_factory.mktemp("numbers"), TRITON_INTERPRET="1")


def test_random_numbers_are_those_of_the_operations(numbers):
    _, errors, *_ = numbers
    normal = errors.pop("normal")
    assert errors == {"uniform": 0, "randint": 0, "bernoulli": 0}
    assert normal < 2e-6  # a standard deviation is 2


def test_operations_on_scalars_round_as_those_of_pytorch(numbers):
    errors, *_ = numbers
    assert len(errors) == 33
    assert min(tried for tried, _ in errors.values()) >= 9
    inexact = {name: error for name, (_, error) in errors.items() if error > 0}
    # The last digit of float32, and of float64.
    limits = {"cos": 2e-7, "sin": 2e-7, "pow.Tensor_Tensor": 1e-15, "pow.Tensor_Scalar": 1e-15}
    assert {name: x for name, x in inexact.items() if not x < limits.get(name, 0)} == {}


def test_a_kernel_that_gives_other_numbers_is_not_used(numbers):
    result, assigned, *messages = numbers[2]
    assert result == assigned == 8  # nothing was assigned before
    assert len(messages) == 2
    assert "scalars of a step in one kernel does not work" in messages[0]
    assert "not those of the operations" in messages[1]


def test_the_norm_of_all_gradients_by_kernels_is_that_of_numpy(numbers):
    errors, odd, wrong = numbers[3]
    assert errors.pop("float64") < 1e-15
    assert len(errors) == 5
    assert all(error < 2e-7 for error in errors.values())
    assert odd.pop("launches for 460 tensors") == 4
    assert odd == {"nan": "nan", "inf": "inf", "too large": "inf", "empty": "0.0"}
    value, again, message = wrong  # one warning, and the right number
    assert value == again == 2
    assert "norm of all gradients in a kernel does not work" in message
