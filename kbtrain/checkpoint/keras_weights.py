"""Values in ``.weights.h5`` and ``.keras`` files: their shapes first, and only what is wanted.

A few kilobytes of HDF5 can claim gigabytes: a shape costs nothing, and compressed zeros next to
nothing. So nothing is read before its shape is found to be the wanted one, and compressed values
are checked to be no more than the shape says.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import h5py
import ml_dtypes
import numpy as np

from kbtrain.checkpoint.storage.hdf5_files import open_for_reading
from kbtrain.errors import CheckpointDamagedError

_INNER = "model.weights.h5"  # in a .keras file
_OTHERS = ("optimizer", "metrics", "_metrics")
_SMALL = 2**20

# In the order in which they are applied; each of others may make memory of any size.
_SHUFFLE, _DEFLATE, _CHECKSUM = h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_DEFLATE, 3
_FILTERS = [_SHUFFLE, _DEFLATE, _CHECKSUM]


class StoredArray:
    """A dataset that is read when it becomes an array (``np.asarray``).

    Args:
        place: Its path in the file, for messages.
        dataset: The dataset of an open file.

    Attributes:
        shape: What it claims.
    """

    def __init__(self, place: str, dataset: h5py.Dataset) -> None:
        self.shape: tuple[int, ...] = tuple(dataset.shape or ())
        self._place, self._dataset = place, dataset

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if (problem := _problem(self._dataset)) is not None:
            raise CheckpointDamagedError(f"{self._place} is not read: {problem}.")
        array = np.empty(self.shape, self._dataset.dtype)
        if array.size:
            self._dataset.read_direct(array)
        if self._dataset.attrs.get("dtype") == "bfloat16":  # as Keras marks what HDF5 lacks
            array = array.astype(ml_dtypes.bfloat16)
        return array if dtype is None else array.astype(dtype)


@contextmanager
def opened(path: Path) -> Iterator[h5py.File]:
    """Open the HDF5 file that a Keras file is or contains.

    Raises:
        OSError: The system's own, where it is the system that does not read; at the latest when
            the file is closed, so nothing may be made of what was read before.
    """
    with path.open("rb", buffering=0) as raw:
        if path.suffix != ".keras":
            with open_for_reading(raw) as h5:
                yield h5
            return
        with _archive(raw) as archive, archive.open(_INNER) as inner, open_for_reading(inner) as h5:
            yield h5


def _archive(raw: IO[bytes]) -> zipfile.ZipFile:
    """Open an archive; a disk that does not answer is not taken for damage, as zipfile does."""
    try:
        return zipfile.ZipFile(raw)
    except zipfile.BadZipFile as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def values(file: h5py.File) -> dict[str, StoredArray]:
    """All values of a model by their places, unread; without those of optimizer and metrics."""
    found: dict[str, StoredArray] = {}

    def note(place: str, item: Any) -> None:
        wanted = isinstance(item, h5py.Dataset) and "/vars/" in f"/{place}"
        if wanted and place.partition("/")[0] not in _OTHERS:
            found[place] = StoredArray(place, item)

    file.visititems(note)  # does not follow links that lead elsewhere
    return found


def _problem(dataset: h5py.Dataset) -> str | None:
    """Why a dataset cannot be read in memory of its own size; None if it can."""
    needed = math.prod(dataset.shape or ()) * dataset.dtype.itemsize
    if dataset.external is not None or dataset.is_virtual:
        return "its values lie in other files"
    if dataset.dtype.kind not in "biufc":
        return f"it holds {dataset.dtype}, not numbers"
    if dataset.chunks is None:
        stored = dataset.id.get_storage_size()
        return None if stored >= needed else f"it claims {needed} bytes and has {stored}"
    chunk = math.prod(dataset.chunks) * dataset.dtype.itemsize
    if chunk > max(needed, _SMALL):
        return f"it is stored in pieces of {chunk} bytes, more than it has in all"
    properties = dataset.id.get_create_plist()
    filters = [properties.get_filter(i)[0] for i in range(properties.get_nfilters())]
    if filters != [known for known in _FILTERS if known in filters]:
        return "it is compressed by other means than gzip"
    if _DEFLATE in filters and not _inflates_to(dataset, chunk, _CHECKSUM in filters):
        return "it is compressed, and more than its shape says"
    return None


def _inflates_to(dataset: h5py.Dataset, size: int, checksum: bool) -> bool:
    """Whether no compressed piece of a dataset has more than ``size`` bytes."""
    for index in range(dataset.id.get_num_chunks()):
        place = dataset.id.get_chunk_info(index).chunk_offset
        _, data = dataset.id.read_direct_chunk(place)
        data = data[:-4] if checksum else data
        if len(zlib.decompressobj().decompress(data, size + 1)) > size:
            return False
    return True
