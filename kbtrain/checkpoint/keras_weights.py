"""Reads ``.weights.h5`` and ``.keras`` files safely: shapes first, then only what is needed.

A few kilobytes of HDF5 can claim gigabytes, because shapes and compressed zeros cost almost
nothing. So a dataset is read only if its shape is the expected one, and compressed data is checked
not to expand beyond that shape.
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

# In the order in which they are applied. Any other filter could allocate memory without limit.
_SHUFFLE, _DEFLATE, _CHECKSUM = h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_DEFLATE, 3
_FILTERS = [_SHUFFLE, _DEFLATE, _CHECKSUM]


class StoredArray:
    """A dataset that is read when it becomes an array (``np.asarray``).

    Args:
        path: Its path in the file, for messages.
        dataset: The dataset of an open file.

    Attributes:
        shape: The shape that the file declares.
    """

    def __init__(self, path: str, dataset: h5py.Dataset) -> None:
        self.shape: tuple[int, ...] = tuple(dataset.shape or ())
        self._path, self._dataset = path, dataset

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if (problem := _problem(self._dataset)) is not None:
            raise CheckpointDamagedError(f"{self._path} is not read: {problem}.")
        array = np.empty(self.shape, self._dataset.dtype)
        if array.size:
            self._dataset.read_direct(array)
        if _is_bfloat16(self._dataset):
            bits = array.dtype.kind == "V"
            array = array.view(ml_dtypes.bfloat16) if bits else array.astype(ml_dtypes.bfloat16)
        return array if dtype is None else array.astype(dtype)


@contextmanager
def opened(path: Path) -> Iterator[h5py.File]:
    """Open a ``.weights.h5`` file, or the one inside a ``.keras`` file.

    Raises:
        OSError: The operating system failed to read. It may come as late as the close, so values
            must not be used before this context has ended.
    """
    with path.open("rb", buffering=0) as raw:
        if path.suffix != ".keras":
            with open_for_reading(raw) as h5:
                yield h5
            return
        with _archive(raw) as archive, archive.open(_INNER) as inner, open_for_reading(inner) as h5:
            yield h5


def _archive(raw: IO[bytes]) -> zipfile.ZipFile:
    """Open an archive; unlike ``zipfile``, report an I/O error as such and not as damage."""
    try:
        return zipfile.ZipFile(raw)
    except zipfile.BadZipFile as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def values(file: h5py.File) -> dict[str, StoredArray]:
    """All values of a model by path, not read yet; the optimizer and metrics are left out."""
    found: dict[str, StoredArray] = {}

    def collect(path: str, item: Any) -> None:
        is_value = isinstance(item, h5py.Dataset) and "/vars/" in f"/{path}"
        if is_value and path.partition("/")[0] not in _OTHERS:
            found[path] = StoredArray(path, item)

    file.visititems(collect)  # does not follow links out of the file
    return found


def _is_bfloat16(dataset: h5py.Dataset) -> bool:
    """Whether Keras marked a dataset as of this type, which HDF5 lacks; it stores the bits."""
    return bool(dataset.attrs.get("dtype") == "bfloat16")


def _problem(dataset: h5py.Dataset) -> str | None:
    """Why a dataset cannot be read within the memory its shape implies; None if it can."""
    needed = math.prod(dataset.shape or ()) * dataset.dtype.itemsize
    if dataset.external is not None or dataset.is_virtual:
        return "its values are in other files"
    bits = dataset.dtype == np.dtype("V2") and _is_bfloat16(dataset)
    if dataset.dtype.kind not in "biufc" and not bits:
        return f"it holds {dataset.dtype}, not numbers"
    if dataset.chunks is None:
        stored = dataset.id.get_storage_size()
        return None if stored >= needed else f"it claims {needed} bytes and has {stored}"
    chunk = math.prod(dataset.chunks) * dataset.dtype.itemsize
    if chunk > max(needed, _SMALL):
        return f"its chunks have {chunk} bytes, more than the whole dataset"
    properties = dataset.id.get_create_plist()
    filters = [properties.get_filter(i)[0] for i in range(properties.get_nfilters())]
    if filters != [known for known in _FILTERS if known in filters]:
        return "its compression is not gzip"
    if _DEFLATE in filters and not _inflates_to(dataset, chunk, _CHECKSUM in filters):
        return "it expands to more bytes than its shape allows"
    return None


def _inflates_to(dataset: h5py.Dataset, size: int, checksum: bool) -> bool:
    """Whether no compressed chunk of a dataset expands to more than ``size`` bytes."""
    for index in range(dataset.id.get_num_chunks()):
        offset = dataset.id.get_chunk_info(index).chunk_offset
        _, data = dataset.id.read_direct_chunk(offset)
        data = data[:-4] if checksum else data
        if len(zlib.decompressobj().decompress(data, size + 1)) > size:
            return False
    return True
