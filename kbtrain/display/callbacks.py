"""The callbacks that show a run: they collect what happens and pass it to a view."""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
import time
from typing import TYPE_CHECKING, Any

from kbtrain.callbacks.base import TrainerCallback
from kbtrain.callbacks.state import TrainerControl, TrainerState
from kbtrain.display import format as text
from kbtrain.display.plain import PlainView
from kbtrain.display.view import Evaluation, Progress, View
from kbtrain.report.ending import RunEnding
from kbtrain.report.facts import facts_of
from kbtrain.utils.best_effort import best_effort
from kbtrain.utils.notebook import is_notebook
from kbtrain.utils.timing import without_durations

if TYPE_CHECKING:
    from kbtrain.config.training_args import TrainingArguments

INTERVAL = 0.1
"""Seconds between two looks at the progress."""

logger = logging.getLogger("kbtrain")


class _Display(TrainerCallback):
    """Collects the results of an evaluation over its sets, and tells a view what happens."""

    every_step = False
    decides_alike = True

    def __init__(self) -> None:
        self._view: View | None = None
        self._pending: Evaluation | None = None
        self._training: dict[str, Any] = {}
        self._batches = 0
        self._state: TrainerState | None = None
        self._waiting = False  # for the first update
        self._shown = 0.0
        self._trial = False

    def view(self) -> View:
        """The view, made when it is first used."""
        if self._view is None:
            self._view = self.make_view()
        return self._view

    def make_view(self) -> View:
        """The view of this callback."""
        return PlainView()

    # --- events -----------------------------------------------------------------------------------

    @best_effort
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show what the run is."""
        trainer = kwargs["trainer"]
        self._pending, self._training, self._state = None, {}, state
        self._trial, self._waiting = trainer.trial is not None, True
        self.view().begin(trainer, facts_of(trainer), self._trial)

    @best_effort
    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show an evaluation that is complete by now."""
        if self._pending is not None:
            self._flush()

    @best_effort
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the progress, not more often than can be seen."""
        now = time.monotonic()
        if now - self._shown < INTERVAL and not self._waiting:
            return
        self._shown, trainer = now, kwargs["trainer"]
        progress = Progress.of(trainer)
        if self._waiting:
            self._waiting = False
            self.view().first_update(progress, trainer.current_run.compile_seconds)
        self.view().progress(progress)

    @best_effort
    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the log of the training; evaluations come in ``on_evaluate``."""
        logs = text.printable(kwargs["logs"])
        own = {name: value for name, value in logs.items() if not _is_of_evaluation(name, logs)}
        own.pop("weights_step", None)  # of an evaluation after the run
        if not own.keys() - {"epoch"} or "train_runtime" in logs and "loss" not in logs:
            return
        self._flush()
        self._training = {**own, "step": state.global_step}
        if not self._trial:
            self.view().training_log(own, state.global_step, state.max_steps)

    @best_effort
    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Advance the bar of the evaluation, above which the progress stays as it was before."""
        if self._batches == 0 and kwargs["trainer"].is_in_train and not self._waiting:
            self.view().progress(Progress.of(kwargs["trainer"]))
        self._batches += kwargs["batches"]
        loader = kwargs["eval_dataloader"]
        total = len(loader) if getattr(loader, "sized", False) else None
        self.view().batches(self._batches, total)

    @best_effort
    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add the results of a set; they are shown when those of all sets are complete."""
        metrics, trainer = text.printable(kwargs["metrics"]), kwargs["trainer"]
        self._batches = 0
        if not trainer.is_in_train:
            if trainer.trial is None:
                self._alone(metrics, state)
            return
        self._state = state
        if self._pending is None or self._pending.step != state.global_step:
            self._flush()
            self._pending = Evaluation(state.global_step, state.max_steps, float(state.epoch))
            if self._training.get("step") == state.global_step:
                self._pending.training = self._training
        self._pending.metrics |= without_durations(metrics)
        self._pending.seconds += text.runtime(metrics)

    @best_effort
    def on_predict(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the results."""
        self._batches = 0
        if not kwargs["trainer"].is_in_train:
            self._alone(text.printable(kwargs["metrics"]), state)

    @best_effort
    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show an evaluation that is complete by now."""
        self._flush()

    @best_effort
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show an evaluation that is complete by now, and the last update."""
        self._flush()
        if not self._waiting:
            self.view().progress(Progress.of(kwargs["trainer"]))

    # --- what is told beside the events, see CallbackHandler.tell -------------------------------

    def phase(self, text: str) -> None:
        """Show what is being done."""
        self._batches = 0
        self.view().phase(text)

    def saving(self, name: str) -> None:
        """A checkpoint is being written."""
        if self._pending is not None:
            self._pending.saved = name
            self._flush()

    def idle(self) -> None:
        """An evaluation outside of ``fit`` is over, in whatever way."""
        self._batches = 0
        self.view().close()

    def notice(self, text: str) -> None:
        """Show a message at once; called from another thread."""
        self.view().notice(text)

    def ended(self, ending: RunEnding) -> None:
        """Show how the run ended."""
        self._flush()
        if not self._trial:
            self.view().end(ending)

    def close(self) -> None:
        """Leave the screen."""
        self._batches, self._pending = 0, None
        if self._view is not None:
            self._view.close()

    def _flush(self) -> None:
        """Show the evaluation whose results, rank and checkpoint are known by now."""
        if self._pending is None or self._state is None:
            return
        result, self._pending = self._pending, None
        result.best = self._state.best_global_step == result.step
        if self._trial:
            result = dataclasses.replace(result, metrics={})
        self.view().evaluation(result, in_training=True)

    def _alone(self, metrics: dict[str, Any], state: TrainerState) -> None:
        result = Evaluation(state.global_step, state.max_steps, float(state.epoch))
        result.metrics, result.seconds = without_durations(metrics), text.runtime(metrics)
        self.view().evaluation(result, in_training=False)


def _is_of_evaluation(name: str, logs: dict[str, Any]) -> bool:
    """Whether a logged value is a result of an evaluation: its log has the duration, too."""
    prefixes = [key.removesuffix("_runtime") for key in logs if key.endswith("_runtime")]
    return any(name.startswith(f"{prefix}_") for prefix in prefixes if prefix != "train")


class PrinterCallback(_Display):
    """Prints a run as lines to stderr: what it is, each log and evaluation, how it ended."""


class ProgressCallback(_Display):
    """Shows a run as it goes on: a bar on a terminal, a table in a notebook, else lines.

    Args:
        disable: True never shows it, False always does; None shows it where it can be drawn, on a
            terminal or in a notebook.
    """

    def __init__(self, disable: bool | None = None) -> None:
        super().__init__()
        self._disable = not can_draw() if disable is None else disable

    @property
    def is_disabled(self) -> bool:
        """Whether it never shows anything."""
        return self._disable

    def make_view(self) -> View:
        """A view for where the program runs."""
        if self._disable:
            return View()
        if is_terminal():
            from kbtrain.display.terminal import TerminalView

            return TerminalView()
        if is_notebook():
            from kbtrain.display.notebook import NotebookView

            return NotebookView()
        return PlainView()


def make_display(args: TrainingArguments) -> list[TrainerCallback]:
    """The callback that shows the run.

    None if the logger "kbtrain" is set to errors only, unless ``disable_tqdm=False``; and none in
    a process that does not log.
    """
    if not args.should_log:
        return []
    if args.disable_tqdm is not False and logger.getEffectiveLevel() > logging.WARNING:
        return []
    plain = not can_draw() if args.disable_tqdm is None else args.disable_tqdm
    return [PrinterCallback() if plain else ProgressCallback(disable=False)]


def can_draw() -> bool:
    """Whether a display can be redrawn: on a terminal or in a notebook."""
    return is_terminal() or is_notebook()


def is_terminal() -> bool:
    """Whether stderr is a terminal that understands control characters."""
    try:
        terminal = sys.stderr is not None and sys.stderr.isatty()  # None in a GUI program
    except (OSError, ValueError):  # it is closed
        terminal = False
    return terminal and os.environ.get("TERM", "") not in ("dumb", "unknown")
