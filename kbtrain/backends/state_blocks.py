"""What backends share that do nothing special with variables, or have every one of them whole."""

from __future__ import annotations

import keras

from kbtrain.utils.array_blocks import OwnedBlocks, ReadBlock


def check_model(model: keras.Model) -> None:
    """Check that the variables hold what the model computes with: nothing replaces them here."""


def owned_blocks(variable: keras.Variable) -> OwnedBlocks | None:
    """The blocks of a variable that this process saves; None, as its value is whole here."""
    return None


def spans_devices(variable: keras.Variable) -> bool:
    """Whether a variable's value is laid out over several devices; never on these backends."""
    return False


def assign_blocks(variable: keras.Variable, read: ReadBlock) -> None:
    """Assign a variable, of which this process reads all."""
    shape = tuple(variable.shape)
    variable.assign(read((0,) * len(shape), shape))
