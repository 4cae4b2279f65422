"""Recognising data, and reading it by index or in order."""

import ast
import itertools
import logging
import pathlib
import sys
from collections import UserDict

import h5py
import keras
import numpy as np
import pytest

import kbtrain.data
from kbtrain.data import ArraySource, IterableSource, MapSource, UnsizedDataError, as_source
from kbtrain.data.sources.columns import DiskColumn
from kbtrain.errors import DataError

X = np.arange(30, dtype=np.float32).reshape(10, 3)
Y = np.arange(10)


class Squares:
    """A map-style data set."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        assert type(index) is int
        if index >= 10:
            raise IndexError(index)
        return {"x": X[index], "label": index**2}


class Together(Squares):
    def __init__(self):
        self.calls = []

    def __getitems__(self, indices):
        self.calls.append(indices)
        return [super(Together, self).__getitem__(i) for i in indices]


class IterableDataset(Squares):
    """As torch's: it inherits a __getitem__ that is of no use."""

    def __getitem__(self, index):
        raise NotImplementedError

    def __iter__(self):
        return iter(zip(X, Y, strict=True))


class Stream:
    def __iter__(self):
        return iter(zip(X, Y, strict=True))


def generate():
    yield from zip(X, Y, strict=True)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (X, ArraySource),
        ((X,), ArraySource),
        ((X, Y), ArraySource),
        ((X, Y, Y), ArraySource),
        ((X.tolist(), Y.tolist()), ArraySource),
        (({"a": X, "b": [X, X]}, Y), ArraySource),
        ({"x": X, "label": Y}, ArraySource),
        (UserDict(x=X, labels=Y), ArraySource),
        (Squares(), MapSource),
        ([(1, 2), (3, 4)], MapSource),
        ([{"x": 1}], MapSource),
        (range(4), MapSource),
        (IterableDataset(), IterableSource),
        (Stream(), IterableSource),
        (generate, IterableSource),
        (generate(), IterableSource),
        (zip(X, Y, strict=True), IterableSource),
    ],
)
def test_each_kind_of_data_gets_its_source(data, kind):
    source = as_source(data)
    assert type(source) is kind
    assert source.sized is (kind is not IterableSource)
    assert as_source(source) is source


# -------------------------------------------------------------------------------------- ArraySource


@pytest.mark.parametrize("indices", [range(2, 5), np.array([7, 0, 7])])
def test_arrays_are_gathered(indices):
    source = as_source(({"a": X, "b": (X * 2, Y)}, Y, X[:, 0]))
    x, y, weight = source.gather(indices)
    rows = list(indices)
    np.testing.assert_array_equal(x["a"], X[rows])
    np.testing.assert_array_equal(x["b"][0], X[rows] * 2)
    np.testing.assert_array_equal(x["b"][1], Y[rows])
    np.testing.assert_array_equal(y, Y[rows])
    np.testing.assert_array_equal(weight, X[rows, 0])
    assert len(source) == 10


def test_consecutive_rows_are_a_view_and_scattered_ones_are_not():
    source = as_source(X)
    assert np.shares_memory(source.gather(range(3)), X)
    assert not np.shares_memory(source.gather(np.array([0, 1])), X)


@pytest.mark.parametrize(
    "array",
    [
        np.broadcast_to(np.float32(1), (6, 2)),
        np.asfortranarray(np.ones((6, 2), np.float32)),
        np.ones((6, 2), np.float32)[::-1],
        np.ones((6, 2), np.float64),
    ],
)
@pytest.mark.parametrize("indices", [range(1, 4), np.array([2, 0])])
def test_batches_are_float32_contiguous_and_writeable(array, indices):
    batch = as_source(array).gather(indices)
    assert batch.dtype == np.float32
    assert batch.flags.carray
    assert batch.tolist() == [[1.0, 1.0]] * len(indices)


def test_float64_data_is_not_converted_as_a_whole():
    wide = X.astype(np.float64)
    source = as_source(wide)
    wide[4] = -1
    assert source.gather(range(4, 5)).tolist() == [[-1, -1, -1]]


def test_samples_have_the_structure_of_the_data():
    samples = as_source(({"a": X}, Y)).samples(range(2, 4))
    assert [(sample[0]["a"].tolist(), int(sample[1])) for sample in samples] == [
        ([6, 7, 8], 2),
        ([9, 10, 11], 3),
    ]


