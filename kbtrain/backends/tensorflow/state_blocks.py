"""TensorFlow: variables whose values are divided among several processes."""

from __future__ import annotations

from collections.abc import Sequence

import keras
import numpy as np
import tensorflow as tf

from kbtrain.backends.tensorflow.device import host_view


def whole_value(variable: keras.Variable) -> np.ndarray:
    """The value of a variable on the host, where it is whole."""
    return np.array(host_view(variable.value))


def checksums(variables: Sequence[keras.Variable]) -> list[int | None]:
    """A number for each variable, the sum of its bits as integers."""
    if not variables:
        return []
    sums = [_sum_of_bits(tf.convert_to_tensor(v.value)) for v in variables]
    found: list[int | None] = tf.stack(sums).numpy().tolist()
    return found


def _sum_of_bits(value: tf.Tensor) -> tf.Tensor:
    bits = {1: tf.int8, 2: tf.int16, 4: tf.int32, 8: tf.int64}[value.dtype.size]
    return tf.reduce_sum(tf.cast(tf.bitcast(value, bits), tf.int64))
