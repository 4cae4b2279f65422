"""What processes send each other, on the host and inside steps: values, gradients, order."""

import json

import numpy as np
import pytest
from helpers_together import SUPPORT, run_processes

from kbtrain import backends

backend = backends.load()

pytestmark = pytest.mark.slow

DIVIDES_STEPS = backend.name == "jax"
"""JAX itself divides a step over the processes: there nothing is added up in it."""

SIZE = 2
FLOATS = ["float32", "float64", "float16", "bfloat16"]
SHAPES = [(), (3,), (0,), (2, 2)]


@pytest.fixture(scope="module")
def received(tmp_path_factory):
    """What each of two processes has received; they start once for all tests."""
    folder = tmp_path_factory.mktemp("collectives")
    run_processes(SIZE, SUPPORT / "collectives_program.py", str(folder), timeout=200)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(SIZE)]


def own(shape, rank):
    """The tensor of a process."""
    return np.arange(1, 1 + np.prod(shape, dtype=int)).reshape(shape) * (rank + 1)


def in_steps(test):
    return pytest.mark.skipif(DIVIDES_STEPS, reason="JAX divides steps itself")(test)


def test_each_knows_its_place(received):
    for rank, found in enumerate(received):
        assert found["group"] == found["joined"] == [rank, SIZE]
        assert found["shards"] == (1 if DIVIDES_STEPS else SIZE)


def test_the_devices_are_those_of_the_process(received):
    assert [found["devices"] for found in received] == [["cpu:0"], ["cpu:0"]]


def test_messages_of_all_sizes_arrive_in_order_of_rank(received):
    expected = [
        [b"", b""],
        [b"\0", b"\1"],
        [b"x" * 1019, b"x" * 1020],
        [b"x" * 1020, b"x" * 1021],
        [b"", bytes(range(256)) * 8],
        [b"0" * 5000, b"1" * 5002],
    ]
    for found in received:
        assert [[bytes.fromhex(part) for part in parts] for parts in found["exchange"]] == expected


@in_steps
@pytest.mark.parametrize("dtype", [*FLOATS, "int32", "int64"])
def test_sums_of_each_dtype_and_shape_eagerly_and_in_a_step(received, dtype):
    expected = [(own(shape, 0) + own(shape, 1)).tolist() for shape in SHAPES]
    for found in received:
        assert found["sums"][dtype] == [expected, expected]


@in_steps
def test_sums_of_several_dtypes_keep_them(received):
    for found in received:
        dtypes, values = found["mixed"]
        assert dtypes == ["float32", "int32", "float16", "float32", "int64"]
        assert values == [[3, 6]] * 5


@in_steps
@pytest.mark.parametrize("dtype", [*FLOATS, "int32", "uint8"])
def test_gathered_tensors_of_each_dtype_and_shape(received, dtype):
    expected = [[own(shape, rank).tolist() for rank in range(SIZE)] for shape in SHAPES]
    for found in received:
        assert found["gathers"][dtype] == [expected, expected]


@in_steps
def test_truth_values_can_be_gathered(received):
    for found in received:
        assert found["truth"] == [[1, 0, 1], [0, 0, 1]]


@in_steps
def test_the_gradient_of_a_sum_is_the_sum_of_the_gradients(received):
    weights = np.array([1.0, -2.0])
    factors = np.array([[1.0, 0.0], [2.0, 2.0]])
    total = weights * factors.sum(0)
    # Of process r the loss is (r + 1) * |total|^2 + 2 * sum(weights).
    outer = 2 * total * (1 + 2)
    for rank, found in enumerate(received):
        value, gradient = found["gradient"]
        assert value == (rank + 1) * np.sum(total**2) + 2 * weights.sum()
        assert gradient == (outer * factors[rank] + 2).tolist()


@in_steps
def test_several_operations_in_a_step_and_steps_in_a_call(received):
    state, counter = np.zeros(2), 0
    blocks = [np.arange(6.0).reshape(3, 2) + rank for rank in range(SIZE)]
    for number, count in enumerate([3, 1, 2]):
        states, wholes = [], []
        for i in range(count):
            rows = np.stack([block[i] for block in blocks])
            first, last = rows.sum(0), (rows**2).sum(0)
            state = SIZE * (first + state) / 10 + SIZE * last
            states.append(state)
            wholes.append(2 * counter + 1)
            counter += 1
        for found in received:
            np.testing.assert_allclose(found["several"][number][0], states, 1e-6)
            assert found["several"][number][1] == wholes


@in_steps
def test_each_process_takes_its_rows(received):
    for total, number in ((5, 0), (2, 1), (1, 2)):
        x = np.arange(2 * total).reshape(total, 2)
        for rank, found in enumerate(received):
            start, stop = total * rank // SIZE, total * (rank + 1) // SIZE
            # Where none is left, a row of another process stands in.
            rows = slice(start, stop) if stop > start else slice(0, 1)
            assert found["rows"][number] == [
                *(total, start, stop, max(stop - start, 1)),
                *(x[rows].tolist(), np.arange(total)[rows].tolist()),
            ]


@in_steps
def test_variables_are_copied_bit_for_bit(received):
    signed = repr([-0.0, 3.5, 7.0])
    whole = repr([0.0, 3.0, 7.0])
    for found in received:
        assert found["copies"] == [signed, signed, whole, whole, repr([0.0, 1.0, 1.0]), signed]


@in_steps
def test_all_processes_have_the_same_bits(received):
    for name in ("sums", "mixed", "gathers", "truth", "several", "copies"):
        assert received[0][name] == received[1][name]
