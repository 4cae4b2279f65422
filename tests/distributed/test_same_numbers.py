"""Several processes give the numbers of one: losses, gradients, weights, metrics, predictions."""

import json

import distributed_cases
import numpy as np
import pytest
from helpers_together import SUPPORT, run_processes

from kbtrain import backends

CASES = sorted(distributed_cases.CASES)
LINES = {
    # Weights after three epochs of SGD at 0.1 on y = 2x + 3, batches of 8, in exact arithmetic.
    "line 64": (1.502060, 3.164766),
    "line 61": (1.583857, 3.171361),
    "line 57": (1.687749, 3.169387),
}
# By element and quantized, orthogonalised, averaged; all others were compared once, on PyTorch.
OPTIMIZERS = ["adamw_8bit", "muon", "schedule_free_adamw"]
TOLERANCE = 5e-6 if backends.load().name == "tensorflow" else 1e-6


def ran(folder, size, names):
    """The results of cases by process."""
    output = folder / f"results of {size}"
    run_processes(size, SUPPORT / "distributed_cases.py", str(output), *names, timeout=540)
    return [json.loads((folder / f"{output.name}.{rank}").read_text()) for rank in range(size)]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return ran(tmp_path_factory.mktemp("one"), 1, CASES + OPTIMIZERS)[0]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return ran(tmp_path_factory.mktemp("two"), 2, CASES + OPTIMIZERS)


def assert_close(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, numbers in expected.items():
        np.testing.assert_allclose(found[name], numbers, tolerance, tolerance, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES + OPTIMIZERS)
def test_two_processes_give_the_numbers_of_one(one, two, case):
    # float16 rounds the gradients of each process.
    tolerance = 1e-3 if case == "half precision" else 3 * TOLERANCE
    assert_close(two[0][case], one[case], tolerance)


@pytest.mark.slow
def test_all_processes_have_the_same_numbers_bit_for_bit(two):
    assert two[0] == two[1]


@pytest.mark.slow
@pytest.mark.parametrize("line", LINES)
def test_lines_are_those_of_exact_arithmetic(one, two, line):
    for found in (one, *two):
        slope, offset = found[line]["weight 0"][0], found[line]["weight 1"][0]
        np.testing.assert_allclose((slope, offset), LINES[line], atol=1e-6 + TOLERANCE)


@pytest.mark.slow
def test_three_processes_share_batches_of_eight(tmp_path, one):
    names = [*LINES, "tokens", "accumulated", "batch statistics", "divided", "divided, eagerly"]
    three = ran(tmp_path, 3, names)
    assert three[0] == three[1] == three[2]
    for name in names:
        assert_close(three[0][name], one[name], 3 * TOLERANCE)
