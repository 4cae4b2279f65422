"""Arrays that are divided among processes: the blocks that one of them owns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

ReadBlock = Callable[[tuple[int, ...], tuple[int, ...]], np.ndarray]
"""Returns the values of an array from an index, of a shape: ``read(start, shape)``."""


class Block(NamedTuple):
    """A rectangular part of an array.

    Attributes:
        start: Index of its first element in the whole array.
        values: Its values, in NumPy or on a device.
    """

    start: tuple[int, ...]
    values: Any


@dataclass(frozen=True)
class OwnedBlocks:
    """The part of an array that one process owns: any number of blocks, or none.

    Each element of the array is in one block of one process.

    Attributes:
        shape: Shape of the whole array.
        dtype: Its dtype.
        blocks: The blocks of this process.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    blocks: Sequence[Block]
