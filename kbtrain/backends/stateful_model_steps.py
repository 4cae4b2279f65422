"""Custom steps of a model on PyTorch and TensorFlow: they take a batch and assign variables."""

from __future__ import annotations

import inspect
from typing import Any

import keras

from kbtrain.errors import ConfigurationError


def check_signature(model: keras.Model, name: str) -> None:
    """Check that a step has the signature that Keras uses here.

    Raises:
        ConfigurationError: It does not take exactly one batch.
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
    """Compute the outputs for one batch."""
    return model.predict_step(data)
