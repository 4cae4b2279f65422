"""JAX: custom steps of a model, called as by Keras' trainer for JAX: stateless."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import keras

from kbtrain.errors import ConfigurationError


def check_signature(model: keras.Model, name: str) -> None:
    """Check that a step has the signature that Keras uses here.

    Raises:
        ConfigurationError: It does not take state and batch.
    """
    try:
        inspect.signature(getattr(model, name)).bind(None, None)
    except TypeError as problem:
        raise ConfigurationError(
            f"{type(model).__name__}.{name} must be defined as {name}(self, state, data) and "
            f"return (logs, state), as Keras calls it on JAX: {problem}. (The form with data alone "
            "is that of PyTorch and TensorFlow.) See Keras' guide on custom train steps in JAX; "
            "or override Trainer.compute_loss, which is the same on all backends."
        ) from None


def run_train_step(model: keras.Model, data: Any) -> Any:
    """Run one update."""
    optimizer = model.optimizer
    return _run(
        model,
        "train_step",
        data,
        [
            model.trainable_variables,
            model.non_trainable_variables,
            [] if optimizer is None else optimizer.variables,
            model.metrics_variables,
        ],
    )


def try_train_step(model: keras.Model, data: Any) -> None:
    """Create the variables of the step, which on JAX can only be those of the optimizer."""
    if model.optimizer is not None and not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)


def run_test_step(model: keras.Model, data: Any) -> Any:
    """Update the metrics with one batch."""
    return _run(
        model,
        "test_step",
        data,
        [model.trainable_variables, model.non_trainable_variables, model.metrics_variables],
    )


def run_predict_step(model: keras.Model, data: Any) -> Any:
    """Compute the outputs for one batch."""
    state = model.trainable_variables, model.non_trainable_variables
    result = model.predict_step(tuple(_values(part) for part in state), data)
    is_pair = isinstance(result, tuple) and len(result) == 2
    # Outputs alone may be a pair, too, of tensors.
    if not is_pair or not isinstance(result[1], list | tuple) or len(result[1]) != len(state[1]):
        raise ConfigurationError(
            f"{type(model).__name__}.predict_step must return (outputs, non_trainable_variables) "
            f"on JAX, the latter as a list of {len(state[1])} values, as it received them. "
            f"Received: {type(result).__name__}."
        )
    return result[0]


def _run(
    model: keras.Model, name: str, data: Any, parts: Sequence[Sequence[keras.Variable]]
) -> Any:
    result = getattr(model, name)(tuple(_values(part) for part in parts), data)
    sizes = [len(part) for part in parts]
    try:
        logs, state = result
        found = [len(part) for part in state]
    except (TypeError, ValueError):
        found = None
    if found != sizes:
        raise ConfigurationError(
            f"{type(model).__name__}.{name} must return (logs, state) on JAX, the state in the "
            f"form it received: lists of {sizes} values. Received: "
            + (type(result).__name__ if found is None else f"lists of {found} values")
            + "."
        )
    for part, values in zip(parts, state, strict=True):
        for variable, value in zip(part, values, strict=True):
            variable.assign(value)
    return logs


def _values(variables: Sequence[keras.Variable]) -> list[Any]:
    return [variable.value for variable in variables]


def reversible(
    fn: Callable[[], Any], variables: Sequence[keras.Variable]
) -> tuple[Any, Callable[[Any], None]]:
    """Run ``fn``; return its result and ``undo_if(condition)``, which reverts its changes."""
    before = _values(variables)
    result = fn()

    def undo_if(condition: Any) -> None:
        for variable, old in zip(variables, before, strict=True):
            if variable.value is not old:
                variable.assign(jnp.where(condition, old, variable.value))

    return result, undo_if
