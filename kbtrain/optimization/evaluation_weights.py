"""Optimizers that evaluate other weights than they train: averages of them, mostly.

Two kinds are known, by what they offer and not by their class: those with
``swap_in_evaluation_weights()`` and ``swap_back()`` (see `optim.Optimizer`), and Keras' own with
``use_ema=True``. Either may sit inside a wrapper, as in ``keras.optimizers.LossScaleOptimizer``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import keras

from kbtrain.utils.fallback import PrivateApi


@contextlib.contextmanager
def swapped_in(optimizer: Any, variables: Sequence[keras.Variable]) -> Iterator[bool]:
    """Inside, the model's variables hold the weights to evaluate; afterwards what they held before.

    Args:
        optimizer: The one that trains the model, or None.
        variables: Those of the model.

    Yields:
        Whether there are such weights; without them nothing happens.
    """
    source = _source(optimizer)
    if source is None:
        yield False
    elif hasattr(source, "swap_in_evaluation_weights"):
        swapped = source.swap_in_evaluation_weights()
        try:
            yield swapped
        finally:
            if swapped:
                source.swap_back()
    else:
        pairs = averages_of(source, variables)
        before = [_copy(variable) for variable, _ in pairs]
        for variable, average in pairs:
            variable.assign(_copy(average))
        try:
            yield True
        finally:
            for (variable, _), value in zip(pairs, before, strict=True):
                variable.assign(value)


def finalize(optimizer: Any, variables: list[keras.Variable]) -> None:
    """Make the weights to evaluate the trained ones, as Keras does at the end of ``fit``."""
    source = _source(optimizer)
    if source is not None and not hasattr(source, "swap_in_evaluation_weights"):
        # Keras' own average: on TensorFlow it cannot leave out variables that have none.
        for variable, average in averages_of(source, variables):
            variable.assign(_copy(average))
        return
    before = [variable.value for variable in variables]
    optimizer.finalize_variable_values(variables)
    for variable, value in zip(variables, before, strict=True):
        if variable.value is not value:  # it may be the optimizer's own, not a copy of it
            variable.assign(_copy(variable))


def _pairs(source: Any, variables: Sequence[keras.Variable]) -> list[tuple[keras.Variable, Any]]:
    averages = source._model_variables_moving_average
    pairs = zip(source._trainable_variables, averages, strict=True)
    return [(variable, average) for variable, average in pairs if average is not None]


def _tried(source: Any, variables: Sequence[keras.Variable]) -> list[tuple[keras.Variable, Any]]:
    """Let Keras put the averages in, look at them, and take that back."""
    trained = [variable for variable in variables if variable.trainable]
    before = [_copy(variable) for variable in trained]
    source.finalize_variable_values(trained)
    averages = [SimpleNamespace(value=_copy(variable)) for variable in trained]
    for variable, value in zip(trained, before, strict=True):
        variable.assign(value)
    return list(zip(trained, averages, strict=True))


averages_of = PrivateApi(
    "Finding the averages of an optimizer with use_ema",
    "keras",
    _pairs,
    _tried,
    "They are taken from what finalize_variable_values makes of the weights.",
)
"""Variables with their averages, of an optimizer of Keras' with ``use_ema``."""


def _copy(variable: keras.Variable) -> Any:
    """Its value in memory of its own: JAX donates what a step reads, shared or not."""
    return keras.ops.copy(variable.value)


def _source(optimizer: Any) -> Any:
    """The optimizer that has such weights: this one or one inside it; None if there is none."""
    while optimizer is not None and optimizer.built:
        if hasattr(optimizer, "swap_in_evaluation_weights") or optimizer.use_ema:
            return optimizer
        optimizer = getattr(optimizer, "inner_optimizer", None)
    return None
