"""Writes and reads the blocks of arrays that are divided among processes.

Each process writes its blocks of a group into one file (``model-p00001.h5``), an array file like
any other. A reader takes only the blocks that it needs, and verifies each by its own checksum.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kbtrain.checkpoint.storage.array_index import (
    ArrayLocation,
    ArrayOutline,
    find_arrays,
    read_array,
)
from kbtrain.checkpoint.storage.array_writer import write_arrays
from kbtrain.checkpoint.storage.block_index import (
    ArrayEntry,
    Index,
    StoredBlock,
    block_name,
)
from kbtrain.checkpoint.storage.dtypes import DTYPES
from kbtrain.checkpoint.storage.faults import reading
from kbtrain.checkpoint.storage.manifest import block_file, open_verified
from kbtrain.errors import CheckpointDamagedError
from kbtrain.utils.array_blocks import OwnedBlocks
from kbtrain.utils.files.filesystem import FileEntry, fsync_directory, open_regular


class Part(NamedTuple):
    """What one process has written of a checkpoint.

    Attributes:
        files: File -> size, checksum and group.
        arrays: Group -> its divided arrays, each with the blocks of this process.
    """

    files: dict[str, FileEntry]
    arrays: dict[str, list[ArrayEntry]]


def write_blocks(folder: Path, rank: int, arrays: Mapping[str, Mapping[str, OwnedBlocks]]) -> Part:
    """Write the blocks that a process owns, flush them to the disk, and read them back.

    Args:
        folder: The folder of the checkpoint, which exists.
        rank: Index of the process.
        arrays: Group -> name -> blocks.

    Raises:
        CheckpointDamagedError: A file reads back differently.
        CheckpointError: A value cannot be stored.
        OSError: Writing failed.
    """
    part = Part({}, {})
    for group, values in arrays.items():
        file = block_file(group, rank)
        stored = {
            block_name(name, block.start): block.values
            for name, owned in values.items()
            for block in owned.blocks
        }
        offsets: dict[str, int] = {}
        if stored:
            entry = write_arrays(folder / file, stored)
            part.files[file] = entry._replace(group=group)
            with open_verified(folder, file, entry) as written:
                places = find_arrays(written, file) or []
                offsets = {place.outline.name: place.offset for place in places}
        part.arrays[group] = [_entry(file, name, owned, offsets) for name, owned in values.items()]
    fsync_directory(folder)
    return part


def _entry(file: str, name: str, owned: OwnedBlocks, offsets: Mapping[str, int]) -> ArrayEntry:
    blocks = tuple(
        StoredBlock(
            file,
            tuple(block.start),
            block.values.shape,
            offsets[block_name(name, block.start)],
            checksum(block.values),
        )
        for block in owned.blocks
    )
    outline = ArrayOutline(name, np.dtype(owned.dtype).name, tuple(owned.shape))
    return ArrayEntry(outline, blocks)


def checksum(array: np.ndarray) -> int:
    """The CRC-32 of an array's bytes in C order."""
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


class StoredArray:
    """An array of a checkpoint that stays on the disk; blocks are read when they are needed.

    ``np.asarray`` reads all of it.

    Args:
        folder: The checkpoint's folder.
        outline: Name, dtype and shape of the array.
        blocks: Its blocks.
        verify: Whether to compare each block that is read with its checksum.
    """

    def __init__(
        self,
        folder: Path,
        outline: ArrayOutline,
        blocks: Sequence[StoredBlock],
        verify: bool = True,
    ) -> None:
        self.name = outline.name
        self.shape = outline.shape
        self.dtype: np.dtype[Any] = DTYPES[outline.dtype]
        self._folder, self._blocks, self._verify = folder, blocks, verify
        # The last one: the devices of a process often take parts of one block.
        self._kept: tuple[StoredBlock, np.ndarray] | None = None

    def read_block(self, start: Index, shape: Index) -> np.ndarray:
        """Return the values from the index ``start``, of a shape.

        Only the blocks of the checkpoint that meet them are read.

        Raises:
            CheckpointDamagedError: A block is missing or altered; the error names it.
            CheckpointUnreadableError: It cannot be read now.
        """
        start, shape = tuple(start), tuple(shape)
        result = np.empty(shape, self.dtype)
        for block in self._blocks:
            first = [max(a, b) for a, b in zip(start, block.start, strict=True)]
            last = [
                min(a + n, b + m)
                for a, n, b, m in zip(start, shape, block.start, block.shape, strict=True)
            ]
            if all(a < b for a, b in zip(first, last, strict=True)):
                values = self._read(block)
                result[_slices(first, last, start)] = values[_slices(first, last, block.start)]
        return result

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        whole = self.read_block((0,) * len(self.shape), self.shape)
        self._kept = None
        return whole if dtype is None else whole.astype(dtype, copy=False)

    def _read(self, block: StoredBlock) -> np.ndarray:
        if self._kept is None or self._kept[0] != block:
            self._kept = None  # before the next one takes memory
            outline = ArrayOutline(self.name, self.dtype.name, self.shape)
            self._kept = block, read_stored_block(self._folder, outline, block, self._verify)
        return self._kept[1]


def _slices(first: Iterable[int], last: Iterable[int], origin: Index) -> tuple[slice, ...]:
    return tuple(slice(a - o, b - o) for a, b, o in zip(first, last, origin, strict=True))


def read_stored_block(
    folder: Path, outline: ArrayOutline, block: StoredBlock, verify: bool = True
) -> np.ndarray:
    """Read one block of an array.

    Args:
        folder: The checkpoint's folder.
        outline: The array.
        block: The block.
        verify: Whether to compare it with its checksum.

    Raises:
        CheckpointDamagedError: It is missing or altered.
        CheckpointUnreadableError: It cannot be read now.
    """
    label = f"{block.file}: the block of {outline.name!r} at {list(block.start)}"
    place = ArrayLocation(ArrayOutline(label, outline.dtype, block.shape), block.offset)
    with reading(folder / block.file, label), open_regular(folder / block.file) as file:
        try:
            values = read_array(file, place, block.file)
        except CheckpointDamagedError as error:
            raise CheckpointDamagedError(f"{label}: {error}") from error
    if verify and checksum(values) != block.crc32:
        raise CheckpointDamagedError(f"{label}: contents altered (CRC-32 differs)")
    return values


def damaged_blocks(
    folder: Path, blocks: Iterable[tuple[ArrayEntry, StoredBlock]], limit: int = 3
) -> list[str]:
    """Name the blocks of a damaged file that are missing or altered.

    Args:
        folder: The checkpoint's folder.
        blocks: The blocks of the file.
        limit: How many to name.
    """
    names: list[str] = []
    for entry, block in blocks:
        try:
            read_stored_block(folder, entry.outline, block)
        except CheckpointDamagedError:
            names.append(f"{entry.outline.name!r} at {list(block.start)}")
    more = [f"{len(names) - limit} more"] if len(names) > limit else []
    return names[:limit] + more
