"""Checks of hyperparameters, with one wording for all optimizers and schedules."""

from __future__ import annotations

import math
import re
from numbers import Real
from typing import Any


def check_flag(name: str, value: Any) -> bool:
    """Check a hyperparameter that is either on or off.

    Args:
        name: The argument's name, for the message.
        value: What the user gave.

    Returns:
        The value.

    Raises:
        ValueError: If it is not a bool (``"False"`` would count as true).
    """
    if not isinstance(value, bool):
        raise ValueError(f"`{name}` must be True or False. Received: {name}={value!r}")
    return value


def check_closed(name: str, value: Any, low: float, high: float) -> float:
    """Check a hyperparameter against a closed range.

    Args:
        name: The argument's name, for the message.
        value: What the user gave.
        low: Smallest allowed value.
        high: Largest allowed value.

    Returns:
        The value as a float.

    Raises:
        ValueError: If it is not a number in ``[low, high]``.
    """
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not (number and low <= value <= high):
        raise ValueError(
            f"`{name}` must be a number in [{low}, {high}]. Received: {name}={value!r}"
        )
    return float(value)


def check_range(name: str, value: Any, low: float, high: float = float("inf")) -> float:
    """Check a hyperparameter against a half-open range.

    Args:
        name: The argument's name, for the message.
        value: What the user gave.
        low: Smallest allowed value.
        high: The value has to be below this.

    Returns:
        The value as a float.

    Raises:
        ValueError: If it is not a number in ``[low, high)``.
    """
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not (number and low <= value < high):
        raise ValueError(
            f"`{name}` must be a number in [{low}, {high}). Received: {name}={value!r}"
        )
    return float(value)


def check_count(name: str, value: Any, low: int) -> int:
    """Check a number of steps.

    Args:
        name: The argument's name, for the message.
        value: What the user gave.
        low: Smallest allowed value.

    Returns:
        The value as an int.

    Raises:
        ValueError: If it is not a whole number of at least ``low``.
    """
    number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value < low or value != math.floor(value):
        raise ValueError(
            f"`{name}` must be a whole number of steps, at least {low}. Received: {name}={value!r}"
        )
    return int(value)


def check_integer(name: str, value: Any, low: int) -> int:
    """Check a hyperparameter that is a whole number.

    Args:
        name: The argument's name, for the message.
        value: What the user gave.
        low: Smallest allowed value.

    Returns:
        The value.

    Raises:
        ValueError: If it is not an integer of at least ``low``.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"`{name}` must be an integer >= {low}. Received: {name}={value!r}")
    return value


def check_gradient(gradient: Any, variable: Any) -> None:
    """Check that a gradient can be that of a variable.

    Every gradient is checked: some would be broadcast, and a fused kernel would read beyond the end
    of one that is too short.

    Args:
        gradient: A tensor.
        variable: The variable it was given for.

    Raises:
        ValueError: If their shapes differ.
    """
    try:
        shape = gradient.shape
    except AttributeError:  # TensorFlow's IndexedSlices, made with a tuple for its shape
        shape = tuple(gradient.dense_shape)
    if shape == variable.shape:
        return
    # A traced shape may be only partly known.
    fits = getattr(shape, "is_compatible_with", None)
    if fits is None or not fits(variable.shape):
        name = getattr(variable, "path", None) or variable.name
        raise ValueError(
            f"The gradient for {name!r} must have the shape of the variable, "
            f"{tuple(variable.shape)}: gradients are taken in the order of the variables. "
            f"Received: a gradient of shape {tuple(shape)}"
        )


def check_pattern(name: str, value: Any) -> str:
    """Check a regular expression.

    Args:
        name: The argument's name, for the message.
        value: What the user gave.

    Returns:
        The value.

    Raises:
        ValueError: If it is not a regular expression.
    """
    try:
        if not isinstance(value, str):
            raise TypeError("it is not a string")
        re.compile(value)
    except (re.error, TypeError) as error:
        raise ValueError(
            f"`{name}` must be a regular expression ({error}). Received: {name}={value!r}"
        ) from None
    return value
