"""TensorFlow: custom steps of a model, called as by Keras' trainer for TensorFlow."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf


def run_train_step(model: keras.Model, data: Any) -> Any:
    """Run one update; the step has its own tape."""
    return model.train_step(data)


def try_train_step(model: keras.Model, data: Any) -> None:
    """Run the step only to create its variables, in a trace if possible."""
    step = tf.function(functools.partial(model.train_step), autograph=False)
    if not model.run_eagerly:
        with contextlib.suppress(Exception):  # the one that follows is to be seen
            step.get_concrete_function(data)
            return
    model.train_step(data)


def one_by_one(fn: Callable[[Any], Any]) -> Callable[[Any, int], Any]:
    """``call(block, count)`` as from ``compile_steps``, run eagerly."""

    def call(block: Any, count: int) -> Any:
        rows = [tf.nest.map_structure(lambda t, i=i: t[i], block) for i in range(count)]
        return tf.nest.map_structure(lambda *outputs: tf.stack(outputs), *map(fn, rows))

    return call


def reversible(
    fn: Callable[[], Any], variables: Sequence[keras.Variable]
) -> tuple[Any, Callable[[Any], None]]:
    """Run ``fn``; return its result and ``undo_if(condition)``, which reverts its changes."""
    before = [tf.identity(v.value) for v in variables]
    result = fn()

    def undo_if(condition: Any) -> None:
        for variable, old in zip(variables, before, strict=True):
            variable.assign(tf.where(condition, old, variable.value))

    return result, undo_if
