"""Optimizers that evaluate with weights other than the trained ones, usually averages.

Two kinds are supported, recognised by their interface and not by class: those with
``swap_in_evaluation_weights()`` and ``swap_back()`` (see ``optim.Optimizer``), and optimizers of
Keras with ``use_ema=True``. Either may be wrapped, as by ``keras.optimizers.LossScaleOptimizer``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import keras

from kbtrain.optimization.division import division_of
from kbtrain.utils.fallback import PrivateApi


@contextlib.contextmanager
def swapped_in(optimizer: Any, variables: Sequence[keras.Variable]) -> Iterator[bool]:
    """Context in which the model's variables hold the evaluation weights; then they are restored.

    Args:
        optimizer: The optimizer that trains the model, or None.
        variables: The model's variables.

    Yields:
        Whether there are evaluation weights; if not, nothing is changed.
    """
    source, division = _source(optimizer), division_of(optimizer)
    if source is None:
        yield False
    elif division is not None:
        others = division.others([v for v in variables if v.trainable])
        before = [_copy(v) for v in others]
        with _own_swapped_in(source, variables) as swapped:
            swapped = any(division.gather(swapped))
            if swapped:
                division.distribute([v for v in variables if v.trainable])
            try:
                yield swapped
            finally:
                for variable, value in zip(others, before, strict=True):
                    variable.assign(value)
    else:
        with _own_swapped_in(source, variables) as swapped:
            yield swapped


@contextlib.contextmanager
def _own_swapped_in(source: Any, variables: Sequence[keras.Variable]) -> Iterator[bool]:
    """``swapped_in`` for the variables that the optimizer updates in this process."""
    if hasattr(source, "swap_in_evaluation_weights"):
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
    """Assign the evaluation weights permanently, as Keras does at the end of ``fit``."""
    _finalize_own(optimizer, variables)
    if (division := division_of(optimizer)) is not None and _source(optimizer) is not None:
        division.distribute(variables)


def _finalize_own(optimizer: Any, variables: list[keras.Variable]) -> None:
    source = _source(optimizer)
    if source is not None and not hasattr(source, "swap_in_evaluation_weights"):
        # Keras' own method fails on TensorFlow for variables without an average.
        for variable, average in averages_of(source, variables):
            variable.assign(_copy(average))
        return
    before = [variable.value for variable in variables]
    optimizer.finalize_variable_values(variables)
    for variable, value in zip(variables, before, strict=True):
        if variable.value is not value:  # the new value may be the optimizer's tensor itself
            variable.assign(_copy(variable))


def _pairs(source: Any, variables: Sequence[keras.Variable]) -> list[tuple[keras.Variable, Any]]:
    averages = source._model_variables_moving_average
    pairs = zip(source._trainable_variables, averages, strict=True)
    return [(variable, average) for variable, average in pairs if average is not None]


def _tried(source: Any, variables: Sequence[keras.Variable]) -> list[tuple[keras.Variable, Any]]:
    """Read the averages by letting Keras assign them, then restore the weights."""
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
    "They are read from the weights after finalize_variable_values.",
)
"""The variables and their averages, of a Keras optimizer with ``use_ema``."""


def _copy(variable: keras.Variable) -> Any:
    """A copy of the value in separate memory: JAX donates the buffers that a step reads."""
    return keras.ops.copy(variable.value)


def _source(optimizer: Any) -> Any:
    """The optimizer that has evaluation weights, this one or one it wraps, or None."""
    while optimizer is not None and optimizer.built:
        if hasattr(optimizer, "swap_in_evaluation_weights") or optimizer.use_ema:
            return optimizer
        optimizer = getattr(optimizer, "inner_optimizer", None)
    return None
