"""Reading arrays from where they lie: no need of libhdf5, and no trust in it.

libhdf5 follows the structures of a file wherever they lead, on altered files for ever. So a file of
arrays says in its last lines where its index lies, and the index says where the bytes of each array
lie. What is read from that is checked against the size of the file before memory is asked for.
"""

from __future__ import annotations

import io
import json
import math
import re
from typing import Any, NamedTuple, NoReturn

import numpy as np

from kbtrain.checkpoint.storage.dtypes import DTYPES
from kbtrain.errors import CheckpointDamagedError

INDEX_LINE = b"\nkbtrain-arrays index %019d %019d"
"""Offset and size of the index; stands before the line with the checksum."""

TRAILER = b"\nkbtrain-arrays sha256 %s\n"
"""After the end of the HDF5 data, where HDF5 does not look: the checksum of all before."""

TRAILER_SIZE = len(TRAILER % (b"0" * 64))
_INDEX_LINE_SIZE = len(INDEX_LINE % (0, 0))
_INDEX = re.compile(rb"\nkbtrain-arrays index ([0-9]{19}) ([0-9]{19})")
_TRAILER = re.compile(rb"\nkbtrain-arrays sha256 [0-9a-f]{64}\n")
_MAX_DIMENSIONS = 32  # as in HDF5


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
        result: int = math.prod(self.shape) * DTYPES[self.dtype].itemsize
        return result


class ArrayLocation(NamedTuple):
    """An array and where its bytes begin."""

    outline: ArrayOutline
    offset: int


def find_arrays(file: io.FileIO, name: str) -> list[ArrayLocation] | None:
    """Return where the arrays of a file lie, in the order of writing.

    Args:
        file: A file whose checksum the caller has found right; its position does not matter.
        name: What it is called, for messages.

    Returns:
        The places; None if the file does not say, as those of former versions do not.

    Raises:
        CheckpointDamagedError: It says what cannot be.
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
        _damaged(name, "its index does not lie in it")
    file.seek(offset)
    try:
        entries = json.loads(_read_exactly(file, np.empty(size, "uint8"), name).tobytes())
    except (ValueError, RecursionError) as error:
        _damaged(name, f"its index is not readable as JSON ({error})")
    if not isinstance(entries, list):
        _damaged(name, "its index is not a list")
    places, room = {}, end
    for entry in entries:
        place = _place(entry, end, name)
        room -= place.outline.size  # or a few bytes could ask for them a million times
        if room < 0 or place.outline.name in places:
            _damaged(name, f"{place.outline.name!r} is there twice or has no room in it")
        places[place.outline.name] = place
    return list(places.values())


def read_array(file: io.FileIO, place: ArrayLocation, name: str) -> np.ndarray:
    """Read an array that ``find_arrays`` has found in the same file."""
    dtype = DTYPES[place.outline.dtype]
    file.seek(place.offset)
    array = np.empty(place.outline.size, "uint8")
    _read_exactly(file, array, name)
    if dtype == np.bool_ and array.size and array.max() > 1:
        _damaged(name, f"{place.outline.name!r} has values that are neither true nor false")
    return array.view(dtype).reshape(place.outline.shape)


def has_trailer(file: io.FileIO) -> bool:
    """Whether a file ends as arrays of kbtrain do; its checksum is not looked at."""
    file.seek(max(file.seek(0, 2) - TRAILER_SIZE, 0))
    return _TRAILER.fullmatch(file.read()) is not None


def _place(entry: Any, end: int, name: str) -> ArrayLocation:
    """Check one entry of an index; ``end`` is where the data of the file end."""
    if not isinstance(entry, dict):
        _damaged(name, "an entry of its index is not a mapping")
    values: list[Any] = [entry.get(key) for key in ("name", "dtype", "shape", "offset")]
    array, dtype, shape, offset = values
    if not isinstance(array, str) or not isinstance(dtype, str) or dtype not in DTYPES:
        _damaged(name, f"its index names {array!r} of dtype {dtype!r}")
    plain = isinstance(shape, list) and len(shape) <= _MAX_DIMENSIONS
    if not plain or not all(_is_count(n) for n in shape) or not _is_count(offset):
        _damaged(name, f"{array!r} cannot have the shape {shape!r} at {offset!r}")
    outline = ArrayOutline(array, dtype, tuple(shape))
    # The second: NumPy counts the elements without the dimensions that are 0.
    total = math.prod(n for n in shape if n) * DTYPES[dtype].itemsize
    if offset + outline.size > end or total >= 2**63:
        _damaged(name, f"{array!r} claims {outline.size} bytes that the file does not hold")
    return ArrayLocation(outline, offset)


def _is_count(value: Any) -> bool:
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
