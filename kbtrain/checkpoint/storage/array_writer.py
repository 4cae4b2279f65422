"""Writes arrays: libhdf5 lays out the file, large arrays are written from NumPy's memory.

libhdf5 holds a process-wide lock while it writes an array, so a training thread that reads its data
through h5py would wait for a checkpoint's largest array. So libhdf5 writes the small arrays and
reserves space for the large ones; their bytes are then written and hashed in chunks without any
lock (NumPy, hashlib and file objects release the GIL).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from kbtrain.checkpoint.storage.array_index import INDEX_LINE, TRAILER
from kbtrain.checkpoint.storage.dtypes import DTYPES, NATIVE
from kbtrain.checkpoint.storage.format import ARRAYS_FORMAT, ARRAYS_VERSION
from kbtrain.checkpoint.storage.hdf5_files import DeferredErrorFile, open_for_writing
from kbtrain.errors import CheckpointError
from kbtrain.utils.files.filesystem import FileEntry

CHUNK_BYTES = 2**22
DIRECT_BYTES = 2**16  # smaller arrays are written faster by libhdf5

_OWN = ("arrays", "index")  # reserved: must not be the first component of a link

Region = tuple[int, np.ndarray]


def write_arrays(
    path: str | Path,
    arrays: Mapping[str, np.ndarray],
    links: Mapping[str, str] | None = None,
    values: Mapping[str, np.ndarray] | None = None,
) -> FileEntry:
    """Write named arrays to a new HDF5 file and flush it to the disk.

    Every array becomes one contiguous dataset under ``/arrays``, at the path given by its name
    (``"sequential/dense/kernel"`` lies in nested groups); ``/index`` has the exact names, their
    order, dtypes, shapes and offsets in the file. Values are stored bit for bit, NaN payloads
    included; bfloat16 and float8 are stored as unsigned integers with an attribute ``dtype``. The
    HDF5 data is followed by the position of the index and the checksum. Equal arrays under equal
    names give equal bytes.

    Args:
        path: The file to create; it must not exist.
        arrays: Name -> array of any shape. Names are any non-empty strings.
        links: Additional paths for Keras: HDF5 path -> name of an array. An array of a type that
            HDF5 lacks is stored there as a copy in float32.
        values: HDF5 path -> array, for Keras only; ``read_arrays`` ignores them.

    Returns:
        The file's size and checksum. The checksum is computed from the arrays in memory, so
        verifying the file against it also detects write errors.

    Raises:
        CheckpointError: If a dtype cannot be stored or libhdf5 fails.
        OSError: If the disk fails (full, read-only, ...); the file is then incomplete.

    Example:
        >>> import tempfile
        >>> from kbtrain.checkpoint import read_arrays
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
            with open_for_writing(file) as h5:
                writer = _Layout(h5, file)
                writer.arrays(plain)
                writer.others(plain, links or {}, values or {})
        except Exception as error:
            file.raise_deferred()  # if the disk is the cause, raise its own error
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise CheckpointError(
                f"Could not write {path.name}: libhdf5 failed while storing {len(plain)} arrays "
                f"({type(error).__name__}: {error})."
            ) from error
        file.raise_deferred()
        digest = _fill(file, writer.regions)
        line = INDEX_LINE % writer.index
        file.write(line)
        digest.update(line)
        trailer = TRAILER % digest.hexdigest().encode()
        file.write(trailer)
        digest.update(trailer)  # continues the same digest: both checksums in one pass
        file.sync()
        return FileEntry(file.tell(), digest.hexdigest())


