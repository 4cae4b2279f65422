"""Where the blocks of an array lie that several processes have written.

A manifest lists the arrays of a group, in their order, with the blocks of each: file, index of the
first element, shape, offset in the file and CRC-32. The blocks must make up the array exactly.
"""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

from kbtrain.checkpoint.storage.array_index import MAX_DIMENSIONS, ArrayOutline, is_count
from kbtrain.checkpoint.storage.dtypes import DTYPES
from kbtrain.utils.files.filesystem import FileEntry

MAX_CUT_AXES = 8
"""Along so many axes an array may be divided; a mesh has as many axes at most."""

Index = tuple[int, ...]


class StoredBlock(NamedTuple):
    """A block of an array, and the place of its bytes.

    Attributes:
        file: Name of the file.
        start: Index of its first element in the whole array.
        shape: Its shape.
        offset: Offset of its bytes in the file; they are contiguous, in C order.
        crc32: CRC-32 of its bytes, so that it can be verified without reading the whole file.
    """

    file: str
    start: Index
    shape: Index
    offset: int
    crc32: int


class ArrayEntry(NamedTuple):
    """An array in the list of a group.

    Attributes:
        outline: Its name, dtype and shape.
        blocks: Its blocks; None if it is whole in a file of the group, under its name.
    """

    outline: ArrayOutline
    blocks: tuple[StoredBlock, ...] | None = None


Arrays = Mapping[str, Sequence[ArrayEntry]]
"""Group -> its arrays in order."""


def files_with_blocks(arrays: Arrays) -> dict[str, list[tuple[ArrayEntry, StoredBlock]]]:
    """The files that hold blocks, with the blocks in each."""
    found: dict[str, list[tuple[ArrayEntry, StoredBlock]]] = {}
    for entries in arrays.values():
        for entry in entries:
            for block in entry.blocks or ():
                found.setdefault(block.file, []).append((entry, block))
    return found


def block_name(name: str, start: Index) -> str:
    """The name of a block in its file.

    Example:
        >>> block_name("dense/kernel", (0, 64))
        'dense/kernel@0,64'
    """
    return f"{name}@{','.join(map(str, start))}"


def find_misfit(shape: Index, blocks: Iterable[tuple[Index, Index]]) -> str | None:
    """Return what is wrong with blocks that should make up an array, or None.

    The blocks make up the array if each of its elements is in exactly one. That is so if the sum of
    their indicator functions is that of the array, which is so if both have the same mixed
    difference: a sum of +1 and -1 at the corners of boxes. So only corners are counted, in time
    proportional to the number of blocks. The first corner (in C order) at which the differences
    are unequal is the first element that is missing, or in two blocks.

    Args:
        shape: Shape of the array.
        blocks: Start and shape of each block; all within the array.
    """
    if 0 in shape:
        return None
    boxes = [(start, extent) for start, extent in blocks if 0 not in extent]
    cut = [a for a, size in enumerate(shape) if any(extent[a] != size for _, extent in boxes)]
    if len(cut) > MAX_CUT_AXES:
        return f"it is divided along {len(cut)} axes, of which there may be {MAX_CUT_AXES}"
    corners: Counter[Index] = Counter()
    for sign, (start, extent) in [(-1, ((0,) * len(shape), shape)), *((1, box) for box in boxes)]:
        for ends in itertools.product((0, 1), repeat=len(cut)):
            corner = tuple(start[a] + end * extent[a] for a, end in zip(cut, ends, strict=True))
            corners[corner] += sign * (-1) ** sum(ends)
    wrong = min((corner for corner, count in corners.items() if count), default=None)
    if wrong is None:
        return None
    element = [0] * len(shape)
    for axis, position in zip(cut, wrong, strict=True):
        element[axis] = position
    return f"{'no block holds' if corners[wrong] < 0 else 'two blocks hold'} its element {element}"


def dump_arrays(arrays: Arrays) -> bytes:
    """Return the JSON of a manifest's list of arrays: a line per array, as there may be many."""
    groups = []
    for group, entries in sorted(arrays.items()):
        lines = ",\n".join("      " + json.dumps(entry_to_json(entry)) for entry in entries)
        groups.append(f"    {json.dumps(group)}: [\n{lines}\n    ]")
    return ("{\n" + ",\n".join(groups) + "\n  }").encode()


