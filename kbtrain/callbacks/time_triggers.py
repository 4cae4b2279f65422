"""Evaluating and saving by the clock: ``eval_minutes`` and ``save_minutes``."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from kbtrain.callbacks.base import TrainerCallback
from kbtrain.callbacks.state import TrainerControl, TrainerState

if TYPE_CHECKING:
    from kbtrain.config.training_args import TrainingArguments


def callbacks(args: TrainingArguments) -> list[TrainerCallback]:
    """The callback, if one of the two intervals is set."""
    clocks = (args.eval_minutes, args.save_minutes)
    return [TimedCallback()] if any(minutes is not None for minutes in clocks) else []


class TimedCallback(TrainerCallback):
    """Requests an evaluation or a checkpoint a given time after the last one.

    Those of the strategies count too: any checkpoint restarts the interval. The clock is checked
    between two calls to the device, a tenth of a second or one update apart. The updates at which
    this happens depend on the speed of the machine, so two runs evaluate and save at different
    updates; the training itself is the same.
    """

    every_step = False

    def __init__(self) -> None:
        self._evaluated = self._saved = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start both clocks."""
        self._evaluated = self._saved = time.monotonic()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Request what is due."""
        now = time.monotonic()
        if args.eval_minutes is not None and now - self._evaluated >= 60 * args.eval_minutes:
            control.should_evaluate = True
        if args.save_minutes is not None and now - self._saved >= 60 * args.save_minutes:
            control.should_save = True

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restart the interval; the time of the evaluation itself does not count."""
        self._evaluated = time.monotonic()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restart the interval."""
        self._saved = time.monotonic()
