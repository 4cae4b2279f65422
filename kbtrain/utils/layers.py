"""Walking through what Keras nests: the layers of a model, optimizers that wrap another one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras

from kbtrain.utils.packages.keras_private import flatten_layers


def walk_layers(layer: keras.layers.Layer) -> Iterator[keras.layers.Layer]:
    """The layer and everything below it, each once, in a stable order."""
    yield from flatten_layers(layer)


def innermost_optimizer(optimizer: Any) -> Any:
    """The optimizer that all others are wrapped around; None for None."""
    while hasattr(optimizer, "inner_optimizer"):
        optimizer = optimizer.inner_optimizer
    return optimizer


def ends_in(layer: Any, activation: str) -> bool:
    """Whether the last layer of a model applies an activation, such as ``"softmax"``."""
    while inner := getattr(layer, "layers", None):
        layer = inner[-1]
    if isinstance(layer, keras.layers.Softmax):
        return activation == "softmax"
    applied = layer if isinstance(layer, keras.layers.Activation) else None
    function = getattr(applied or layer, "activation", None)
    return function is getattr(keras.activations, activation)
