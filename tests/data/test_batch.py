"""What a batch is: unpacking, sizes, signatures, stacking, and conversion to NumPy."""

import doctest
import importlib
from collections import UserDict
from typing import NamedTuple

import keras
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kbtrain.data import (
    ArraySource,
    Batch,
    batch_size,
    concatenate,
    default_collate,
    map_structure,
    signature,
    stack,
    to_batch,
    to_numpy,
    unpack,
)
from kbtrain.errors import DataError

pytestmark = pytest.mark.core

X = np.arange(12, dtype=np.float32).reshape(4, 3)
Y = np.arange(4)
W = np.ones(4, np.float32)

quick = settings(database=None, deadline=None, max_examples=60)


def assert_same(actual, expected):
    """Structures equal in kind, dtype, shape and value."""
    assert type(actual) is type(expected)
    if isinstance(expected, dict):
        assert list(actual) == list(expected)
        for key in expected:
            assert_same(actual[key], expected[key])
    elif isinstance(expected, (tuple, list)):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            assert_same(one, other)
    elif expected is not None:
        assert actual.dtype == expected.dtype
        np.testing.assert_array_equal(actual, expected)


# ------------------------------------------------------------------------------------------ unpack


@pytest.mark.parametrize(
    ("batch", "present"),
    [
        (X, (True, False, False)),
        ((X,), (True, False, False)),
        ((X, Y), (True, True, False)),
        ([X, Y], (True, True, False)),
        ((X, Y, W), (True, True, True)),
        ((X, None, W), (True, False, True)),
        (Batch(X, Y), (True, True, False)),
    ],
)
def test_unpack_tuples_and_arrays(batch, present):
    parts = unpack(batch)
    for part, expected, there in zip(parts, (X, Y, W), present, strict=True):
        assert (part is expected) if there else (part is None)


@pytest.mark.parametrize("key", ["labels", "label", "label_ids"])
@pytest.mark.parametrize("mapping", [dict, UserDict])
def test_unpack_dict(key, mapping):
    parts = unpack(mapping({"a": X, key: Y, "sample_weight": W, "b": X}))
    assert list(parts.x) == ["a", "b"]
    assert parts.y is Y
    assert parts.sample_weight is W


def test_unpack_dict_without_labels():
    assert unpack({"a": X}) == Batch({"a": X}, None, None)


def test_unpack_leaves_the_batch_alone():
    batch = {"a": X, "labels": Y}
    unpack(batch)
    assert list(batch) == ["a", "labels"]


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((), "Received: 0 parts"),
        ((X, X, Y, W), r"\(\(x1, x2\), y\).*Received: 4 parts"),
        ({"labels": Y}, r"at least one input.*\['labels'\]"),
        ({"a": X, "labels": Y, "label": Y}, r"Received: \['labels', 'label'\]"),
        (None, "Received: None"),
    ],
)
def test_unpack_errors(batch, message):
    with pytest.raises(DataError, match=message):
        unpack(batch)


# -------------------------------------------------------------------------- batch_size, signature


@pytest.mark.parametrize("batch", [X, (X, Y), {"a": X, "labels": Y}, ({"a": [X, X]}, (Y, Y), W)])
def test_batch_size(batch):
    assert batch_size(batch) == 4


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((X, Y[:3]), r"same length.*x: \(4, 3\), y: \(3,\)"),
        ({"a": X, "b": X[:1]}, r"\['a'\]: \(4, 3\), \['b'\]: \(1, 3\)"),
        (({"a": X, "b": (X, X[:2])}, Y), r"x\['b'\]\[1\]: \(2, 3\)"),
        ((X, Y, np.float32(1)), r"scalar has none.*sample_weight: \(\)"),
        ({}, "are missing"),
    ],
)
def test_batch_size_errors(batch, message):
    with pytest.raises(DataError, match=message):
        batch_size(batch)


def test_signature_depends_on_structure_shape_and_dtype_only():
    base = signature(({"a": X, "b": Y}, Y))
    assert hash(base) == hash(signature(({"a": X + 1, "b": Y * 0}, Y)))
    assert base == signature(({"b": Y, "a": X}, Y))
    others = [
        ({"a": X, "b": Y}, None),
        ({"a": X, "b": Y}, (Y,)),
        ({"a": X, "c": Y}, Y),
        ({"a": X[:3], "b": Y[:3]}, Y[:3]),
        ({"a": X.astype(np.float16), "b": Y}, Y),
        ({"a": X, "b": Y}, Y.astype(np.int32)),
        [{"a": X, "b": Y}, Y],
    ]
    assert len({base, *map(signature, others)}) == len(others) + 1


