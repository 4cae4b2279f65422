"""Reads arrays directly from their offsets in a file, without libhdf5.

libhdf5 follows the structures of a file wherever they lead, in altered files endlessly. So the last
lines of an array file give the position of its index, and the index gives the position of each
array's bytes. Everything is checked against the size of the file before memory is allocated.
"""

from __future__ import annotations

import io
import json
import math
import re
from typing import Any, NamedTuple, NoReturn, TypeGuard

import numpy as np

from kbtrain.checkpoint.storage.dtypes import DTYPES
from kbtrain.errors import CheckpointDamagedError

INDEX_LINE = b"\nkbtrain-arrays index %019d %019d"
"""Offset and size of the index; the line before the checksum."""

TRAILER = b"\nkbtrain-arrays sha256 %s\n"
"""After the end of the HDF5 data, which HDF5 ignores: the checksum of all bytes before it."""

TRAILER_SIZE = len(TRAILER % (b"0" * 64))
_INDEX_LINE_SIZE = len(INDEX_LINE % (0, 0))
_INDEX = re.compile(rb"\nkbtrain-arrays index ([0-9]{19}) ([0-9]{19})")
_TRAILER = re.compile(rb"\nkbtrain-arrays sha256 [0-9a-f]{64}\n")
MAX_DIMENSIONS = 32  # as in HDF5


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
        """Size of its values in bytes."""
        result: int = math.prod(self.shape) * DTYPES[self.dtype].itemsize
        return result


class ArrayLocation(NamedTuple):
    """An array and the offset of its bytes."""

    outline: ArrayOutline
    offset: int


def find_arrays(file: io.FileIO, name: str) -> list[ArrayLocation] | None:
    """Return the locations of the arrays in a file, in the order of writing.

    Args:
        file: A file whose checksum the caller has verified; its position does not matter.
        name: Name of the file, for messages.

    Returns:
        The locations; None if the file has no index line, as in earlier versions.

    Raises:
        CheckpointDamagedError: The index is inconsistent.
    """
    end = file.seek(0, 2) - TRAILER_SIZE - _INDEX_LINE_SIZE
    if end < 0:
        return None
    file.seek(end)
    match = _INDEX.fullmatch(file.read(_INDEX_LINE_SIZE))
    if match is None:
        return None
    offset, size = int(match[1]), int(match[2])
    if offset + size > end:
        _damaged(name, "its index lies outside the file")
    file.seek(offset)
    try:
        entries = json.loads(_read_exactly(file, np.empty(size, "uint8"), name).tobytes())
    except (ValueError, RecursionError) as error:
        _damaged(name, f"its index is not readable as JSON ({error})")
    if not isinstance(entries, list):
        _damaged(name, "its index is not a list")
    places, remaining = {}, end
    for entry in entries:
        place = _parse_location(entry, end, name)
        # The arrays together must fit into the file, or a few bytes could be read a million times.
        remaining -= place.outline.size
        if remaining < 0 or place.outline.name in places:
            _damaged(name, f"{place.outline.name!r} is duplicated or does not fit into the file")
        places[place.outline.name] = place
    return list(places.values())


def read_array(file: io.FileIO, place: ArrayLocation, name: str) -> np.ndarray:
    """Read an array that ``find_arrays`` located in the same file."""
    dtype = DTYPES[place.outline.dtype]
    file.seek(place.offset)
    array = np.empty(place.outline.size, "uint8")
    _read_exactly(file, array, name)
    if dtype == np.bool_ and array.size and array.max() > 1:
        _damaged(name, f"{place.outline.name!r} has values that are neither true nor false")
    return array.view(dtype).reshape(place.outline.shape)


def has_trailer(file: io.FileIO) -> bool:
    """Whether a file ends with the trailer of an array file; its checksum is not verified."""
    file.seek(max(file.seek(0, 2) - TRAILER_SIZE, 0))
    return _TRAILER.fullmatch(file.read()) is not None


def _parse_location(entry: Any, end: int, name: str) -> ArrayLocation:
    """Check one entry of an index; ``end`` is the offset at which the file's data ends."""
    if not isinstance(entry, dict):
        _damaged(name, "an entry of its index is not a mapping")
    values: list[Any] = [entry.get(key) for key in ("name", "dtype", "shape", "offset")]
    array, dtype, shape, offset = values
    if not isinstance(array, str) or not isinstance(dtype, str) or dtype not in DTYPES:
        _damaged(name, f"its index names {array!r} of dtype {dtype!r}")
    plain = isinstance(shape, list) and len(shape) <= MAX_DIMENSIONS
    if not plain or not all(is_count(n) for n in shape) or not is_count(offset):
        _damaged(name, f"{array!r} cannot have the shape {shape!r} at {offset!r}")
    outline = ArrayOutline(array, dtype, tuple(shape))
    # The second condition is for empty arrays: NumPy multiplies the dimensions that are not 0.
    total = math.prod(n for n in shape if n) * DTYPES[dtype].itemsize
    if offset + outline.size > end or total >= 2**63:
        _damaged(name, f"{array!r} claims {outline.size} bytes that the file does not hold")
    return ArrayLocation(outline, offset)


def is_count(value: Any) -> TypeGuard[int]:
    """Whether a JSON value is an integer from 0 to 2**63 - 1."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _read_exactly(file: io.FileIO, array: np.ndarray, name: str) -> np.ndarray:
    view, done = memoryview(array.data), 0
    while done < len(view):
        count = file.readinto(view[done:])
        if not count:
            _damaged(name, "it ends too early")
        done += count
    return array


def _damaged(name: str, problem: str) -> NoReturn:
    raise CheckpointDamagedError(f"{name} is not as kbtrain wrote it: {problem:.300}.")