def test_writing_into_samples_leaves_the_data_alone():
    data = X.copy()
    for sample in as_source(data).samples(range(10)):
        sample += 1
    np.testing.assert_array_equal(data, X)


def test_tensors_of_the_backend_are_arrays():
    source = as_source((keras.ops.convert_to_tensor(X), keras.ops.convert_to_tensor(Y)))
    x, y = source.gather(np.array([3, 1]))
    assert type(x) is np.ndarray
    np.testing.assert_array_equal(x, X[[3, 1]])
    np.testing.assert_array_equal(y, [3, 1])


def test_memory_map_stays_on_disk(tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, X.astype(np.float64))
    mapped = np.load(path, mmap_mode="r")
    source = as_source((mapped, Y))
    assert np.shares_memory(source._columns[0], mapped)
    for indices in (range(2, 4), np.array([9, 0])):
        batch = source.gather(indices)[0]
        assert type(batch) is np.ndarray
        assert batch.flags.writeable
        np.testing.assert_array_equal(batch, X[list(indices)])


def test_hdf5_dataset_is_read_a_batch_at_a_time(tmp_path, monkeypatch):
    with h5py.File(tmp_path / "data.h5", "w") as file:
        file["x"], file["labels"] = X.astype(">f8"), Y
        source = as_source(file)  # a group is a mapping

        def forbidden(*args, **kwargs):
            raise AssertionError("the whole data set was read")

        monkeypatch.setattr(h5py.Dataset, "__array__", forbidden)
        assert isinstance(source._columns["x"], DiskColumn)
        for indices in (range(2, 5), np.array([7, 0, 7, 3])):
            batch = source.gather(indices)
            np.testing.assert_array_equal(batch["x"], X[list(indices)])
            np.testing.assert_array_equal(batch["labels"], Y[list(indices)])
            assert batch["x"].dtype == np.dtype(np.float32)


# ---------------------------------------------------------------------------------------- MapSource


def test_map_style_items_are_collated():
    batch = as_source(Squares()).gather(np.array([3, 1]))
    np.testing.assert_array_equal(batch["x"], X[[3, 1]])
    assert batch["labels"].tolist() == [9, 1]


def test_getitems_reads_a_batch_at_once():
    data = Together()
    batch = as_source(data).gather(np.array([3, 1]))
    assert data.calls == [[3, 1]]
    assert batch["labels"].tolist() == [9, 1]


def test_getitems_must_return_every_item():
    data = Together()
    data.__getitems__ = lambda indices: []
    with pytest.raises(DataError, match="one sample for each of the 2 indices.*0 samples"):
        as_source(data).gather(range(2))


def test_failing_item_is_named_and_its_error_kept():
    with pytest.raises(DataError, match=r"eval_dataset\[12\].*raised IndexError: 12") as caught:
        as_source(Squares(), name="eval_dataset").samples(np.array([1, 12]))
    assert isinstance(caught.value.__cause__, IndexError)


def test_failing_getitems_is_named():
    with pytest.raises(DataError, match=r"__getitems__\(\[11, 12\].*IndexError") as caught:
        as_source(Together()).samples(np.array([11, 12]))
    assert isinstance(caught.value.__cause__, IndexError)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError])
@pytest.mark.parametrize("method", ["__getitem__", "__getitems__"])
def test_interrupts_pass_through(error, method):
    def fail(*args):
        raise error

    data = type("Data", (Squares,), {method: fail})()
    with pytest.raises(error):
        as_source(data).samples(range(1))


def test_set_epoch_is_passed_on():
    class Dataset(Squares):
        def set_epoch(self, epoch):
            self.epoch = epoch

    data = Dataset()
    as_source(data).set_epoch(3)
    assert data.epoch == 3
    as_source(Squares()).set_epoch(3)  # not an error without one


# ----------------------------------------------------------------------------------- IterableSource


@pytest.mark.parametrize("data", [Stream(), generate, IterableDataset()])
def test_iterables_start_again(data):
    source = as_source(data)
    for _ in range(2):
        assert [int(y) for _, y in source.stream()] == list(range(10))
    assert not source.one_shot


def test_an_iterator_lasts_for_one_epoch():
    source = as_source(generate())
    assert source.one_shot
    assert len(list(itertools.islice(source.stream(), 4))) == 4
    assert len(list(source.stream())) == 6
    assert list(source.stream()) == []


