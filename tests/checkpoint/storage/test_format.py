"""The files of a checkpoint: arrays in HDF5 with a checksum, documents in JSON."""

import errno
import hashlib
import io
import json
import math
import os
import resource
import tempfile
from contextlib import contextmanager
from pathlib import Path

import h5py
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kbtrain.checkpoint import read_arrays, write_arrays
from kbtrain.checkpoint.storage.format import dump_json, parse_json, read_verified_arrays
from kbtrain.checkpoint.storage.hdf5_files import DeferredErrorFile
from kbtrain.errors import CheckpointDamagedError, CheckpointError

pytestmark = pytest.mark.core

QUICK = settings(max_examples=60, deadline=None, derandomize=True, database=None)
NATIVE = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "complex64", "complex128"),
)
EXTENDED = ("bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3b11fnuz", "int4")


def dtype_of(name):
    return np.dtype(getattr(ml_dtypes, name, name))


def bits(array):
    return (array.dtype.name, array.shape, array.tobytes())


def round_trip(path, arrays):
    write_arrays(path, arrays)
    return read_arrays(path)


@contextmanager
def file_size_limit(size):
    """Let the system refuse every write beyond a size: a real error, like that of a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("name", NATIVE + EXTENDED)
@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (0, 4)])
def test_every_dtype_keeps_its_bits(tmp_path, name, shape):
    dtype = dtype_of(name)
    raw = np.random.default_rng(0).integers(0, 2, (*shape, dtype.itemsize), dtype="uint8")
    array = raw.view(dtype).reshape(shape)
    assert bits(round_trip(tmp_path / "a.h5", {"a": array})["a"]) == bits(array)


def test_nan_payloads_and_signed_zeros_survive(tmp_path):
    wide = np.array([0x7FC12345, 0xFFA00001, 0x80000000, 0x7F800000], "uint32").view("float32")
    brain = np.array([0x7FC1, 0xFFA1, 0x8000], "uint16").view(ml_dtypes.bfloat16)
    read = round_trip(tmp_path / "a.h5", {"wide": wide, "brain": brain})
    assert bits(read["wide"]) == bits(wide)
    assert bits(read["brain"]) == bits(brain)


def test_memory_layout_and_byte_order_do_not_matter(tmp_path):
    fortran = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    strided = np.arange(10, dtype="int32")[::3]
    big = np.arange(3, dtype=">f4")
    read = round_trip(tmp_path / "a.h5", {"f": fortran, "s": strided, "b": big})
    np.testing.assert_array_equal(read["f"], [[0.0, 1, 2], [3, 4, 5]])
    np.testing.assert_array_equal(read["s"], [0, 3, 6, 9])
    assert read["b"].dtype == np.dtype("<f4")
    np.testing.assert_array_equal(read["b"], [0, 1, 2])


def test_order_is_kept_beyond_ten(tmp_path):
    names = [f"net/dense_{i}/kernel" for i in (2, 10, 1, 9, 11)]
    read = round_trip(tmp_path / "a.h5", {name: np.float32(i) for i, name in enumerate(names)})
    assert list(read) == names


def test_no_arrays_at_all(tmp_path):
    assert round_trip(tmp_path / "a.h5", {}) == {}


def test_awkward_names_stay_apart(tmp_path):
    names = [
        *("a", "a/b", "a/b/c", "a~1", "/a", "a/", "//", ".", "..", "../a", "a/./b", "a/../b"),
        *("nul\0byte", "%", "%00", "sp ace", "ünïcode/漢字/😀", "lone\ud800surrogate", "index"),
        *("kernel#1", "new\nline", "x" * 500, "-", '"quoted"', "\\"),
    ]
    arrays = {name: np.array(i) for i, name in enumerate(names)}
    read = round_trip(tmp_path / "a.h5", arrays)
    assert {name: int(value) for name, value in read.items()} == dict(
        zip(names, range(len(names)), strict=True)
    )


@QUICK
@given(st.lists(st.text(st.characters(codec=None), min_size=1), unique=True, max_size=8))
def test_any_names_stay_apart(names):
    with tempfile.TemporaryDirectory() as folder:
        read = round_trip(
            Path(folder) / "a.h5", {name: np.array(i) for i, name in enumerate(names)}
        )
    assert [(name, int(value)) for name, value in read.items()] == [
        (name, i) for i, name in enumerate(names)
    ]


def test_other_programs_can_read_the_file(tmp_path):
    path = tmp_path / "a.h5"
    kernel = np.arange(6, dtype="float32").reshape(2, 3)
    write_arrays(path, {"net/dense/kernel": kernel, "net/scale": np.ones(2, ml_dtypes.bfloat16)})
    with h5py.File(path, "r") as file:
        np.testing.assert_array_equal(file["arrays/net/dense/kernel"][...], kernel)
        scale = file["arrays/net/scale"]
        assert scale.attrs["dtype"] == "bfloat16"
        np.testing.assert_array_equal(scale[...], np.full(2, 0x3F80, "uint16"))


def test_equal_arrays_give_equal_bytes_and_a_true_entry(tmp_path):
    arrays = {"a/b": np.ones(1000), "a": np.zeros(3, ml_dtypes.bfloat16)}
    first, second = (write_arrays(tmp_path / name, arrays) for name in ("1.h5", "2.h5"))
    data = (tmp_path / "1.h5").read_bytes()
    assert data == (tmp_path / "2.h5").read_bytes()
    assert first == second == (len(data), hashlib.sha256(data).hexdigest(), None)


@pytest.mark.parametrize(
    "array", [np.array(["text"]), np.array([object()]), np.array("2020", "datetime64[s]")]
)
def test_arrays_that_cannot_be_stored_are_refused(tmp_path, array):
    with pytest.raises(CheckpointError, match="'a' cannot be stored.*Received: dtype="):
        write_arrays(tmp_path / "a.h5", {"a": array})


@pytest.mark.parametrize("name", ["", 3])
def test_names_must_be_strings(tmp_path, name):
    with pytest.raises(CheckpointError, match=f"Received: name={name!r}"):
        write_arrays(tmp_path / "a.h5", {name: np.ones(1)})


@pytest.mark.parametrize("limit", [0, 100, 3000, 50_000, 400_000])
def test_a_disk_that_refuses_is_reported_in_its_own_words(tmp_path, limit):
    arrays = {f"layer_{i}/kernel": np.ones(10_000, "float32") for i in range(12)}
    with file_size_limit(limit), pytest.raises(OSError, match="too large") as caught:
        write_arrays(tmp_path / "a.h5", arrays)
    assert caught.value.errno == errno.EFBIG
    write_arrays(tmp_path / "b.h5", arrays)  # libhdf5 is none the worse for it
    assert len(read_arrays(tmp_path / "b.h5")) == 12


def test_an_interrupt_during_a_write_comes_through(tmp_path, monkeypatch):
    class Interrupted(io.FileIO):
        def write(self, data):
            raise KeyboardInterrupt

    def open_interrupted(self, path):
        self._file, self._deferred = Interrupted(path, "xb+"), None

    monkeypatch.setattr(DeferredErrorFile, "__init__", open_interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_arrays(tmp_path / "a.h5", {"a": np.ones(3)})


# ---- altered files


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    path = tmp_path_factory.mktemp("intact") / "a.h5"
    arrays = {
        "net/dense/kernel": np.arange(6.0).reshape(2, 3),
        "net/scale": np.ones(3, ml_dtypes.bfloat16),
        "iteration": np.int64(3),
    }
    write_arrays(path, arrays)
    return path.read_bytes()


def test_every_flipped_byte_is_noticed(intact, tmp_path):
    path = tmp_path / "a.h5"
    path.write_bytes(intact)
    assert len(read_arrays(path)) == 3
    for position in [*range(0, len(intact), 41), *range(len(intact) - 100, len(intact))]:
        damaged = bytearray(intact)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(CheckpointDamagedError, match=r"a\.h5"):
            read_arrays(path)


@QUICK
@given(st.data())
def test_altered_bytes_give_documented_errors_only(intact, data):
    damaged = bytearray(intact)
    position = st.integers(0, len(intact) - 1)
    for start, piece in data.draw(st.lists(st.tuples(position, st.binary(min_size=1)), max_size=4)):
        damaged[start : start + len(piece)] = piece
    damaged = bytes(damaged[: data.draw(st.integers(0, len(damaged)))])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.h5"
        path.write_bytes(damaged)
        if damaged == intact:
            read_arrays(path)
        else:
            with pytest.raises(CheckpointDamagedError):
                read_arrays(path)


@QUICK
@given(st.binary(max_size=300))
def test_any_bytes_give_documented_errors_only(data):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.h5"
        path.write_bytes(data)
        with pytest.raises(CheckpointDamagedError):
            read_arrays(path)
        with path.open("rb", buffering=0) as file, pytest.raises(CheckpointDamagedError):
            read_verified_arrays(file, "a.h5")


@pytest.mark.parametrize("kind", ["missing", "folder", "link", "pipe"])
def test_only_regular_files_are_opened(tmp_path, intact, kind):
    path, target = tmp_path / "a.h5", tmp_path / "target.h5"
    target.write_bytes(intact)
    {
        "missing": lambda: None,
        "folder": path.mkdir,
        "link": lambda: path.symlink_to(target),
        "pipe": lambda: os.mkfifo(path),
    }[kind]()
    with pytest.raises(CheckpointDamagedError, match=r"a\.h5"):
        read_arrays(path)


def crafted(path, fill):
    """Write an HDF5 file that nothing vouches for but its shape, and read it past the checksum."""
    with h5py.File(path, "w") as h5:
        h5.attrs["format"] = "kbtrain-arrays"
        h5.attrs["version"] = 1
        fill(h5)
    with path.open("rb", buffering=0) as file:
        return read_verified_arrays(file, path.name)


def index(*entries):
    keys = ("name", "path", "dtype", "shape")
    text = json.dumps([dict(zip(keys, entry, strict=True)) for entry in entries])
    return np.frombuffer(text.encode(), "uint8")


def fill_with(entry, **kwargs):
    def fill(h5):
        h5["index"] = index(entry)
        h5.create_dataset("arrays/a", **kwargs)

    return fill


GOOD = ("a", "a", "float32", [2])
CRAFTED = {
    "a shape of terabytes": fill_with(("a", "a", "float32", [2**40]), shape=2**40, dtype="f4"),
    "zeros out of nothing": fill_with(GOOD, shape=2, dtype="f4"),
    "compressed": fill_with(GOOD, data=np.ones(2, "f4"), compression="gzip", chunks=(2,)),
    "another shape": fill_with(("a", "a", "float32", [3]), data=np.ones(2, "f4")),
    "another dtype": fill_with(("a", "a", "float64", [2]), data=np.ones(2, "f4")),
    "an unknown dtype": fill_with(("a", "a", "object", [2]), data=np.ones(2, "f4")),
    "an unmarked bfloat16": fill_with(("a", "a", "bfloat16", [2]), data=np.ones(2, "u2")),
    "text": fill_with(("a", "a", "float32", [1]), data=["text"]),
    "a name that is no string": fill_with((["a"], "a", "float32", [2]), data=np.ones(2, "f4")),
    "a path that is no string": fill_with(("a", 7, "float32", [2]), data=np.ones(2, "f4")),
    "no dataset": fill_with(("b", "b", "float32", [2]), data=np.ones(2, "f4")),
    "a group": fill_with(("b", ".", "float32", [2]), data=np.ones(2, "f4")),
    "no index": lambda h5: None,
    "an index that is no JSON": lambda h5: h5.create_dataset("index", data=np.ones(3, "u1")),
}


@pytest.mark.parametrize("case", CRAFTED)
def test_crafted_files_are_refused(tmp_path, case):
    with pytest.raises(CheckpointDamagedError, match=r"a\.h5"):
        crafted(tmp_path / "a.h5", CRAFTED[case])


def test_a_crafted_file_without_fault_is_read(tmp_path):
    read = crafted(tmp_path / "a.h5", fill_with(GOOD, data=np.ones(2, "f4")))
    np.testing.assert_array_equal(read["a"], [1, 1])


def test_links_to_other_files_are_refused(tmp_path):
    with h5py.File(tmp_path / "secret.h5", "w") as other:
        other["a"] = np.ones(2, "f4")
    (tmp_path / "raw").write_bytes(bytes(8))

    def linked(h5):
        h5["index"] = index(GOOD)
        h5.create_group("arrays")["a"] = h5py.ExternalLink(str(tmp_path / "secret.h5"), "/a")

    def external(h5):
        h5["index"] = index(GOOD)
        raw = [(str(tmp_path / "raw"), 0, 8)]
        h5.create_dataset("arrays/a", shape=2, dtype="f4", external=raw)

    for fill in (linked, external):
        with pytest.raises(CheckpointDamagedError):
            crafted(tmp_path / f"{fill.__name__}.h5", fill)


def test_the_same_name_twice_is_refused(tmp_path):
    def fill(h5):
        h5["index"] = index(GOOD, GOOD)
        h5["arrays/a"] = np.ones(2, "f4")

    with pytest.raises(CheckpointDamagedError, match="twice"):
        crafted(tmp_path / "a.h5", fill)


def test_a_newer_array_format_is_named(tmp_path):
    def fill(h5):
        h5.attrs["version"] = 2

    with pytest.raises(CheckpointError, match="version 2.*Update kbtrain") as caught:
        crafted(tmp_path / "a.h5", fill)
    assert not isinstance(caught.value, CheckpointDamagedError)


# ---- documents


def test_a_document_is_sorted_indented_utf8():
    data = dump_json("d", {"b": [1, 2.5], "a": "ü", "n": None})
    assert data.decode() == '{\n  "a": "ü",\n  "b": [\n    1,\n    2.5\n  ],\n  "n": null\n}\n'


def test_non_finite_and_exact_floats_survive():
    value = {"nan": math.nan, "inf": [math.inf, -math.inf], "exact": 0.1 + 0.2, "tiny": 5e-324}
    read = parse_json("d", dump_json("d", value))
    assert math.isnan(read.pop("nan"))
    assert read == {key: value[key] for key in ("inf", "exact", "tiny")}


def test_numpy_scalars_become_numbers():
    value = {"f": np.float32(0.1), "i": np.int64(7), "b": np.bool_(True), "n": np.float32("nan")}
    read = parse_json("d", dump_json("d", value))
    assert math.isnan(read.pop("n"))
    assert read == {"f": float(np.float32(0.1)), "i": 7, "b": True}


def test_file_names_that_are_no_utf8_survive():
    name = os.fsdecode(b"run-\xff")
    assert parse_json("d", dump_json("d", {"output_dir": name})) == {"output_dir": name}


CYCLE: list = []
CYCLE.append(CYCLE)


@pytest.mark.parametrize(
    "value", [{"a": object()}, {"a": np.ones(2)}, {1: 1, "a": 2}, {("a",): 1}, CYCLE, {"a": {1}}]
)
def test_values_that_are_no_json_are_refused(value):
    with pytest.raises(CheckpointError, match="'d' cannot be written as JSON"):
        dump_json("d", value)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"[" * 100_000, b"1" * 5000, b"{'a': 1}"])
def test_bytes_that_are_no_json_are_damage(data):
    with pytest.raises(CheckpointDamagedError, match="d is not readable"):
        parse_json("d", data)


@QUICK
@given(st.binary(max_size=100))
def test_any_bytes_are_json_or_damage(data):
    try:
        parse_json("d", data)
    except CheckpointDamagedError:
        return
    json.loads(data.decode())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=15,
)


@QUICK
@given(JSON)
def test_any_json_value_survives(value):
    assert parse_json("d", dump_json("d", value)) == value