def test_signature_takes_tensors():
    tensor = keras.ops.convert_to_tensor(X)
    assert signature((tensor,)) == signature((keras.ops.convert_to_tensor(X + 1),))
    assert signature((tensor,)) != signature((tensor[:2],))


# ------------------------------------------------------------------------------- stack, concatenate


def test_stack_adds_a_leading_axis():
    batches = [({"a": X + i}, Y + i) for i in range(5)]
    stacked = stack(batches)
    assert stacked[0]["a"].shape == (5, 4, 3)
    for i, batch in enumerate(batches):
        assert_same(map_structure(lambda array, i=i: array[i], stacked), batch)


def test_stack_keeps_none():
    assert stack([(X, None), (X, None)])[1] is None


@pytest.mark.parametrize(
    "other", [(X[:2], Y[:2]), (X.astype(np.float16), Y), (X,), {"a": X}, (X, None)]
)
def test_stack_refuses_unlike_batches(other):
    with pytest.raises(DataError, match=r"Batches to stack must agree.*Batch 1 differs"):
        stack([(X, Y), other])


def test_concatenate():
    joined = concatenate([(X, {"y": Y}), (X[:1], {"y": Y[:1]})])
    assert_same(joined, (np.concatenate([X, X[:1]]), {"y": np.array([0, 1, 2, 3, 0])}))
    with pytest.raises(DataError, match=r"concatenate must agree.*\[4, 3\].*float32\[4, 2\]"):
        concatenate([X, X[:, :2]])


@pytest.mark.parametrize("function", [stack, concatenate])
def test_joining_nothing_is_an_error(function):
    with pytest.raises(DataError, match="at least one batch"):
        function([])


# ---------------------------------------------------------------------------------------- to_numpy


class Point(NamedTuple):
    a: object
    b: object


class Tensor:
    """Stands for an array of another library."""

    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        return self.array


class GradientTensor(Tensor):
    """Refuses conversion, as torch's do, before it is detached and on the host."""

    def __init__(self, array, steps=()):
        super().__init__(array)
        self.steps = steps

    def detach(self):
        return GradientTensor(self.array, (*self.steps, "detach"))

    def cpu(self):
        return GradientTensor(self.array, (*self.steps, "cpu"))

    def __array__(self, dtype=None, copy=None):
        if self.steps != ("detach", "cpu"):
            raise TypeError("still on the device")
        return self.array


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (X, X),
        (X.astype(np.float64), X),
        (X.astype(np.longdouble), X),
        (X.astype(">f4"), X),
        (X.astype(np.float16), X.astype(np.float16)),
        (Y.astype(">i4"), Y.astype(np.int32)),
        (Y.astype(np.int64), Y.astype(np.int64)),
        (Y.astype(np.uint8), Y.astype(np.uint8)),
        (Y > 1, Y > 1),
        (X.astype(ml_dtypes.bfloat16), X.astype(ml_dtypes.bfloat16)),
        (3, np.array(3, np.int64)),
        (2.5, np.array(2.5, np.float32)),
        (True, np.array(True)),
        (np.float64(2.5), np.array(2.5, np.float32)),
        ([1, 2], np.array([1, 2])),
        ([[1.5, 2], [3, 4]], np.array([[1.5, 2], [3, 4]], np.float32)),
        ((1, 2), np.array([1, 2])),
        (range(3), np.arange(3)),
        ([np.float32(1), np.float32(2)], np.array([1, 2], np.float32)),
        ([np.array(1), np.array(2)], np.array([1, 2])),
        (Tensor(X.astype(np.float64)), X),
        (GradientTensor(X), X),
        (X.view(np.recarray), X),
        ([X, Tensor(Y)], [X, Y]),
        ((X, [1]), (X, np.array([1]))),
        (Point(X, 2), Point(X, np.array(2))),
        (UserDict(a=X, b=None), {"a": X, "b": None}),
    ],
)
def test_to_numpy(value, expected):
    assert_same(to_numpy(value), expected)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int32", "bool"])
