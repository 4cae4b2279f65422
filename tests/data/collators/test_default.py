"""Joining samples into a batch."""

import keras
import numpy as np
import pytest

from kbtrain.data import default_collate
from kbtrain.errors import DataError

pytestmark = pytest.mark.core

ROW = np.arange(3, dtype=np.float32)


def test_dicts_are_stacked_by_key():
    batch = default_collate([{"x": ROW, "n": 1, "f": 0.5}, {"f": 1.5, "x": ROW + 1, "n": 2}])
    assert list(batch) == ["x", "n", "f"]
    np.testing.assert_array_equal(batch["x"], [[0, 1, 2], [1, 2, 3]])
    assert (batch["n"].tolist(), batch["n"].dtype) == ([1, 2], np.int64)
    assert (batch["f"].tolist(), batch["f"].dtype) == ([0.5, 1.5], np.float32)


@pytest.mark.parametrize("key", ["label", "label_ids", "labels"])
def test_label_keys_become_labels_in_place(key):
    batch = default_collate([{key: 0, "x": 1}, {key: 1, "x": 2}])
    assert list(batch) == ["labels", "x"]
    assert batch["labels"].tolist() == [0, 1]


def test_only_the_outer_dict_is_renamed():
    batch = default_collate([{"x": {"label": 1}}])
    assert list(batch["x"]) == ["label"]


@pytest.mark.parametrize("sample", [(1.0, 2), (ROW, 2), ([0.0, 1.0, 2.0], 2)])
def test_tuples_are_stacked_by_position(sample):
    x, y = default_collate([sample, sample, sample])
    np.testing.assert_array_equal(x, np.stack([np.asarray(sample[0], np.float32)] * 3))
    assert x.dtype == np.float32
    assert y.tolist() == [2, 2, 2]


def test_scalars_arrays_and_lists_of_numbers():
    assert default_collate([1, 2, 3]).tolist() == [1, 2, 3]
    assert default_collate([np.int32(1), np.int32(2)]).dtype == np.int32
    assert default_collate([ROW, ROW]).shape == (2, 3)
    assert default_collate([[1, 2], [3, 4]]).tolist() == [[1, 2], [3, 4]]


def test_nested_samples_keep_their_structure():
    sample = ({"a": [ROW, 1], "b": (ROW, 2.0)}, 3)
    x, y = default_collate([sample, sample])
    assert isinstance(x["a"], list)
    assert isinstance(x["b"], tuple)
    assert [leaf.shape for leaf in (*x["a"], *x["b"], y)] == [(2, 3), (2,), (2, 3), (2,), (2,)]


def test_integers_mixed_with_floats_stay_float32():
    assert default_collate([1, 2.5]).dtype == np.float32


def test_tensors_of_the_backend():
    samples = [{"x": keras.ops.convert_to_tensor(ROW + i)} for i in range(2)]
    batch = default_collate(samples)
    assert type(batch["x"]) is np.ndarray
    np.testing.assert_array_equal(batch["x"], [ROW, ROW + 1])


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([], "at least one sample"),
        (
            [{"ids": [1, 2]}, {"ids": [1, 2, 3]}],
            r"sample\['ids'\] differs in shape.*\(2,\) in sample 0.*\(3,\) in sample 1.*collator",
        ),
        ([(ROW, 1), (ROW[:2], 1)], r"sample\[0\] differs in shape.*pads"),
        ([{"text": "a", "x": 1}], r"sample\['text'\] is a string"),
        ([{"x": 1}, {"x": None}], r"sample\['x'\] is None in sample 1"),
        ([{"x": 1, "y": 2}, {"x": 1}], r"same keys.*sample 1.*\['x'\]"),
        ([{"x": 1}, (1,)], r"same keys.*sample=tuple"),
        ([(1, 2), (1, 2, 3)], r"same number of parts.*3 parts"),
        ([(1, 2), 5], r"same number of parts.*int"),
        ([{"x": object()}], r"sample\['x'\] cannot be read"),
        ([{"x": {"deep": ["a"]}}], r"sample\['x'\]\['deep'\] holds strings"),
    ],
)
def test_errors_name_the_field(samples, message):
    with pytest.raises(DataError, match=message):
        default_collate(samples)
