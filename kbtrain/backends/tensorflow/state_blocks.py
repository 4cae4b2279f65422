"""TensorFlow: variables whose values are divided among several processes."""

from __future__ import annotations

import keras
import numpy as np

from kbtrain.backends.tensorflow.device import host_view
from kbtrain.utils.array_blocks import OwnedBlocks, ReadBlock


def check_model(model: keras.Model) -> None:
    """Check that the variables hold what the model computes with, which is so on this backend."""


def owned_blocks(variable: keras.Variable) -> OwnedBlocks | None:
    """The blocks of a variable that this process saves; None, as its value is whole here."""
    return None


def whole_value(variable: keras.Variable) -> np.ndarray:
    """The value of a variable on the host, where it is whole."""
    return np.array(host_view(variable.value))


def spans_devices(variable: keras.Variable) -> bool:
    """Whether a variable's value is laid out over several devices; never on this backend."""
    return False


def assign_blocks(variable: keras.Variable, read: ReadBlock) -> None:
    """Assign a variable, of which this process reads all."""
    shape = tuple(variable.shape)
    variable.assign(read((0,) * len(shape), shape))
