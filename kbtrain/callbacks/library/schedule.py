"""Moments of a run, counted in updates or epochs."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from kbtrain.callbacks.state import TrainerState
from kbtrain.errors import ConfigurationError

if TYPE_CHECKING:
    from kbtrain.config.training_args import TrainingArguments

logger = logging.getLogger("kbtrain")

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


def warn_without_logs(owner: str, args: TrainingArguments, state: TrainerState) -> None:
    """Warn when training begins if a callback that acts at logs of the training will see none.

    Args:
        owner: The callback.
        args: The settings of the run.
        state: Its length and the update it begins after.
    """
    if not state.is_world_process_zero or args.logging_strategy == "epoch":
        return
    if args.logging_first_step and state.global_step == 0:
        return
    if args.logging_strategy == "no":
        reason = "logging_strategy='no' turns them off. Set logging_strategy='steps'"
    elif 0 < state.max_steps < state.logging_steps * (state.global_step // state.logging_steps + 1):
        reason = (
            f"logging_steps={state.logging_steps}, and the run ends after {state.max_steps} "
            f"updates. Set logging_steps to {max(1, state.max_steps // 10)}, for example"
        )
    else:
        return
    logger.warning("%s acts at logs of the training, and there are none: %s.", owner, reason)
