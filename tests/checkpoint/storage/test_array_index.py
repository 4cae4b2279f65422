"""Files of arrays whose checksum is right and whose contents are anything: read or refused."""

import contextlib
import hashlib
import json
import tempfile
import tracemalloc
from pathlib import Path

import h5py
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kbtrain.checkpoint import read_arrays, write_arrays
from kbtrain.checkpoint.storage import array_index
from kbtrain.checkpoint.storage.format import read_verified_arrays, read_verified_outline
from kbtrain.errors import CheckpointDamagedError, CheckpointError

QUICK = settings(max_examples=100, deadline=None, derandomize=True, database=None)
LINE_SIZE = len(array_index.INDEX_LINE % (0, 0))
ARRAYS = {
    "net/kernel": np.arange(20_000, dtype="float32").reshape(100, 200),  # its bytes come later
    "net/scale": np.ones(3, ml_dtypes.bfloat16),
    "mask": np.array([True, False]),
    "nothing": np.zeros((0, 4)),
    "iteration": np.int64(3),
}


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    path = tmp_path_factory.mktemp("intact") / "a.h5"
    write_arrays(path, ARRAYS)
    return path.read_bytes()


def sealed(body):
    """With a checksum that is right."""
    return body + array_index.TRAILER % hashlib.sha256(body).hexdigest().encode()


def read(data):
    """What ``read_arrays`` makes of the bytes; memory in proportion to them at most."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.h5"
        path.write_bytes(data)
        tracemalloc.start()
        try:
            return read_arrays(path)
        finally:
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            assert peak < 20 * len(data) + 5 * 2**20


def with_index(intact, index):
    """The file with another index."""
    body = intact[: -array_index.TRAILER_SIZE - LINE_SIZE]
    text = index if isinstance(index, bytes) else json.dumps(index).encode()
    return sealed(body + text + array_index.INDEX_LINE % (len(body), len(text)))


def index_of(intact):
    offset, size = (
        int(n) for n in intact[-array_index.TRAILER_SIZE - 39 : -array_index.TRAILER_SIZE].split()
    )
    return json.loads(intact[offset : offset + size])


def test_where_the_arrays_lie_is_true(intact, tmp_path):
    for entry in index_of(intact):
        data = ARRAYS[entry["name"]].tobytes()
        assert intact[entry["offset"] :][: len(data)] == data


def test_libhdf5_is_not_asked(intact, monkeypatch):
    monkeypatch.setattr(h5py, "File", None)
    loaded = read(intact)
    assert list(loaded) == list(ARRAYS)
    for name, array in ARRAYS.items():
        assert loaded[name].dtype == array.dtype
        assert loaded[name].shape == array.shape
        assert loaded[name].tobytes() == array.tobytes()


def test_a_file_without_the_line_is_read_as_former_versions_wrote_it(intact):
    loaded = read(sealed(intact[: -array_index.TRAILER_SIZE - LINE_SIZE]))
    assert {n: a.tobytes() for n, a in loaded.items()} == {
        n: a.tobytes() for n, a in ARRAYS.items()
    }


@QUICK
@given(st.data())
def test_altered_bytes_are_other_values_or_refused(intact, data):
    end = len(intact) - array_index.TRAILER_SIZE - LINE_SIZE
    body, line = bytearray(intact[:end]), intact[end : end + LINE_SIZE]
    position = st.integers(0, end - 1) | st.integers(end - 700, end - 1)  # the index is at the end
    for start, piece in data.draw(st.lists(st.tuples(position, st.binary(min_size=1)), min_size=1)):
        body[start : start + len(piece)] = piece
    with contextlib.suppress(CheckpointDamagedError):
        read(sealed(bytes(body[:end]) + line))


NUMBERS = st.integers() | st.sampled_from([2**30, 2**62, 2**63, 2**64, -1, True, 1.0, 10**40])
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
ENTRIES = st.fixed_dictionaries(
    {
        "name": st.text(max_size=3) | JSON,
        "dtype": st.sampled_from(["float32", "bfloat16", "bool", "int4", "object"]) | JSON,
        "shape": st.lists(NUMBERS | st.integers(0, 3), max_size=40) | JSON,
        "offset": st.integers(0, 90_000) | NUMBERS | JSON,
    }
)


@QUICK
@given(st.lists(ENTRIES, max_size=4) | JSON | st.binary(max_size=30))
def test_any_index_is_read_or_refused(intact, index):
    with contextlib.suppress(CheckpointDamagedError):
        read(with_index(intact, index))


@QUICK
@given(st.integers(0, 10**19 - 1), st.integers(0, 10**19 - 1))
def test_any_place_of_the_index_is_read_or_refused(intact, offset, size):
    body = intact[: -array_index.TRAILER_SIZE - LINE_SIZE]
    with contextlib.suppress(CheckpointDamagedError):
        read(sealed(body + array_index.INDEX_LINE % (offset, size)))


def changed(intact, **fields):
    entries = index_of(intact)
    entries[0] |= fields
    return with_index(intact, entries)


@pytest.mark.parametrize(
    "fields",
    [
        {"shape": [2**40]},
        {"shape": [0, 2**62, 2**62]},
        {"shape": [1] * 33},
        {"shape": [-1]},
        {"shape": [True]},
        {"shape": "2"},
        {"offset": -1},
        {"offset": 80_000_000},
        {"offset": None},
        {"dtype": "object"},
        {"dtype": ["float32"]},
        {"name": None},
        {"name": "mask"},
        {"dtype": "bool", "shape": [80_000]},
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(intact, fields):
    with pytest.raises(CheckpointDamagedError, match=r"a\.h5"):
        read(changed(intact, **fields))


def test_a_few_bytes_cannot_ask_for_themselves_again_and_again(intact):
    entry = index_of(intact)[0]
    entries = [{**entry, "name": str(i)} for i in range(1000)]
    with pytest.raises(CheckpointDamagedError, match="does not fit into the file"):
        read(with_index(intact, entries))


def test_deep_nesting_is_refused(intact):
    with pytest.raises(CheckpointDamagedError, match="JSON"):
        read(with_index(intact, b"[" * 100_000))


def test_an_outline_is_of_the_same_index(intact, tmp_path):
    (tmp_path / "a.h5").write_bytes(intact)
    with (tmp_path / "a.h5").open("rb", buffering=0) as file:
        outlines = read_verified_outline(file, "a.h5")
        assert {o.name: (o.dtype, o.shape) for o in outlines} == {
            name: (array.dtype.name, array.shape) for name, array in ARRAYS.items()
        }
        assert list(read_verified_arrays(file, "a.h5")) == list(ARRAYS)


@QUICK
@given(st.binary(max_size=200))
def test_any_bytes_before_the_line_and_the_checksum(data):
    with contextlib.suppress(CheckpointError):
        read(sealed(data + array_index.INDEX_LINE % (0, len(data))))
