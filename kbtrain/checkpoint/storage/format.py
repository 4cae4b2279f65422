"""The files of one checkpoint: arrays as HDF5, documents as JSON. See docs/checkpoint-format.md.

The functions here handle one file at a time. ``manifest.py`` lists and verifies the files of a
checkpoint; ``store.py`` puts them into folders and publishes them.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import h5py
import numpy as np

from kbtrain.checkpoint.storage.array_index import (
    TRAILER,
    TRAILER_SIZE,
    ArrayOutline,
    find_arrays,
    read_array,
)
from kbtrain.checkpoint.storage.dtypes import DTYPES, NATIVE
from kbtrain.checkpoint.storage.faults import reading
from kbtrain.checkpoint.storage.hdf5_files import open_for_reading
from kbtrain.errors import CheckpointDamagedError, CheckpointError, CheckpointFormatError
from kbtrain.utils.files.filesystem import FileEntry, open_regular, write_bytes

ARRAYS_FORMAT = "kbtrain-arrays"
ARRAYS_VERSION = 1


def read_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """Read a file that ``write_arrays`` wrote.

    Args:
        path: The file; a symbolic link is refused.

    Returns:
        Name -> array, in the order they were written, with the dtypes they had.

    Raises:
        CheckpointDamagedError: If the file is missing, not HDF5, or altered.
        CheckpointFormatError: If it was written in a newer format.
        CheckpointUnreadableError: If it cannot be read now.
    """
    path = Path(path)
    with reading(path, path.name), open_regular(path) as file:
        _check_trailer(file, path.name)
        return read_verified_arrays(file, path.name)


def read_verified_arrays(file: io.FileIO, name: str) -> dict[str, np.ndarray]:
    """Read arrays from an open file whose checksum the caller has verified.

    On an unverified file libhdf5, which reads files of earlier versions, may hang.

    Args:
        file: The file; its position does not matter.
        name: Name of the file, for messages.

    Raises:
        CheckpointDamagedError, CheckpointFormatError: As ``read_arrays``.
        OSError: If reading fails.
    """
    if (places := find_arrays(file, name)) is not None:
        return {place.outline.name: read_array(file, place, name) for place in places}
    with _open_arrays(file, name) as (h5, size):  # written by an earlier version
        return _read_h5(h5, size, name)


@contextmanager
def _open_arrays(file: io.FileIO, name: str) -> Iterator[tuple[h5py.File, int]]:
    """Open verified HDF5 data; errors of libhdf5 become a ``CheckpointDamagedError``."""
    size = file.seek(0, 2)
    try:
        with open_for_reading(file) as h5:
            yield h5, size
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # from the operating system, not from libhdf5
        # For damaged files libhdf5 and h5py raise all kinds of errors (OSError, KeyError,
        # RuntimeError, ValueError, ...), which all mean the same to the user.
        raise CheckpointDamagedError(
            f"{name} is not a readable array file ({type(error).__name__}: {error})."
        ) from error


def read_verified_outline(file: io.FileIO, name: str) -> list[ArrayOutline]:
    """List the arrays of an open file whose checksum the caller has verified.

    Args:
        file: The file; its position does not matter.
        name: Name of the file, for messages.

    Raises:
        CheckpointDamagedError, CheckpointFormatError: As ``read_arrays``.
        OSError: If reading fails.
    """
    if (places := find_arrays(file, name)) is not None:
        return [place.outline for place in places]
    with _open_arrays(file, name) as (h5, size):
        return [outline for outline, _ in _read_index(h5, [size], name)]


def dump_json(name: str, value: Any) -> bytes:
    """Return a JSON document: sorted keys, indent 2, UTF-8, a newline at the end.

    Non-finite floats are written as Python does (``NaN``, ``Infinity``, ``-Infinity``). NumPy
    scalars become plain numbers.

    Args:
        name: Name of the document, for messages.
        value: Mappings, lists, strings, numbers, booleans and None, nested in any way.

    Raises:
        CheckpointError: If the value holds anything else.
    """
    try:
        text = json.dumps(
            value, indent=2, sort_keys=True, ensure_ascii=False, default=_json_default
        )
        try:
            return text.encode() + b"\n"
        except UnicodeEncodeError:  # file names not in UTF-8 reach Python as lone surrogates
            return (
                json.dumps(value, indent=2, sort_keys=True, default=_json_default).encode() + b"\n"
            )
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"The document {name!r} cannot be written as JSON: {error}. Expected mappings with "
            "string keys, lists, strings, numbers, booleans and None. Convert other objects "
            "first (arrays belong in `arrays`)."
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
        OSError: If writing fails.
    """
    return write_bytes(path, dump_json(path.stem, value))


