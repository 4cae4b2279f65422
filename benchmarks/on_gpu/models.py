"""Small models that between them use the layers whose kernels differ between devices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import layers

CLASSES = 4
ROWS = 64


@dataclass(frozen=True)
class Small:
    """A small classifier.

    Attributes:
        make: ``make(dropout)`` builds it, without random layers if ``dropout`` is 0.
        x: Its inputs, ``ROWS`` of them.
        y: Their classes.
    """

    make: Callable[[float], keras.Model]
    x: np.ndarray
    y: np.ndarray

    def model(self, dropout: float = 0.0) -> keras.Model:
        """The model with weights that NumPy drew, the same on every device and backend."""
        keras.utils.set_random_seed(0)
        model = self.make(dropout)
        generator = np.random.default_rng(1)
        for variable in model.trainable_variables:
            variable.assign(0.3 * generator.normal(size=variable.shape).astype("float32"))
        return model


def _head(h: Any, inputs: Any, dropout: float) -> keras.Model:
    if dropout:
        # One that draws from the framework's generator, one with a seed of its own.
        h = layers.Dropout(dropout, seed=3)(layers.Dropout(dropout)(h))
    return keras.Model(inputs, layers.Dense(CLASSES)(h))


def _dense(dropout: float) -> keras.Model:
    inputs = keras.Input((16,))
    h = layers.BatchNormalization()(layers.Dense(32, activation="relu")(inputs))
    return _head(layers.Dense(32, activation="tanh")(h), inputs, dropout)


def _convolutions(dropout: float) -> keras.Model:
    inputs = keras.Input((16, 16, 3))
    h = layers.RandomFlip("horizontal", seed=0)(inputs) if dropout else inputs
    for filters in (8, 16):
        h = layers.BatchNormalization()(layers.Conv2D(filters, 3, padding="same")(h))
        h = layers.MaxPooling2D()(layers.ReLU()(h))
    h = layers.SeparableConv2D(8, 3)(h)
    return _head(layers.GlobalAveragePooling2D()(h), inputs, dropout)


def _recurrent(dropout: float) -> keras.Model:
    inputs = keras.Input((12, 6))
    h = layers.Bidirectional(layers.LSTM(8, return_sequences=True))(inputs)
    return _head(layers.GRU(8)(h), inputs, dropout)


def _attention(dropout: float) -> keras.Model:
    inputs = keras.Input((16,), dtype="int32")
    h = layers.Embedding(64, 32, mask_zero=True)(inputs)
    for _ in range(2):
        a = layers.LayerNormalization()(h)
        h = h + layers.MultiHeadAttention(4, 8, dropout=dropout)(a, a)
        a = layers.LayerNormalization()(h)
        h = h + layers.Dense(32)(layers.Dense(64, activation="gelu")(a))
    return _head(layers.GlobalAveragePooling1D()(h), inputs, dropout)


def small_models() -> dict[str, Small]:
    """All of them, the quickest first."""
    generator = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return generator.normal(size=(ROWS, *shape)).astype("float32")

    classes = generator.integers(0, CLASSES, ROWS).astype("int32")
    tokens = generator.integers(0, 64, (ROWS, 16)).astype("int32")
    return {
        "dense": Small(_dense, normal(16), classes),
        "convolutions": Small(_convolutions, normal(16, 16, 3), classes),
        "attention": Small(_attention, tokens, classes),
        "recurrent": Small(_recurrent, normal(12, 6), classes),
    }
