"""Hand-written JAX programs of a Keras model: jit, gradients, optax, donated state.

Each function takes a model and gives its ``Step``. They return what a training script logs, too:
the loss and the norm of the gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import keras
import optax


@dataclass(frozen=True)
class Step:
    """A step to jit.

    Attributes:
        run: ``run(*state, x, y)``.
        state: Its state.
        donated: Number of the first parts of the state that it returns anew.
    """

    run: Callable[..., Any]
    state: tuple[Any, ...]
    donated: int


RATE = optax.linear_schedule(5e-5, 0.0, 1000)
"""The learning rate falls to zero, as it does in kbtrain's runs unless told otherwise."""

OPTIMIZER = optax.adamw(RATE, weight_decay=0.01)


def _state(model: keras.Model) -> tuple[list[Any], list[Any], Any]:
    trainable = [v.value for v in model.trainable_variables]
    fixed = [v.value for v in model.non_trainable_variables]
    return trainable, fixed, OPTIMIZER.init(trainable)


def _loss(y: Any, logits: Any) -> Any:
    logits = logits.astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def _gradients(
    model: keras.Model, trainable: Any, fixed: Any, x: Any, y: Any, scale: Any = 1.0
) -> tuple[Any, Any, Any]:
    """The loss, the new fixed values, and the gradients of the loss times ``scale``."""

    def objective(trainable: Any) -> Any:
        logits, new = model.stateless_call(trainable, fixed, x, training=True)
        value = _loss(y, logits)
        return value * scale, (value, new)

    (_, (value, new)), gradients = jax.value_and_grad(objective, has_aux=True)(trainable)
    return value, new, gradients


def _updated(gradients: Any, slots: Any, trainable: Any) -> tuple[Any, Any]:
    updates, slots = OPTIMIZER.update(gradients, slots, trainable)
    return optax.apply_updates(trainable, updates), slots


def _if(good: Any, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)


def _clipped(gradients: Any, norm: Any) -> Any:
    factor = jnp.minimum(1.0, 1.0 / (norm + 1e-6))
    return jax.tree.map(lambda g: g * factor, gradients)


def plain(model: keras.Model) -> Step:
    """Loss, gradients, AdamW."""

    def run(trainable: Any, fixed: Any, slots: Any, x: Any, y: Any) -> Any:
        value, fixed, gradients = _gradients(model, trainable, fixed, x, y)
        norm = optax.global_norm(gradients)
        trainable, slots = _updated(gradients, slots, trainable)
        return trainable, fixed, slots, value, norm

    return Step(run, _state(model), 3)


def clipping(model: keras.Model) -> Step:
    """The same with gradients clipped by their global norm."""

    def run(trainable: Any, fixed: Any, slots: Any, x: Any, y: Any) -> Any:
        value, fixed, gradients = _gradients(model, trainable, fixed, x, y)
        norm = optax.global_norm(gradients)
        trainable, slots = _updated(_clipped(gradients, norm), slots, trainable)
        return trainable, fixed, slots, value, norm

    return Step(run, _state(model), 3)


def checking(model: keras.Model) -> Step:
    """The same, and an update whose loss or gradients are not finite changes nothing."""

    def run(trainable: Any, fixed: Any, slots: Any, x: Any, y: Any) -> Any:
        value, new_fixed, gradients = _gradients(model, trainable, fixed, x, y)
        norm = optax.global_norm(gradients)
        new = _updated(_clipped(gradients, norm), slots, trainable)
        good = jnp.isfinite(norm) & jnp.isfinite(value)
        trainable, slots = _if(good, new, (trainable, slots))
        return trainable, _if(good, new_fixed, fixed), slots, value, norm

    return Step(run, _state(model), 3)


def accumulating(model: keras.Model) -> Step:
    """Gradients of several micro-batches are added up, then clipped and checked."""

    def run(trainable: Any, fixed: Any, slots: Any, x: Any, y: Any) -> Any:
        def add(carry: Any, batch: Any) -> Any:
            fixed, total = carry
            value, fixed, new = _gradients(model, trainable, fixed, *batch)
            return (fixed, jax.tree.map(jnp.add, total, new)), value

        zeros = jax.tree.map(jnp.zeros_like, trainable)
        (new_fixed, gradients), values = jax.lax.scan(add, (fixed, zeros), (x, y))
        gradients = jax.tree.map(lambda g: g / len(x), gradients)
        norm, value = optax.global_norm(gradients), values.mean()
        new = _updated(_clipped(gradients, norm), slots, trainable)
        good = jnp.isfinite(norm) & jnp.isfinite(value)
        trainable, slots = _if(good, new, (trainable, slots))
        return trainable, _if(good, new_fixed, fixed), slots, value, norm

    return Step(run, _state(model), 3)


