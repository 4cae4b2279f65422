"""Outputs on the host: put together with padding, in bounded memory, or batch by batch."""

import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kbtrain.errors import ConfigurationError, DataError
from kbtrain.evaluation.gather import (
    PADDING,
    BatchwiseMetrics,
    ConcatenatedOutputs,
    ListedOutputs,
    Rows,
    check_batchwise,
    checked_metrics,
)


def part(outputs, labels=None, inputs=None, losses=None):
    return SimpleNamespace(
        outputs=outputs,
        labels=labels,
        inputs=inputs,
        losses=losses,
        batches=len(outputs),
        size=outputs.shape[1] if outputs.ndim > 1 else 1,
    )


@settings(max_examples=60, deadline=None)
@given(
    pieces=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4), st.integers(1, 3)), min_size=1),
    expected=st.sampled_from([None, 0, 3, 1000]),
)
def test_rows_are_concatenated_and_padded(pieces, expected):
    arrays = [np.full(shape, i, np.int32) for i, shape in enumerate(pieces)]
    rows = Rows(expected)
    for array in arrays:
        rows.add(array)
    width, depth = (max(a.shape[axis] for a in arrays) for axis in (1, 2))
    reference = np.concatenate(
        [
            np.pad(
                a,
                [(0, 0), (0, width - a.shape[1]), (0, depth - a.shape[2])],
                constant_values=PADDING,
            )
            for a in arrays
        ]
    )
    np.testing.assert_array_equal(rows.result(), reference)


def test_rows_sorted_by_length_are_not_copied_for_each_length(monkeypatch):
    fits = []
    fit = Rows._fit
    monkeypatch.setattr(
        Rows, "_fit", lambda self, *a: fits.append(self._buffer.shape) or fit(self, *a)
    )
    rows = Rows(300)
    for length in range(1, 301):
        rows.add(np.full((1, length), length))
    result = rows.result()
    assert result.shape == (300, 300)
    assert result.flags.c_contiguous
    np.testing.assert_array_equal(result[9], [10] * 10 + [PADDING] * 290)
    assert len(set(fits)) < 30


def test_what_is_added_is_copied():
    array = np.zeros((2, 2))
    rows = Rows(2)
    rows.add(array)
    array[:] = 1
    assert rows.result().sum() == 0


def test_a_wider_dtype_takes_both():
    rows = Rows()
    rows.add(np.array([1, 2], np.int32))
    rows.add(np.array([0.5], np.float32))
    np.testing.assert_array_equal(rows.result(), [1.0, 2.0, 0.5])


@pytest.mark.parametrize("dtype", ["bool", "uint8"])
def test_padding_that_a_dtype_cannot_hold_is_an_error(dtype):
    rows = Rows()
    rows.add(np.zeros((1, 2), dtype))
    rows.add(np.zeros((1, 2), dtype))
    with pytest.raises(DataError, match=f"dtype {dtype} have different lengths"):
        rows.add(np.zeros((1, 3), dtype))


def test_another_number_of_axes_is_an_error():
    rows = Rows()
    rows.add(np.zeros((1, 2)))
    with pytest.raises(DataError, match="same number of axes"):
        rows.add(np.zeros((1, 2, 2)))


def peak_of(run):
    tracemalloc.start()
    try:
        result = run()
        return result, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("expected", "most"), [(4000, 1.05), (None, 1.65), (100_000, 26)])
def test_memory_is_that_of_the_result(expected, most):
    """Where the number of rows is known, nothing is ever held twice."""

    def gather():
        gathered = ConcatenatedOutputs(expected)
        for _ in range(250):
            gathered.add(part(np.ones((4, 4, 256), np.float32)))
        return gathered.take()["outputs"]

    outputs, peak = peak_of(gather)
    assert outputs.shape == (4000, 256)
    assert outputs.base is None
    assert peak < most * outputs.nbytes + 2**16


def test_an_output_without_a_row_per_sample_has_its_own_count():
    gathered = ConcatenatedOutputs(expected=8)
    scalars = {"mean": np.array([1.0, 2.0]), "matrix": np.ones((2, 3, 3))}
    gathered.add(SimpleNamespace(**(vars(part(np.zeros((2, 4, 1)))) | {"outputs": scalars})))
    taken = gathered.take()["outputs"]
    assert taken["mean"].tolist() == [1.0, 2.0]
    assert taken["matrix"].shape == (6, 3)


def test_lists_keep_each_batch():
    listed = ListedOutputs()
    x = np.arange(12.0).reshape(3, 2, 2)
    listed.add(part(x, labels={"a": x[..., 0]}, losses=np.array([1.0, 2.0, 3.0])))
    taken = listed.take()
    np.testing.assert_array_equal(taken["outputs"], list(x))
    assert [batch["a"].tolist() for batch in taken["labels"]] == x[..., 0].tolist()
    assert [batch.tolist() for batch in taken["losses"]] == [[1, 1], [2, 2], [3, 3]]


def test_only_the_last_batch_asks_for_the_result():
    calls = []

    def compute(prediction, compute_result):
        calls.append((prediction.predictions.tolist(), compute_result))
        return {"n": len(calls)} if compute_result else None

    batchwise = BatchwiseMetrics(compute)
    for values in ([[1], [2]], [[3]], [[4], [5]]):
        batchwise.add(part(np.array(values), labels=np.array(values)))
    assert batchwise.result() == {"n": 5}
    assert calls == [([1], False), ([2], False), ([3], False), ([4], False), ([5], True)]


def test_without_labels_nothing_is_computed():
    batchwise = BatchwiseMetrics(lambda *_: pytest.fail("no labels"))
    batchwise.add(part(np.zeros((2, 3))))
    assert batchwise.result() == {}


def test_compute_metrics_must_take_compute_result():
    check_batchwise(None)
    check_batchwise(lambda p, compute_result: {})
    check_batchwise(lambda p, **kwargs: {})
    with pytest.raises(ConfigurationError, match="compute_result"):
        check_batchwise(lambda p: {})


def test_compute_metrics_must_return_a_dict():
    assert checked_metrics({"a": np.float32(0.5)}) == {"a": 0.5}
    with pytest.raises(ConfigurationError, match=r"must return a dict.*Received: float"):
        checked_metrics(0.5)
