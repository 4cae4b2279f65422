"""Walking through the layers of a Keras model."""

from __future__ import annotations

from collections.abc import Iterator

import keras

from kbtrain.utils.keras_private import flatten_layers


def walk_layers(layer: keras.layers.Layer) -> Iterator[keras.layers.Layer]:
    """The layer and everything below it, each once, in a stable order."""
    yield from flatten_layers(layer)
