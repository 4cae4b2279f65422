"""The benchmarked Keras models, with synthetic data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import layers

USERS_AND_ITEMS = 1_000_000


@dataclass(frozen=True)
class GptSize:
    """The dimensions of a GPT; ``heads`` divides ``width``."""

    depth: int = 4
    width: int = 256
    length: int = 128
    heads: int = 8
    vocabulary: int = 256

    def flops_per_token(self, parameters: int) -> float:
        """Model FLOPs of a training step per token.

        As counted for PaLM (Chowdhery et al. 2022, https://arxiv.org/abs/2204.02311, appendix B):
        6 N for the products with N parameters, forward and backward, and 12 L H Q T for attention
        with L layers of H heads of dimension Q over T tokens. Embedding lookups are not counted.

        Args:
            parameters: Number of parameters of the whole model.
        """
        products = parameters - (self.vocabulary + self.length) * self.width
        return 6 * products + 12 * self.depth * self.width * self.length


SMALL = GptSize()
TINY = GptSize(depth=1, width=32, length=16, heads=2, vocabulary=64)
MILLIONS_124 = GptSize(depth=12, width=768, length=1024, heads=12, vocabulary=24_576)


def in_bf16() -> bool:
    """Whether to compute in bfloat16 with float32 parameters."""
    result: bool = keras.config.dtype_policy().compute_dtype == "bfloat16"
    return result


class Positions(layers.Layer):  # type: ignore[misc]
    """Adds a learned vector to each position."""

    def build(self, shape: Any) -> None:
        self.table = self.add_weight(shape=shape[1:], initializer="uniform", name="table")

    def call(self, x: Any) -> Any:
        return x + self.table


def mlp() -> keras.Model:
    inputs = keras.Input((16,))
    return keras.Model(inputs, layers.Dense(4)(layers.Dense(64, activation="relu")(inputs)))


def gpt(size: GptSize = SMALL) -> keras.Model:
    tokens = keras.Input((size.length,), dtype="int32")
    h = Positions()(layers.Embedding(size.vocabulary, size.width)(tokens))
    for _ in range(size.depth):
        a = layers.LayerNormalization()(h)
        attention = layers.MultiHeadAttention(size.heads, size.width // size.heads)
        h = h + attention(a, a, use_causal_mask=True)
        m = layers.Dense(4 * size.width, activation="gelu")(layers.LayerNormalization()(h))
        h = h + layers.Dense(size.width)(m)
    return keras.Model(tokens, layers.Dense(size.vocabulary)(layers.LayerNormalization()(h)))


def convnet() -> keras.Model:
    inputs = keras.Input((32, 32, 3))
    h = layers.RandomFlip("horizontal", seed=0)(inputs)
    for filters in (32, 64, 128):
        h = layers.Conv2D(filters, 3, padding="same")(h)
        h = layers.MaxPooling2D()(layers.ReLU()(layers.BatchNormalization()(h)))
    return keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling2D()(h)))


def resnet50() -> keras.Model:
    """ResNet-50 as Keras has it: the strides of the first version, a bias in each convolution."""
    return keras.applications.ResNet50(weights=None, classifier_activation=None)


def recommender() -> keras.Model:
    """Classifies pairs of rows of a large embedding table."""
    pair = keras.Input((2,), dtype="int32")
    h = layers.Flatten()(layers.Embedding(USERS_AND_ITEMS, 32)(pair))
    return keras.Model(pair, layers.Dense(2)(layers.Dense(64, activation="relu")(h)))


@dataclass(frozen=True)
class Workload:
    """A model and how it is timed.

    Attributes:
        make: Builds the Keras model; the loss is sparse cross-entropy from logits.
        batch: Batch size.
        steps: Steps in one round.
        data: ``data(rows)`` returns ``(x, y)``.
        size: Dimensions of a GPT, for counting FLOPs; None for other models.
    """

    make: Callable[[], keras.Model]
    batch: int
    steps: int
    data: Callable[[int], tuple[np.ndarray, np.ndarray]]
    size: GptSize | None = None


def loss() -> keras.losses.Loss:
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def _normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype("float32")


def _integers(high: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, high, shape).astype("int32")


def texts(size: GptSize) -> Callable[[int], tuple[np.ndarray, np.ndarray]]:
    shape = size.vocabulary, size.length
    return lambda n: (_integers(shape[0], n, shape[1]), _integers(shape[0], n, shape[1]))


WORKLOADS = {
    "mlp": Workload(mlp, 32, 1000, lambda n: (_normal(n, 16), _integers(4, n))),
    "gpt": Workload(gpt, 8, 8, texts(SMALL), SMALL),
    "convnet": Workload(convnet, 64, 12, lambda n: (_normal(n, 32, 32, 3), _integers(10, n))),
    "recommender": Workload(
        recommender, 256, 12, lambda n: (_integers(USERS_AND_ITEMS, n, 2), _integers(2, n))
    ),
    "gpt-tiny": Workload(lambda: gpt(TINY), 4, 4, texts(TINY), TINY),
    # For a GPU: 124 million parameters, and ResNet-50.
    "gpt124m": Workload(lambda: gpt(MILLIONS_124), 8, 8, texts(MILLIONS_124), MILLIONS_124),
    "resnet50": Workload(resnet50, 64, 8, lambda n: (_normal(n, 224, 224, 3), _integers(1000, n))),
}
