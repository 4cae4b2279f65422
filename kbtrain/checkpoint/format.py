"""The files of one checkpoint: arrays as HDF5, documents as JSON. See docs/checkpoint-format.md.

The functions here know one file at a time. Which files make a checkpoint, and whether they are the
ones that were written, is in ``manifest.py``; where they lie and when they count, in ``store.py``.
"""

import hashlib
import io
import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import h5py
import ml_dtypes
import numpy as np

from kbtrain.checkpoint.disk import DeferredErrorFile, FileEntry, open_regular, write_bytes
from kbtrain.errors import CheckpointDamagedError, CheckpointError

ARRAYS_FORMAT = "kbtrain-arrays"
ARRAYS_VERSION = 1

# Types HDF5 has itself. The list is closed: what a file may contain must not depend on the machine.
_NATIVE = frozenset(
    np.dtype(name)
    for name in (
        *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        *("float16", "float32", "float64", "complex64", "complex128"),
    )
)
# Types HDF5 does not have: stored as the unsigned integers of the same bits.
_EXTENDED = {
    name: np.dtype(getattr(ml_dtypes, name))
    for name in (
        "bfloat16",
        *("float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz", "float8_e4m3fn"),
        *("float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
        *("int2", "int4", "uint2", "uint4"),
    )
    if hasattr(ml_dtypes, name)
}
_DTYPES = {dtype.name: dtype for dtype in _NATIVE} | _EXTENDED


# After the end of the HDF5 data, where HDF5 does not look: the checksum of all before. libhdf5 must
# not be shown altered files: a single byte can send it into an endless loop.
_TRAILER = b"\nkbtrain-arrays sha256 %s\n"
_TRAILER_SIZE = len(_TRAILER % (b"0" * 64))


def write_arrays(path: str | Path, arrays: Mapping[str, np.ndarray]) -> FileEntry:
    """Write named arrays to a new HDF5 file and flush it to the disk.

    Every array becomes one contiguous dataset under ``/arrays``, at the path its name spells
    (``"sequential/dense/kernel"`` lies in nested groups); ``/index`` keeps the exact names, their
    order, dtypes and shapes. Values are kept bit for bit, NaN payloads included; bfloat16 and
    float8 are stored as unsigned integers with an attribute ``dtype``. The checksum of the HDF5
    data follows it. Equal arrays under equal names give equal bytes.

    Args:
        path: The file to create; it must not exist.
        arrays: Name -> array of any shape. Names are any non-empty strings.

    Returns:
        The file's size and checksum.

    Raises:
        CheckpointError: If a dtype cannot be stored or libhdf5 fails.
        OSError: If the disk refuses (full, read-only, ...); the file is then incomplete.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "model.h5"
        >>> entry = write_arrays(path, {"dense/kernel": np.eye(2, dtype="float32")})
        >>> read_arrays(path)["dense/kernel"]
        array([[1., 0.],
               [0., 1.]], dtype=float32)
    """
    path = Path(path)
    plain = {name: _checked_array(name, array) for name, array in arrays.items()}
    with DeferredErrorFile(path) as file:
        try:
            with h5py.File(file, "w") as h5:
                _write_h5(h5, plain, file)
        except Exception as error:
            file.raise_deferred()  # the disk's own words, where the disk is the reason
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise CheckpointError(
                f"Could not write {path.name}: libhdf5 failed while storing {len(plain)} arrays "
                f"({type(error).__name__}: {error})."
            ) from error
        file.raise_deferred()
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256")
        trailer = _TRAILER % digest.hexdigest().encode()
        file.write(trailer)
        digest.update(trailer)  # goes on from the state it has: both checksums in one reading
        file.sync()
        return FileEntry(file.tell(), digest.hexdigest())


def read_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """Read a file that ``write_arrays`` wrote.

    Args:
        path: The file; a symbolic link is refused.

    Returns:
        Name -> array, in the order they were written, with the dtypes they had.

    Raises:
        CheckpointDamagedError: If the file is missing, not HDF5, or not as ``write_arrays`` left
            it.
        CheckpointError: If it was written in a newer format.
    """
    path = Path(path)
    try:
        file = open_regular(path)
    except OSError as error:
        raise CheckpointDamagedError(
            f"{path.name} cannot be read: {error.strerror or error}."
        ) from error
    with file:
        _check_trailer(file, path.name)
        return read_verified_arrays(file, path.name)


def read_verified_arrays(file: io.FileIO, name: str) -> dict[str, np.ndarray]:
    """Read arrays from an open file whose checksum the caller has found right.

    Without that, libhdf5 may not come back (see ``_TRAILER``).

    Args:
        file: The file; its position does not matter.
        name: What it is called, for messages.

    Raises:
        CheckpointDamagedError: As ``read_arrays``.
        CheckpointError: As ``read_arrays``.
    """
    with _opened(file, name) as (h5, size):
        return _read_h5(h5, size, name)


@contextmanager
def _opened(file: io.FileIO, name: str) -> Iterator[tuple[h5py.File, int]]:
    """Open verified HDF5 data; whatever libhdf5 finds wrong with them becomes one error."""
    try:
        size = file.seek(0, 2)
        file.seek(0)
        with h5py.File(file, "r") as h5:
            yield h5, size
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:
        # libhdf5 and h5py raise whatever the damage happens to hit (OSError, KeyError,
        # RuntimeError, ValueError, ...); to the user all of them mean the same.
        raise CheckpointDamagedError(
            f"{name} is not a readable array file ({type(error).__name__}: {error})."
        ) from error


class ArrayOutline(NamedTuple):
    """An array of a file without its values.

    Attributes:
        name: The array's name.
        dtype: Its dtype.
        shape: Its shape.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * _DTYPES[self.dtype].itemsize


def read_verified_outline(file: io.FileIO, name: str) -> list[ArrayOutline]:
    """List the arrays of an open file whose checksum the caller has found right.

    Args:
        file: The file; its position does not matter.
        name: What it is called, for messages.

    Raises:
        CheckpointDamagedError: As ``read_arrays``.
        CheckpointError: As ``read_arrays``.
    """
    with _opened(file, name) as (h5, size):
        return [outline for outline, _ in _read_index(h5, [size], name)]


def dump_json(name: str, value: Any) -> bytes:
    """Return a JSON document: sorted keys, indent 2, UTF-8, a line break at the end.

    Non-finite floats are written as Python does (``NaN``, ``Infinity``, ``-Infinity``). NumPy
    scalars become plain numbers.

    Args:
        name: What the document is called, for messages.
        value: Mappings, lists, strings, numbers, booleans and None, nested in any way.

    Raises:
        CheckpointError: If the value holds anything else.
    """
    try:
        text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, default=_plain)
        try:
            return text.encode() + b"\n"
        except UnicodeEncodeError:  # file names that are no UTF-8 reach Python as lone surrogates
            return json.dumps(value, indent=2, sort_keys=True, default=_plain).encode() + b"\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"The document {name!r} cannot be written as JSON: {error}. Expected mappings with "
            "string keys, lists, strings, numbers, booleans and None. Convert other objects "
            "first (arrays belong into `arrays`)."
        ) from error


def parse_json(name: str, data: bytes) -> Any:
    """Return the value of a JSON document.

    Raises:
        CheckpointDamagedError: If the bytes are not JSON in UTF-8.
    """
    try:
        return json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise CheckpointDamagedError(f"{name} is not readable as JSON ({error}).") from error


def write_json(path: Path, value: Any) -> FileEntry:
    """Write a JSON document to a new file, flush it, and return its size and checksum.

    Raises:
        CheckpointError: If the value cannot be written as JSON.
        OSError: If the disk refuses.
    """
    return write_bytes(path, dump_json(path.stem, value))


def _check_trailer(file: io.FileIO, name: str) -> None:
    try:
        remaining = file.seek(0, 2) - _TRAILER_SIZE
        file.seek(max(remaining, 0))
        trailer = file.read()
        file.seek(0)
        digest, buffer = hashlib.sha256(), memoryview(bytearray(2**20))
        while remaining > 0 and (count := file.readinto(buffer[:remaining])):
            digest.update(buffer[:count])
            remaining -= count
    except OSError as error:
        _damaged(name, error.strerror or str(error))
    if trailer != _TRAILER % digest.hexdigest().encode():
        _damaged(name, "its bytes and the checksum at its end do not agree")


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic) and isinstance(value.item(), bool | int | float | str):
        return value.item()
    raise TypeError(f"an object of type {type(value).__name__} is not JSON serializable")


def _checked_array(name: str, array: np.ndarray) -> np.ndarray:
    if not isinstance(name, str) or not name:
        raise CheckpointError(
            f"An array's name must be a non-empty string. Received: name={name!r}"
        )
    array = np.asarray(array)
    if array.dtype.name not in _DTYPES:
        raise CheckpointError(
            f"The array {name!r} cannot be stored: its dtype is none of "
            f"{', '.join(sorted(_DTYPES))}. Received: dtype={array.dtype}"
        )
    # Little-endian in the file whatever the machine; ascontiguousarray would make scalars 1-D.
    return np.require(array, dtype=_DTYPES[array.dtype.name], requirements="C")


def _write_h5(h5: h5py.File, arrays: Mapping[str, np.ndarray], file: DeferredErrorFile) -> None:
    h5.attrs["format"] = ARRAYS_FORMAT
    h5.attrs["version"] = ARRAYS_VERSION
    root = h5.create_group("arrays")
    index = []
    for (name, array), path in zip(arrays.items(), _dataset_paths(arrays), strict=True):
        stored = array if array.dtype in _NATIVE else array.view(f"u{array.dtype.itemsize}")
        dataset = root.create_dataset(path, data=stored)
        if stored is not array:
            dataset.attrs["dtype"] = array.dtype.name
        index.append({"name": name, "path": path, "dtype": array.dtype.name, "shape": array.shape})
        file.raise_deferred()  # no point in going on once the disk is full
    h5.create_dataset("index", data=np.frombuffer(json.dumps(index).encode(), dtype="uint8"))


def _dataset_paths(names: Mapping[str, Any]) -> list[str]:
    """Return one distinct HDF5 path per name, equal to the name wherever HDF5 allows."""
    safe = ["/".join(_safe_component(part) for part in name.split("/")) for name in names]
    groups = {path[: match.start()] for path in safe for match in re.finditer("/", path)}
    taken = groups | set(safe)  # a dataset cannot lie where a group or another dataset does
    result: list[str] = []
    seen: set[str] = set()
    for path in safe:
        unique, count = path, 0
        while unique in seen or unique in groups or (unique != path and unique in taken):
            count += 1
            unique = f"{path}~{count}"
        seen.add(unique)
        result.append(unique)
    return result


def _safe_component(part: str) -> str:
    """Escape what HDF5 gives a meaning of its own: empty, ".", "..", NUL, and lone surrogates."""
    if part in ("", ".", ".."):
        return "%" + part
    return part.replace("\0", "%00").encode("utf-8", "backslashreplace").decode()


def _read_index(
    h5: h5py.File, room: list[int], name: str
) -> list[tuple[ArrayOutline, h5py.Dataset]]:
    """Return the arrays in the order of writing, each with the dataset that should hold it."""
    kind, version = h5.attrs.get("format"), h5.attrs.get("version")
    if kind != ARRAYS_FORMAT or not isinstance(version, np.integer):
        _damaged(name, f"it says it is {kind!r}, version {version!r}, not {ARRAYS_FORMAT!r}")
    if version > ARRAYS_VERSION:
        raise CheckpointError(
            f"{name} was written in version {version} of the array format; this kbtrain reads "
            f"version {ARRAYS_VERSION} and older. Update kbtrain."
        )
    found: dict[str, tuple[ArrayOutline, h5py.Dataset]] = {}
    for entry in json.loads(_read_dataset(h5["index"], np.dtype("uint8"), room, name).tobytes()):
        array_name, dtype = entry["name"], _DTYPES[entry["dtype"]]
        if not isinstance(array_name, str) or array_name in found:
            _damaged(name, f"the array name {array_name!r} is not a string or appears twice")
        dataset = h5["arrays"][entry["path"]]
        if dtype not in _NATIVE and dataset.attrs.get("dtype") != dtype.name:
            _damaged(name, f"{array_name!r} should be marked as {dtype.name}")
        if list(dataset.shape) != entry["shape"]:
            _damaged(name, f"{array_name!r} has shape {dataset.shape}, not {entry['shape']}")
        found[array_name] = ArrayOutline(array_name, dtype.name, dataset.shape), dataset
    return list(found.values())


def _read_h5(h5: h5py.File, size: int, name: str) -> dict[str, np.ndarray]:
    room = [size]  # what is left for array data in a file of this size
    return {
        outline.name: _read_dataset(dataset, _DTYPES[outline.dtype], room, name)
        for outline, dataset in _read_index(h5, room, name)
    }


def _read_dataset(
    dataset: h5py.Dataset, dtype: np.dtype[Any], room: list[int], name: str
) -> np.ndarray:
    """Read a dataset of the expected dtype that really lies, whole and plain, in this file."""
    stored = dtype if dtype in _NATIVE else np.dtype(f"u{dtype.itemsize}")
    plain = (
        isinstance(dataset, h5py.Dataset)
        and dataset.dtype == stored
        and dataset.chunks is None
        and dataset.external is None
        and not dataset.is_virtual
    )
    if not plain:
        _damaged(name, f"{dataset!r} is not a plain dataset of {stored}")
    # A shape costs nothing to claim: without this, a few bytes could ask for terabytes.
    needed = dataset.size * stored.itemsize
    room[0] -= needed
    if room[0] < 0 or dataset.id.get_storage_size() != needed:
        _damaged(name, f"{dataset.name!r} claims {needed} bytes that the file does not hold")
    array = np.empty(dataset.shape, dtype=stored)
    if array.size:
        dataset.read_direct(array)
    return array.view(dtype)


def _damaged(name: str, problem: str) -> NoReturn:
    raise CheckpointDamagedError(f"{name} is not as kbtrain wrote it: {problem}.")
