"""Steps that a model brings, where they take a batch and change variables: PyTorch, TensorFlow."""

from __future__ import annotations

import inspect
from typing import Any

import keras

from kbtrain.errors import ConfigurationError


def check_signature(model: keras.Model, name: str) -> None:
    """Make sure that a step can be called as Keras calls it here.

    Raises:
        ConfigurationError: It takes something else than one batch.
    """
    try:
        inspect.signature(getattr(model, name)).bind(None)
    except TypeError as problem:
        raise ConfigurationError(
            f"{type(model).__name__}.{name} must be defined as {name}(self, data), as Keras calls "
            f"it on PyTorch and TensorFlow: {problem}. (The form with (state, data) is that of "
            "JAX.)"
        ) from None


def run_test_step(model: keras.Model, data: Any) -> Any:
    """Update the metrics with one batch."""
    return model.test_step(data)


def run_predict_step(model: keras.Model, data: Any) -> Any:
    """The outputs for one batch."""
    return model.predict_step(data)
