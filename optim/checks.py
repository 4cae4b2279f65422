"""Checks of hyperparameters, with one wording for all optimizers."""

from numbers import Real
from typing import Any


def check_flag(name: str, value: Any) -> bool:
    """Check a hyperparameter that is either on or off.

    Args:
        name: the argument's name, for the message.
        value: what the user gave.

    Returns:
        The value.

    Raises:
        ValueError: if it is not a bool (``"False"`` would count as true).
    """
    if not isinstance(value, bool):
        raise ValueError(f"`{name}` must be True or False. Received: {name}={value!r}")
    return value


def check_closed(name: str, value: Any, low: float, high: float) -> float:
    """Check a hyperparameter against a closed range.

    Args:
        name: the argument's name, for the message.
        value: what the user gave.
        low: smallest allowed value.
        high: largest allowed value.

    Returns:
        The value as a float.

    Raises:
        ValueError: if it is not a number in ``[low, high]``.
    """
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not (number and low <= value <= high):
        raise ValueError(
            f"`{name}` must be a number in [{low}, {high}]. Received: {name}={value!r}"
        )
    return float(value)
