"""TensorFlow: variables whose values are divided among several processes."""

from __future__ import annotations

import keras
import numpy as np

from kbtrain.backends.tensorflow.device import host_view


def check_model(model: keras.Model) -> None:
    """Check that the variables hold what the model computes with, which is so on this backend."""


def whole_value(variable: keras.Variable) -> np.ndarray:
    """The value of a variable on the host, where it is whole."""
    return np.array(host_view(variable.value))
