"""A hand-written TensorFlow step: one tf.function, with and without XLA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf


def loops(
    workload: str, make: Callable[[], keras.Model], loss: Any
) -> dict[str, Callable[[Any, Any], Any]]:
    return {
        "tf.function": _loop(make, loss, False),
        "tf.function, XLA": _loop(make, loss, True),
    }


def _loop(make: Callable[[], keras.Model], loss: Any, jit_compile: bool) -> Callable[..., Any]:
    model = make()
    optimizer = keras.optimizers.AdamW(1e-3, weight_decay=0.01)
    variables = model.trainable_variables
    optimizer.build(variables)

    @tf.function(jit_compile=jit_compile)  # type: ignore[untyped-decorator]
    def step(x: Any, y: Any) -> Any:
        with tf.GradientTape() as tape:
            value = loss(y, model(x, training=True))
        optimizer.apply(tape.gradient(value, [v.value for v in variables]), variables)
        return value

    return lambda x, y: step(tf.constant(x), tf.constant(y))


def wait(value: Any) -> None:
    value.numpy()
