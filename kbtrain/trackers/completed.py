"""Detects a completed run that is started again: it trains nothing and logs no new summary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kbtrain.callbacks.state import TrainerState


def nothing_to_do(state: TrainerState, given: Mapping[str, Any]) -> bool:
    """Whether a training that starts is already complete.

    Args:
        state: The run's state at ``on_train_begin``.
        given: The keyword arguments of the event.
    """
    run = getattr(given.get("trainer"), "current_run", None)
    unfinished = run is not None and run.progress.unfinished is not None
    return 0 < state.max_steps <= state.global_step and not unfinished


def is_summary(logs: Mapping[str, Any]) -> bool:
    """Whether a log is the one at the end of ``fit``, with the speed and the mean loss."""
    return "train_runtime" in logs and "train_loss" in logs