def test_to_numpy_of_the_backends_tensors(dtype):
    tensor = keras.ops.cast(keras.ops.convert_to_tensor([[0.0, 1.0]]), dtype)
    array = to_numpy(tensor)
    assert array.dtype == np.dtype(dtype)
    assert array.astype(np.float32).tolist() == [[0.0, 1.0]]


def test_float32_is_not_copied():
    assert to_numpy({"a": X})["a"] is X


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.array(["a", "b"]), r"batch\['k'\] holds strings.*[Tt]okenize"),
        (np.array([b"a"]), "holds strings"),
        (["a", "b"], "holds strings"),
        (np.array([b"a", b"bc"], object), "holds strings"),
        ("text", r"is a string.*'text'"),
        (np.array([None, 1]), r"holds Python objects.*dtype=object"),
        ([[1, 2], [3]], "different lengths"),
        (np.array(["2020-01-01"], "M8[D]"), "holds dates"),
        (np.array([1], "m8[s]"), "holds time differences"),
        (np.zeros(2, [("a", "f4")]), "structured records"),
        (np.ma.array([1, 2], mask=[0, 1]), "masked array"),
        (2**70, "int64"),
        (object(), "type object"),
        ({1, 2}, "type set"),
    ],
)
def test_to_numpy_errors(value, message):
    with pytest.raises(DataError, match=message):
        to_numpy({"k": value})


def test_memory_errors_are_not_renamed():
    class Huge:
        def __array__(self, dtype=None, copy=None):
            raise MemoryError

    with pytest.raises(MemoryError):
        to_numpy(Huge())


def test_to_batch_makes_a_tuple_of_a_list_of_parts():
    assert_same(to_batch([X, Tensor(Y)]), (X, Y))
    assert_same(to_batch(([[1.0], [2.0]], [0, 1])), (np.array([[1], [2]], "f4"), np.array([0, 1])))
    assert_same(to_batch([[1, 2], [3, 4]]), np.array([[1, 2], [3, 4]]))


@pytest.mark.parametrize("value", [None, 5, (), (X, Y[:2]), (X, X, X, X), {"a": "text"}, {}])
def test_to_batch_errors(value):
    with pytest.raises(DataError):
        to_batch(value)


# -------------------------------------------------------------------------------- nested structures

DTYPES = [np.float32, np.float16, np.int64, np.int32, np.uint8, np.bool_]


def structures(length):
    leaf = st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(1, 3), max_size=2)).map(
        lambda spec: (
            (np.arange(length * int(np.prod(spec[1]))) % 7)
            .reshape(length, *spec[1])
            .astype(spec[0])
        )
    )
    return st.recursive(
        leaf,
        lambda inner: st.one_of(
            st.dictionaries(st.text("abc", min_size=1, max_size=2), inner, min_size=1, max_size=3),
            st.lists(inner, min_size=1, max_size=3),
            st.lists(inner, min_size=1, max_size=3).map(tuple),
        ),
        max_leaves=6,
    )


@quick
@given(st.integers(1, 9).flatmap(structures), st.integers(1, 4))
def test_nested_structures_round_trip(x, size):
    source = ArraySource((x, {"y": x}))
    batches = [
        source.gather(range(start, start + size))
        for start in range(0, len(source) - len(source) % size, size)
    ]
    if batches:
        whole = source.gather(range(len(batches) * size))
        assert_same(concatenate(batches), whole)
        unstacked = [
            map_structure(lambda a, i=i: a[i], stack(batches)) for i in range(len(batches))
        ]
        for one, other in zip(unstacked, batches, strict=True):
            assert_same(one, other)
            assert signature(one) == signature(other)


@quick
@given(st.integers(1, 9).flatmap(structures), st.integers(0, 5))
def test_samples_collate_to_what_gather_returns(x, seed):
    source = ArraySource((x, x))
    indices = np.random.default_rng(seed).permutation(len(source))
    assert_same(default_collate(source.samples(indices)), source.gather(indices))


@quick
@given(structures(3))
def test_to_numpy_is_idempotent(x):
    assert_same(to_numpy(x), x)


@pytest.mark.parametrize(
    "module",
    [
        "batch",
        "collators.default",
        "sources.columns",
        "loader",
        "sources.infer",
        "sampling.sampler",
    ],
)
def test_examples_in_docstrings(module):
    result = doctest.testmod(importlib.import_module(f"kbtrain.data.{module}"))
    assert result.failed == 0
    assert result.attempted > 0 or module == "sources.columns"