def scaling_losses(model: keras.Model) -> Step:
    """A dynamic loss scale: halved after an overflow, doubled after 2,000 good updates."""
    scale = jnp.float32(2.0**15), jnp.int32(0)

    def run(trainable: Any, fixed: Any, slots: Any, scale: Any, x: Any, y: Any) -> Any:
        factor, since = scale
        value, new_fixed, gradients = _gradients(model, trainable, fixed, x, y, factor)
        gradients = jax.tree.map(lambda g: g / factor, gradients)
        norm = optax.global_norm(gradients)
        good = jnp.isfinite(norm)
        new = _updated(_clipped(gradients, norm), slots, trainable)
        trainable, slots, fixed = _if(good, (*new, new_fixed), (trainable, slots, fixed))
        grows = since >= 1999
        factor = jnp.where(good, jnp.where(grows, factor * 2, factor), factor / 2)
        since = jnp.where(good & ~grows, since + 1, 0)
        return trainable, fixed, slots, (factor, since), value, norm

    return Step(run, (*_state(model), scale), 4)


def averaging(model: keras.Model) -> Step:
    """An exponential moving average of the weights."""
    state = _state(model)

    def run(trainable: Any, fixed: Any, slots: Any, average: Any, x: Any, y: Any) -> Any:
        value, new_fixed, gradients = _gradients(model, trainable, fixed, x, y)
        norm = optax.global_norm(gradients)
        trained, new_slots = _updated(_clipped(gradients, norm), slots, trainable)
        new = trained, new_slots, optax.incremental_update(trained, average, 0.001)
        good = jnp.isfinite(norm) & jnp.isfinite(value)
        trainable, slots, average = _if(good, new, (trainable, slots, average))
        return trainable, _if(good, new_fixed, fixed), slots, average, value, norm

    return Step(run, (*state, list(state[0])), 4)


def recomputing(model: keras.Model) -> Step:
    """The activations inside of blocks are computed again in the backward pass."""
    hidden = [layer for layer in model.layers if layer.weights]

    def forward(trainable: Any, x: Any) -> Any:
        values = iter(trainable)
        for layer in hidden:
            own = [next(values) for _ in layer.trainable_variables]

            def call(own: Any, x: Any, layer: Any = layer) -> Any:
                return layer.stateless_call(own, [], x)[0]

            if layer.name.startswith("block"):
                call = jax.checkpoint(call)
            x = call(own, x)
        return x

    def run(trainable: Any, fixed: Any, slots: Any, x: Any, y: Any) -> Any:
        def objective(trainable: Any) -> Any:
            return _loss(y, forward(trainable, x))

        value, gradients = jax.value_and_grad(objective)(trainable)
        norm = optax.global_norm(gradients)
        new = _updated(_clipped(gradients, norm), slots, trainable)
        good = jnp.isfinite(norm) & jnp.isfinite(value)
        trainable, slots = _if(good, new, (trainable, slots))
        return trainable, fixed, slots, value, norm

    return Step(run, _state(model), 3)


def evaluating(model: keras.Model) -> Step:
    """The sum of losses and their number."""
    trainable, fixed, _ = _state(model)

    def run(trainable: Any, fixed: Any, x: Any, y: Any) -> Any:
        logits, _ = model.stateless_call(trainable, fixed, x, training=False)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), y)
        return losses.sum(), jnp.float32(losses.size)

    return Step(run, (trainable, fixed), 0)


def several(step: Step) -> Step:
    """The batches of a block one after the other: a TPU runs the loop without its host.

    Args:
        step: The step of a batch.

    Returns:
        A step that takes batches along a leading axis and, last, how many of them to run. Its
        results other than the state have that axis, too.
    """

    def run(*arguments: Any) -> Any:
        *state, x, y, count = arguments
        fixed = state[step.donated :]

        def one(state: Any, index: Any) -> tuple[Any, Any]:
            row = (jax.lax.dynamic_index_in_dim(a, index, keepdims=False) for a in (x, y))
            results = step.run(*state, *fixed, *row)
            return results[: step.donated], results[step.donated :]

        def body(loop: Any) -> Any:
            index, state, results = loop
            state, new = one(state, index)
            return index + 1, state, jax.tree.map(lambda a, b: a.at[index].set(b), results, new)

        given = tuple(state[: step.donated])
        shapes = jax.eval_shape(one, given, jnp.int32(0))[1]
        results = jax.tree.map(lambda s: jnp.zeros((len(x), *s.shape), s.dtype), shapes)
        start = jnp.int32(0), given, results
        _, given, results = jax.lax.while_loop(lambda loop: loop[0] < count, body, start)
        return *given, *results

    return Step(run, step.state, step.donated)