def entry_to_json(entry: ArrayEntry) -> dict[str, Any]:
    """Return the JSON value of an array in the list of a group."""
    name, dtype, shape = entry.outline
    value: dict[str, Any] = {"name": name, "dtype": dtype, "shape": list(shape)}
    if entry.blocks is not None:
        value["blocks"] = [
            [file, list(start), list(extent), offset, crc32]
            for file, start, extent, offset, crc32 in entry.blocks
        ]
    return value


def parse_arrays(value: Any, files: Mapping[str, FileEntry]) -> dict[str, list[ArrayEntry]]:
    """Check and convert a manifest's list of arrays; strict, because any program may have made it.

    Args:
        value: The JSON value.
        files: The files of the checkpoint.

    Raises:
        ValueError: The list is not valid, or blocks do not make up their array.
    """
    if not isinstance(value, dict):
        raise ValueError("'arrays' is not a mapping")
    remaining = {name: entry.size for name, entry in files.items()}
    arrays: dict[str, list[ArrayEntry]] = {}
    for group, entries in value.items():
        if not isinstance(entries, list):
            raise ValueError(f"the arrays of {group!r} are not a list")
        known = [name for name, file in files.items() if file.group == group]
        arrays[group] = [_parse_entry(entry, known, files, remaining) for entry in entries]
        names = [entry.outline.name for entry in arrays[group]]
        if len(set(names)) < len(names):
            raise ValueError(f"an array of {group!r} is listed twice")
    return arrays


def _parse_entry(
    entry: Any, known: list[str], files: Mapping[str, FileEntry], remaining: dict[str, int]
) -> ArrayEntry:
    """Check one array; ``remaining`` are the bytes of each file that no block has claimed."""
    if not isinstance(entry, dict):
        raise ValueError("an entry of 'arrays' is not a mapping")
    name, dtype, shape = (entry.get(key) for key in ("name", "dtype", "shape"))
    if not isinstance(name, str) or not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"it lists {name!r:.200} of dtype {dtype!r:.50}")
    itemsize = DTYPES[dtype].itemsize
    if not _is_index(shape) or math.prod(n for n in shape if n) * itemsize >= 2**63:
        raise ValueError(f"{name!r:.200} cannot have the shape {shape!r:.200}")
    outline = ArrayOutline(name, dtype, tuple(shape))
    if (listed := entry.get("blocks")) is None:
        return ArrayEntry(outline)
    if not isinstance(listed, list):
        raise ValueError(f"the blocks of {name!r:.200} are not a list")
    blocks = []
    for item in listed:
        block = _parse_block(item, outline, known)
        size = math.prod(block.shape) * itemsize
        # The blocks of a file together must fit into it, or a few bytes could be read a million
        # times.
        remaining[block.file] -= size
        if block.offset + size > files[block.file].size or remaining[block.file] < 0:
            raise ValueError(f"{block.file} does not hold the block {block.start} of {name!r:.200}")
        blocks.append(block)
    if problem := find_misfit(outline.shape, ((b.start, b.shape) for b in blocks)):
        raise ValueError(f"the blocks of {name!r:.200} do not make it up: {problem}")
    return ArrayEntry(outline, tuple(blocks))


def _parse_block(item: Any, outline: ArrayOutline, known: list[str]) -> StoredBlock:
    if isinstance(item, list) and len(item) == len(StoredBlock._fields):
        file, start, shape, offset, crc32 = item
        valid = (
            file in known
            and _is_index(start)
            and _is_index(shape)
            and len(start) == len(shape) == len(outline.shape)
            and all(s + n <= size for s, n, size in zip(start, shape, outline.shape, strict=True))
            and is_count(offset)
            and is_count(crc32)
        )
        if valid:
            return StoredBlock(file, tuple(start), tuple(shape), offset, crc32)
    raise ValueError(f"a block of {outline.name!r:.200} is not valid: {item!r:.200}")


def _is_index(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and len(value) <= MAX_DIMENSIONS and all(map(is_count, value))
