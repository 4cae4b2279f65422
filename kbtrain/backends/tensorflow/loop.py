"""TensorFlow: a loop over rows on the device, as a ``tf.while_loop``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf


def scan(fn: Callable[[Any, Any], tuple[Any, Any]], carry: Any, inputs: Any) -> tuple[Any, Any]:
    """``carry, output = fn(carry, x)`` for each x along the leading axis of ``inputs``.

    ``fn`` may assign variables. Returns the last carry and the outputs along a new leading axis.
    """
    return loop(fn, carry, inputs, tf.nest.flatten(inputs)[0].shape[0])


def loop(
    fn: Callable[[Any, Any], tuple[Any, Any]], carry: Any, inputs: Any, count: Any
) -> tuple[Any, Any]:
    """``scan`` over the first ``count`` entries; the outputs are allocated for all."""
    size = tf.nest.flatten(inputs)[0].shape[0]

    def row(i: Any) -> Any:
        return tf.nest.map_structure(lambda t: t[i], inputs)

    if tf.executing_eagerly():
        outputs = []
        for i in range(int(count)):
            carry, output = fn(carry, row(i))
            outputs.append(output)
        return carry, tf.nest.map_structure(lambda *t: tf.stack(t), *outputs)

    # The loop's arrays need dtypes and shapes in advance: trace the body once.
    traced = tf.function(fn, autograph=False).get_concrete_function(carry, row(0))
    specs = traced.structured_outputs[1]
    arrays = tf.nest.map_structure(
        lambda s: tf.TensorArray(s.dtype, size=size, element_shape=s.shape), specs
    )

    def body(i: Any, carry: Any, arrays: Any) -> tuple[Any, Any, Any]:
        carry, output = fn(carry, row(i))
        arrays = tf.nest.map_structure(lambda a, o: a.write(i, o), arrays, output)
        return i + 1, carry, arrays

    _, carry, arrays = tf.while_loop(
        lambda i, *_: i < count,
        body,
        (tf.constant(0), carry, arrays),
        maximum_iterations=size,
        parallel_iterations=1,
    )
    return carry, tf.nest.map_structure(lambda a: a.stack(), arrays)