def _check_trailer(file: io.FileIO, name: str) -> None:
    remaining = file.seek(0, 2) - TRAILER_SIZE
    file.seek(max(remaining, 0))
    trailer = file.read()
    file.seek(0)
    digest, buffer = hashlib.sha256(), memoryview(bytearray(2**20))
    while remaining > 0 and (count := file.readinto(buffer[:remaining])):
        digest.update(buffer[:count])
        remaining -= count
    if trailer != TRAILER % digest.hexdigest().encode():
        _damaged(name, "its bytes and the checksum at its end do not agree")


def _json_default(value: Any) -> Any:
    if isinstance(value, np.generic) and isinstance(value.item(), bool | int | float | str):
        return value.item()
    raise TypeError(f"an object of type {type(value).__name__} is not JSON serializable")


def _read_index(
    h5: h5py.File, budget: list[int], name: str
) -> list[tuple[ArrayOutline, h5py.Dataset]]:
    """Return the arrays in the order of writing, each with the dataset that should hold it."""
    kind, version = h5.attrs.get("format"), h5.attrs.get("version")
    if kind != ARRAYS_FORMAT or not isinstance(version, np.integer):
        _damaged(name, f"it says it is {kind!r}, version {version!r}, not {ARRAYS_FORMAT!r}")
    if version > ARRAYS_VERSION:
        raise CheckpointFormatError(
            f"{name} was written in version {version} of the array format; this kbtrain reads "
            f"version {ARRAYS_VERSION} and older. Update kbtrain."
        )
    found: dict[str, tuple[ArrayOutline, h5py.Dataset]] = {}
    for entry in json.loads(_read_dataset(h5["index"], np.dtype("uint8"), budget, name).tobytes()):
        array_name, dtype = entry["name"], DTYPES[entry["dtype"]]
        if not isinstance(array_name, str) or array_name in found:
            _damaged(name, f"the array name {array_name!r} is not a string or appears twice")
        dataset = h5["arrays"][entry["path"]]
        if dtype not in NATIVE and dataset.attrs.get("dtype") != dtype.name:
            _damaged(name, f"{array_name!r} should be marked as {dtype.name}")
        if list(dataset.shape) != entry["shape"]:
            _damaged(name, f"{array_name!r} has shape {dataset.shape}, not {entry['shape']}")
        found[array_name] = ArrayOutline(array_name, dtype.name, dataset.shape), dataset
    return list(found.values())


def _read_h5(h5: h5py.File, size: int, name: str) -> dict[str, np.ndarray]:
    budget = [size]  # bytes that array data may still take in a file of this size
    return {
        outline.name: _read_dataset(dataset, DTYPES[outline.dtype], budget, name)
        for outline, dataset in _read_index(h5, budget, name)
    }


def _read_dataset(
    dataset: h5py.Dataset, dtype: np.dtype[Any], budget: list[int], name: str
) -> np.ndarray:
    """Read a dataset after checking its dtype and that all its bytes are in this file."""
    stored = dtype if dtype in NATIVE else np.dtype(f"u{dtype.itemsize}")
    plain = (
        isinstance(dataset, h5py.Dataset)
        and dataset.dtype == stored
        and dataset.chunks is None
        and dataset.external is None
        and not dataset.is_virtual
    )
    if not plain:
        _damaged(name, f"{dataset!r} is not a plain dataset of {stored}")
    # Without this check a few bytes could declare a shape of terabytes.
    needed = dataset.size * stored.itemsize
    budget[0] -= needed
    if budget[0] < 0 or dataset.id.get_storage_size() != needed:
        _damaged(name, f"{dataset.name!r} claims {needed} bytes that the file does not hold")
    array = np.empty(dataset.shape, dtype=stored)
    if array.size:
        dataset.read_direct(array)
    return array.view(dtype)


def _damaged(name: str, problem: str) -> NoReturn:
    raise CheckpointDamagedError(f"{name} is not as kbtrain wrote it: {problem}.")
