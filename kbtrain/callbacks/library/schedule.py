"""Moments of a run, counted in updates or epochs."""

from __future__ import annotations

from typing import Any

from kbtrain.errors import ConfigurationError

UNITS = ("steps", "epochs")


def check_unit(unit: Any, owner: str) -> str:
    """Check a unit.

    Args:
        unit: "steps" or "epochs".
        owner: The callback that it was passed to.

    Raises:
        ConfigurationError: It is neither.
    """
    if unit not in UNITS:
        raise ConfigurationError(
            f"{owner}: unit must be 'steps' (updates) or 'epochs'. Received: unit={unit!r}."
        )
    return str(unit)


def check_count(value: Any, name: str, owner: str, least: int = 0) -> int:
    """Check a number of updates or epochs.

    Raises:
        ConfigurationError: It is no whole number of at least ``least``.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigurationError(
            f"{owner}: {name} must be a whole number of at least {least}. "
            f"Received: {name}={value!r}."
        )
    return value


def epochs_done(trainer: Any) -> int:
    """The number of complete epochs."""
    return int(trainer.current_run.progress.epoch)


def is_between_epochs(trainer: Any) -> bool:
    """Whether no epoch is in progress."""
    return bool(trainer.current_run.progress.batch == 0)
