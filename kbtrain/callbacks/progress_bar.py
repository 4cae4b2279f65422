"""Shows a run's progress: a progress bar on a terminal or in a notebook, else lines of logs."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from kbtrain.callbacks.base import TrainerCallback
from kbtrain.callbacks.state import TrainerControl, TrainerState
from kbtrain.utils.best_effort import best_effort, print_line

if TYPE_CHECKING:
    from kbtrain.config.training_args import TrainingArguments

logger = logging.getLogger("kbtrain")


class PrinterCallback(TrainerCallback):
    """Prints every log as a line to stderr."""

    decides_alike = True

    @best_effort
    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Print one line."""
        shown = [
            f"{n} {v:.4g}" if isinstance(v, float) else f"{n} {v}"
            for n, v in kwargs["logs"].items()
        ]
        of = f"/{state.max_steps}" if state.max_steps else ""
        print_line(f"step {state.global_step}{of}: {', '.join(shown)}")


def display(args: TrainingArguments) -> list[TrainerCallback]:
    """The callback that shows progress: a bar where one can be drawn, else the logs as lines.

    None if the logger "kbtrain" is set to errors only, unless ``disable_tqdm=False``; and none in
    a process that does not log.
    """
    if not args.should_log:
        return []
    disabled = not _can_draw() if args.disable_tqdm is None else args.disable_tqdm
    if args.disable_tqdm is not False and logger.getEffectiveLevel() > logging.WARNING:
        return []
    return [PrinterCallback() if disabled else ProgressCallback(disable=False)]


def _can_draw() -> bool:
    """Whether a progress bar can be drawn: on a terminal or in a notebook."""
    try:
        terminal = sys.stderr is not None and sys.stderr.isatty()  # None in a GUI program
    except (OSError, ValueError):  # it is closed
        terminal = False
    return terminal or "ipykernel" in sys.modules


class ProgressCallback(TrainerCallback):
    """A progress bar with loss, learning rate, steps per second and remaining time.

    Args:
        disable: True never shows it, False always does; None shows it where it can be drawn, on a
            terminal or in a notebook.
    """

    every_step = False
    decides_alike = True

    def __init__(self, disable: bool | None = None) -> None:
        self._disable = not _can_draw() if disable is None else disable
        self._bar: Any = None
        self._evaluation: Any = None

    @best_effort
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the bar."""
        if not self._disable:
            self._bar = tqdm(
                total=state.max_steps or None, initial=state.global_step, dynamic_ncols=True
            )

    @best_effort
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Advance the bar."""
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    @best_effort
    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Advance the bar of the evaluation."""
        if self._disable:
            return
        if self._evaluation is None:
            self._evaluation = tqdm(leave=self._bar is None, dynamic_ncols=True, unit="batch")
        self._evaluation.update(kwargs["batches"])

    @best_effort
    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remove the bar of the evaluation."""
        self._close_evaluation()

    @best_effort
    def on_predict(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remove the bar of the prediction."""
        self._close_evaluation()

    @best_effort
    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the newest loss, learning rate and evaluation loss beside the bar."""
        if self._bar is not None:
            logs = kwargs["logs"]
            names = {"loss": "loss", "learning_rate": "lr", "eval_loss": "eval_loss"}
            shown = {new: f"{logs[old]:.4g}" for old, new in names.items() if old in logs}
            if shown:
                self._bar.set_postfix(shown)

    @best_effort
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the finished bar on the screen."""
        self.close()

    def _close_evaluation(self) -> None:
        if self._evaluation is not None:
            self._evaluation.close()
            self._evaluation = None

    def close(self) -> None:
        """Close both bars."""
        self._close_evaluation()
        if self._bar is not None:
            self._bar.close()
            self._bar = None
