"""PyTorch: variables whose values are divided among several processes."""

from __future__ import annotations

import keras

from kbtrain.utils.array_blocks import OwnedBlocks, ReadBlock


def owned_blocks(variable: keras.Variable) -> OwnedBlocks | None:
    """The blocks of a variable that this process saves; None, as its value is whole here."""
    return None


def assign_blocks(variable: keras.Variable, read: ReadBlock) -> None:
    """Assign a variable of which this process holds blocks, which is all of it."""
    shape = tuple(variable.shape)
    variable.assign(read((0,) * len(shape), shape))
