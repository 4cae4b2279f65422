"""The report of a run, kept up to date while it lives."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kbtrain.callbacks.base import TrainerCallback
from kbtrain.callbacks.state import TrainerControl, TrainerState
from kbtrain.report.page import render
from kbtrain.report.recorder import update
from kbtrain.report.write import FILE_NAME
from kbtrain.utils.best_effort import best_effort
from kbtrain.utils.files.filesystem import replacing
from kbtrain.utils.timing import SparingPace

if TYPE_CHECKING:
    from kbtrain.config.training_args import TrainingArguments

logger = logging.getLogger("kbtrain")


class HtmlCallback(TrainerCallback):
    """Keep ``report.html`` in the output directory up to date.

    The page is replaced whole when the first update is about to run, after evaluations and logs (as
    often as takes at most a 50th of the time), and at the end. It loads itself again while the run
    lives. If writing fails (disk full, no permission), a warning is logged once, and it is tried
    again.
    """

    every_step = False
    decides_alike = True

    def __init__(self) -> None:
        self._trainer: Any = None
        self._pace = SparingPace()
        self._warned = self._replaces = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin; the page of the run before stays until no callback has refused this one."""
        self._trainer, self._warned, self._replaces = kwargs["trainer"], False, False

    @best_effort
    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the first page."""
        if self._trainer is not None and not self._replaces:
            self._replaces = True
            self._write(state, now=True)

    @best_effort
    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Bring the page up to date, if it is time to."""
        if self._trainer is not None:
            self._write(state, now=not self._trainer.is_in_train)

    @best_effort
    def on_predict(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the results of a test set."""
        if self._trainer is not None:
            self._write(state, now=True)

    def ended(self, ending: Any) -> None:
        """Write the last page, which no longer loads itself again."""
        if self._trainer is not None:
            self._replaces |= ending.completed
            self._write(self._trainer.state, now=True)

    def _write(self, state: TrainerState, now: bool) -> None:
        if not (self._replaces and state.is_world_process_zero):
            return
        if not (now or self._pace.is_due):
            return
        record, folder = self._trainer.record, Path(self._trainer.store.directory).absolute()
        with self._pace.spending():
            update(record, self._trainer, state)
            try:
                folder.mkdir(parents=True, exist_ok=True)
                with replacing(folder / FILE_NAME) as temporary:
                    temporary.write_text(render(record, refresh=True), encoding="utf-8")
            except OSError as error:
                if not self._warned:
                    logger.warning(
                        "The report could not be written: %s. Training continues; it is tried "
                        "again.",
                        error,
                    )
                self._warned = True