class _Layout:
    """Creates the datasets of a file.

    Attributes:
        regions: Offset and array of datasets whose bytes are not written yet.
        index: Offset and size of the index.
    """

    def __init__(self, h5: h5py.File, file: DeferredErrorFile) -> None:
        self.regions: list[Region] = []
        self.index = (0, 0)
        self._h5, self._file = h5, file
        self._datasets: dict[str, h5py.Dataset] = {}

    def arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        self._h5.attrs["format"] = ARRAYS_FORMAT
        self._h5.attrs["version"] = ARRAYS_VERSION
        root = self._h5.create_group("arrays")
        index = []
        for (name, array), path in zip(arrays.items(), _dataset_paths(arrays), strict=True):
            stored = array if array.dtype in NATIVE else array.view(f"u{array.dtype.itemsize}")
            dataset = self._dataset(root, path, stored)
            if stored is not array:
                dataset.attrs["dtype"] = array.dtype.name
            self._datasets[name] = dataset
            index.append(
                {
                    "name": name,
                    "path": path,
                    "dtype": array.dtype.name,
                    "shape": array.shape,
                    "offset": dataset.id.get_offset() or 0,  # None if it is empty
                }
            )
        text = json.dumps(index).encode()
        written = self._h5.create_dataset("index", data=np.frombuffer(text, dtype="uint8"))
        self.index = (written.id.get_offset(), len(text))

    def others(
        self,
        arrays: Mapping[str, np.ndarray],
        links: Mapping[str, str],
        values: Mapping[str, np.ndarray],
    ) -> None:
        """Add the entries for Keras, except where they would collide with kbtrain's own."""
        copies = dict(values)
        for place, name in links.items():
            if name not in arrays or place.partition("/")[0] in _OWN:
                continue
            if arrays[name].dtype in NATIVE:
                self._h5[place] = self._datasets[name]
            else:
                copies[place] = arrays[name]
        for place, value in copies.items():
            if place.partition("/")[0] not in _OWN:
                native = np.asarray(value)
                if native.dtype not in NATIVE:
                    native = native.astype("float32")
                self._dataset(self._h5, place, np.require(native, requirements="C"))

    def _dataset(self, parent: h5py.Group, path: str, array: np.ndarray) -> h5py.Dataset:
        self._file.raise_deferred()  # no point in continuing once the disk is full
        if array.nbytes < DIRECT_BYTES:
            return parent.create_dataset(path, data=array)
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        dataset = parent.create_dataset(path, array.shape, array.dtype, dcpl=properties)
        self.regions.append((dataset.id.get_offset(), array))
        return dataset


def _fill(file: DeferredErrorFile, regions: list[Region]) -> Any:
    """Write the large arrays at their offsets; return the running checksum of the whole file."""
    digest = hashlib.sha256()
    end = file.seek(0, 2)
    position = 0
    for offset, array in sorted(regions, key=lambda region: region[0]):
        _hash_file(file, digest, position, offset)
        position = offset
        for chunk in _byte_chunks(array):
            digest.update(chunk)
            file.seek(position)
            file.write(chunk)
            file.raise_deferred()
            position += len(chunk)
    _hash_file(file, digest, position, end)
    file.seek(max(position, end))
    return digest


def _byte_chunks(array: np.ndarray) -> Iterator[memoryview]:
    data = memoryview(array.reshape(-1).view(np.uint8).data)
    for start in range(0, len(data), CHUNK_BYTES):
        yield data[start : start + CHUNK_BYTES]


def _hash_file(file: DeferredErrorFile, digest: Any, start: int, end: int) -> None:
    """Update the checksum with bytes that libhdf5 has written."""
    file.seek(start)
    while start < end and (data := file.read(min(end - start, CHUNK_BYTES))):
        digest.update(data)
        start += len(data)


def _checked_array(name: str, array: np.ndarray) -> np.ndarray:
    if not isinstance(name, str) or not name:
        raise CheckpointError(
            f"An array's name must be a non-empty string. Received: name={name!r}"
        )
    array = np.asarray(array)
    if array.dtype.name not in DTYPES:
        raise CheckpointError(
            f"The array {name!r} cannot be stored: its dtype is none of "
            f"{', '.join(sorted(DTYPES))}. Received: dtype={array.dtype}"
        )
    # Little-endian on every machine. (`ascontiguousarray` would make scalars 1-D.)
    return np.require(array, dtype=DTYPES[array.dtype.name], requirements="C")


def _dataset_paths(names: Mapping[str, Any]) -> list[str]:
    """Return a distinct HDF5 path for each name, equal to the name where HDF5 allows it."""
    safe = ["/".join(_safe_component(part) for part in name.split("/")) for name in names]
    groups = {path[: match.start()] for path in safe for match in re.finditer("/", path)}
    taken = groups | set(safe)  # a dataset cannot have the path of a group or another dataset
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
    """Escape components that are special in HDF5: empty, ".", "..", NUL, lone surrogates."""
    if part in ("", ".", ".."):
        return "%" + part
    return part.replace("\0", "%00").encode("utf-8", "backslashreplace").decode()
