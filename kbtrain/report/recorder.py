"""The callback that keeps the record of a run, and writes it to ``run.json``."""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kbtrain.callbacks.base import TrainerCallback, evaluation_name
from kbtrain.callbacks.state import TrainerControl, TrainerState
from kbtrain.report.ending import RunEnding
from kbtrain.report.facts import facts_of
from kbtrain.report.record import FILE_NAME, RunRecord, on_curves
from kbtrain.utils.best_effort import best_effort
from kbtrain.utils.timing import SparingPace

if TYPE_CHECKING:
    from kbtrain.config.training_args import TrainingArguments

from kbtrain.report.run_warnings import WarningCollector

logger = logging.getLogger("kbtrain")

FILE_TRACKERS = ("csv", "html", "json", "tensorboard")
"""Names in ``report_to`` that mean files in ``output_dir``."""

MAX_LAYERS = 300


class RecordCallback(TrainerCallback):
    """Keeps ``trainer.record``, and writes it where the run writes files anyhow.

    That is with checkpoints, or with a log file in ``report_to``. It is written when the first
    update is about to run (a ``fit`` that is refused before leaves the record of the run before as
    it is), after evaluations, from time to time, and at the end; only by process 0. If that fails,
    a warning is logged once and the run continues.
    """

    is_best_effort = True
    every_step = False
    decides_alike = True

    def __init__(self) -> None:
        self.record = RunRecord()
        self._collector = WarningCollector(self._warned)
        self._early: list[tuple[str, str]] | None = None  # warnings before the first update
        self._trainer: Any = None
        self._pace, self._last = SparingPace(), 0.0
        self._steps = 0
        self._in_session = self._failed = self._replaces = False

    # --- the parts of a run -----------------------------------------------------------------------

    def phase(self, text: str) -> None:
        """``fit`` has begun: collect warnings from here on."""
        if self._early is None and not self._in_session:
            self._early = []
            self._collector.start()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin a session: a new record, or the one of the run that is resumed."""
        if not state.is_world_process_zero:
            return
        trainer = self._trainer = kwargs["trainer"]
        again = self._in_session  # a smaller micro-batch: the first attempt did not fit
        older = self._older(trainer, state) if state.global_step and not again else self.record
        self.record = trainer.record = RunRecord()
        self._in_session, self._steps = True, state.global_step
        self._replaces = False
        early, self._early = self._early or [], None
        for level, text in early:
            self.record.add_warning(level, text, state.global_step)
        if again:  # what that attempt warned of is of this run
            older.warnings = [{**w, "step": state.global_step} for w in older.warnings]
        if state.global_step or again:
            self.record.continue_from(older, state.global_step, state.log_history)
            if again:
                del self.record.sessions[-1:]
        facts = facts_of(trainer).to_dict()
        self.record.facts, self.record.arguments = facts, args.to_dict()
        self.record.layers = layers_of(trainer.model)
        self.record.sessions.append({"facts": facts, "ending": None})
        self.record.live = True
        self._last = time.monotonic()

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the record before the first update: no callback has refused the run."""
        if self._trainer is not None and not self._replaces:
            self._replaces = True
            self._write(state, now=True)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add the log, with the speed since the one before."""
        if not state.is_world_process_zero or self._trainer is None:
            return
        if on_curves(kwargs["logs"]):
            self.record.add_log({**kwargs["logs"], "step": state.global_step})
        if not self._in_session:  # an evaluation after the run
            self._write(state, now=True)
            return
        now, steps = time.monotonic(), state.global_step - self._steps
        if "loss" in kwargs["logs"] and steps > 0 and now > self._last:
            rate = steps * self.record.facts["batch_size"] / (now - self._last)
            self.record.add_throughput(state.global_step, rate)
        self._last, self._steps = now, state.global_step
        self._write(state)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the results; what evaluating took is not the speed of training."""
        self._last = time.monotonic()

    def on_predict(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep the results of a test set, which are in no log."""
        if state.is_world_process_zero and self._trainer is not None and kwargs["metrics"]:
            numbers = {k: v for k, v in kwargs["metrics"].items() if isinstance(v, int | float)}
            self.record.tests = numbers
            if not self._in_session:
                self._write(state, now=True)

    def ended(self, ending: RunEnding) -> None:
        """End the session."""
        if self._trainer is None or not self._in_session:
            return
        self.record.sessions[-1]["ending"] = ending.to_dict()
        self.record.live = False
        self._replaces |= ending.completed
        self._write(self._trainer.state, now=True)

    def close(self) -> None:
        """``fit`` is over."""
        self._collector.stop()
        self._in_session, self._early = False, None

    # --- the file ---------------------------------------------------------------------------------

    def _warned(self, level: str, text: str) -> None:
        if self._in_session and self._trainer is not None:
            self.record.add_warning(level, text, int(self._trainer.state.global_step))
        elif self._early is not None and len(self._early) < 100:
            self._early.append((level, text))

    def _older(self, trainer: Any, state: TrainerState) -> RunRecord:
        """The record of the run that is resumed, beside its checkpoint; empty if there is none."""
        resumed, own = trainer.resumed_from, Path(trainer.store.directory)
        path = (own if resumed is None else Path(resumed).absolute().parent) / FILE_NAME
        try:
            return RunRecord.load(path)
        except FileNotFoundError:
            return RunRecord()
        except (OSError, ValueError) as error:
            aside = own / f"{FILE_NAME}.damaged"
            with contextlib.suppress(OSError):
                (own / FILE_NAME).replace(aside)  # it would be replaced otherwise
            logger.warning(
                "%s cannot be read (%s): the record of this run goes on from the log of the "
                "checkpoint. What is in its output_dir is kept as %s.",
                path,
                error,
                aside.name,
            )
            return RunRecord()

    @best_effort
    def _write(self, state: TrainerState, now: bool = False) -> None:
        """Write ``run.json``, if it is time to."""
        trainer = self._trainer
        if not (now or self._pace.is_due):
            return
        if not (self._replaces and writes_files(trainer.args)):
            update(self.record, trainer, state)
            return
        with self._pace.spending():
            update(self.record, trainer, state)
            try:
                self.record.save(Path(trainer.store.directory).absolute())
                self._failed = False
            except OSError as error:
                if not self._failed:
                    logger.warning(
                        "The record of the run could not be written: %s. Training continues; it is "
                        "tried again.",
                        error,
                    )
                self._failed = True


def update(record: RunRecord, trainer: Any, state: TrainerState) -> None:
    """Bring what is not an event up to date: checkpoints and the best evaluation."""
    args = trainer.args
    record.pid = os.getpid()
    record.written = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    if args.save_strategy != "no":
        best = state.best_model_checkpoint
        name = None if best is None else Path(best).name
        with contextlib.suppress(Exception):  # the folder is out of reach for now
            record.checkpoints = [
                {"step": step, "name": path.name, "best": path.name == name}
                for step, path in trainer.store.list()
                if trainer.store.owns(path)
            ]
    metric = args.metric_for_best_model
    if metric is not None:
        record.metric = evaluation_name(metric)
    if state.best_global_step is not None:
        record.best = {"step": state.best_global_step, "value": state.best_metric}


def writes_files(args: TrainingArguments) -> bool:
    """Whether a run writes files into ``output_dir`` anyhow."""
    trackers = set(args.report_to)
    return args.save_strategy != "no" or bool(trackers & {*FILE_TRACKERS, "all"})


def layers_of(model: Any) -> list[list[Any]]:
    """Name, class, output shape and parameters of the layers of a model."""
    rows = []
    for layer in model.layers[:MAX_LAYERS]:
        rows.append([layer.name, type(layer).__name__, _shape(layer), _count(layer)])
    if len(model.layers) > MAX_LAYERS:
        rows.append([f"... and {len(model.layers) - MAX_LAYERS} more", "", "", None])
    return rows


def _shape(layer: Any) -> str:
    try:
        shape = layer.output.shape
    except Exception:  # a layer that is called by code has no output of its own
        return ""
    return (
        "("
        + ", ".join("batch" if d is None and i == 0 else str(d) for i, d in enumerate(shape))
        + ")"
    )


def _count(layer: Any) -> int | None:
    return int(layer.count_params()) if layer.built else None
