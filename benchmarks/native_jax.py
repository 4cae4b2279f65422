"""A hand-written JAX step: a Keras model, optax, one jit, donated state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import keras
import optax


def loops(
    workload: str, make: Callable[[], keras.Model], loss: Any
) -> dict[str, Callable[[Any, Any], Any]]:
    model = make()
    optimizer = optax.adamw(1e-3, weight_decay=0.01)
    trainable = [v.value + 0 for v in model.trainable_variables]
    fixed = [v.value + 0 for v in model.non_trainable_variables]
    state = [trainable, fixed, optimizer.init(trainable)]

    def step(trainable: Any, fixed: Any, slots: Any, x: Any, y: Any) -> Any:
        def objective(trainable: Any) -> Any:
            outputs, updated = model.stateless_call(trainable, fixed, x, training=True)
            return loss(y, outputs), updated

        (value, fixed_new), gradients = jax.value_and_grad(objective, has_aux=True)(trainable)
        updates, slots = optimizer.update(gradients, slots, trainable)
        return value, optax.apply_updates(trainable, updates), fixed_new, slots

    jitted = jax.jit(step, donate_argnums=(0, 1, 2))

    def run(x: Any, y: Any) -> Any:
        value, *state[:] = jitted(*state, x, y)
        return value

    return {"jax loop, optax": run}


def wait(value: Any) -> None:
    jax.block_until_ready(value)