def test_failing_iterable_is_named():
    def broken():
        yield 1
        yield 2
        raise ValueError("bad line")

    stream = as_source(broken, name="train_dataset").stream()
    assert [next(stream), next(stream)] == [1, 2]
    with pytest.raises(DataError, match="train_dataset, sample 2.*ValueError: bad line") as caught:
        next(stream)
    assert isinstance(caught.value.__cause__, ValueError)


def test_generator_function_that_cannot_be_called():
    with pytest.raises(DataError, match=r"could not be iterated.*TypeError"):
        next(as_source(lambda needed: iter([needed])).stream())


def test_iterables_have_no_length_and_no_index():
    source = as_source(generate)
    with pytest.raises(UnsizedDataError, match="max_steps"):
        len(source)
    for read in (source.gather, source.samples):
        with pytest.raises(TypeError, match="cannot be read by index"):
            read(range(1))


# ------------------------------------------------------------------------------------------- errors


class NoLength:
    def __getitem__(self, index):
        return index


class BadLength(Squares):
    def __len__(self):
        raise NotImplementedError("no length yet")


class TorchLikeLoader:
    dataset = Squares()
    batch_size = 4

    def __iter__(self):
        return iter([])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "my_data is None"),
        ("data.csv", r"my_data must be the data itself.*'data.csv'"),
        (pathlib.PurePosixPath("data.csv"), "the data itself"),
        (b"bytes", "the data itself"),
        (5, "not a single number"),
        (np.float32(5), "scalar has none"),
        (object(), "not a supported kind.*type object"),
        (NoLength(), r"has __getitem__ but no __len__"),
        (BadLength(), r"len\(my_data\).*NotImplementedError: no length yet"),
        (Squares, "is a class; pass an instance.*Squares"),
        (TorchLikeLoader(), r"yields batches.*\.dataset.*TorchLikeLoader"),
        (kbtrain.data.DataLoader(as_source(X), 2), "yields batches.*DataLoader"),
        ([], "my_data is empty"),
        (X[:0], "my_data is empty"),
        ((X[:0], Y[:0]), "my_data is empty"),
        (([], []), "my_data is empty"),
        ({}, "at least one input"),
        ((), "tuple of 0"),
        ((X, Y, Y, Y), "tuple of 4"),
        ((X, Y[:9]), r"arrays of my_data must have the same length.*x: \(10, 3\), y: \(9,\)"),
        ({"a": X, "b": X[:4]}, r"\['a'\]: \(10, 3\), \['b'\]: \(4, 3\)"),
        (([X, X[:2]], Y), r"x\[1\]: \(2, 3\)"),
        ((X, np.array(["a"] * 10)), "my_data: y holds strings"),
        ({"x": X, "text": ["a"] * 10}, r"my_data\['text'\] holds strings"),
        ((X, np.array([None] * 10)), "my_data: y holds Python objects"),
        ((X, Squares()), "my_data: y cannot be read as an array.*Squares"),
        ((X, 5), r"scalar has none.*y: \(\)"),
        ({"labels": Y}, "at least one input"),
        ({"x": X, "label": Y, "labels": Y}, "not under several"),
    ],
)
def test_errors(data, message):
    with pytest.raises(DataError, match=message):
        as_source(data, name="my_data")


def test_keras_datasets_of_batches_are_refused():
    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            return X, Y

    with pytest.raises(DataError, match="yields batches"):
        as_source(Batches())


def test_reading_arrays_says_nothing(caplog):
    with caplog.at_level(logging.DEBUG):
        as_source((X, Y)).gather(range(3))
    assert caplog.records == []


def test_the_package_imports_neither_keras_nor_a_framework():
    allowed = {"numpy", "kbtrain", *sys.stdlib_module_names}
    folder = pathlib.Path(kbtrain.data.__file__).parent
    files = sorted(folder.rglob("*.py"))
    assert len(files) > 5
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
                if node.module and node.module.startswith("kbtrain"):
                    assert node.module.startswith(
                        (
                            "kbtrain.data",
                            "kbtrain.errors",
                            "kbtrain.utils.packages.optional_imports",
                        )
                    ), file
            for name in names:
                top = name.partition(".")[0]
                assert top in allowed, f"{file.name} imports {name}"


def test_data_without_inputs_is_refused():
    with pytest.raises(DataError, match=r"train_dataset is \(x, y\).*cannot be None"):
        as_source((None, np.arange(4)))
