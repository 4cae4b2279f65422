"""What the screens have in common: the moments of a run that a view shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kbtrain.report.ending import RunEnding
from kbtrain.report.facts import RunFacts


@dataclass
class Evaluation:
    """The results of one evaluation, over all its sets.

    Attributes:
        step: Updates done.
        updates: Updates planned; 0 if unknown.
        epoch: Epochs done.
        metrics: Results by name, of all sets, without durations.
        seconds: Duration.
        training: What was logged of the training at this step.
        best: Whether it is the best so far.
        saved: Name of the checkpoint being written at this step, or None.
    """

    step: int
    updates: int
    epoch: float
    metrics: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    training: dict[str, Any] = field(default_factory=dict)
    best: bool = False
    saved: str | None = None


@dataclass(frozen=True)
class Progress:
    """Where a run is, copied from the state and the run, which other threads must not read.

    While a step is traced, the attributes of the state are values of the trace.

    Attributes:
        step: Updates done.
        updates: Updates planned; 0 if unknown.
        epoch: Epochs done.
        epochs: Epochs planned; 0 if unknown.
        samples: Samples of this call of ``fit``.
        tokens: Tokens of it; None if they are not counted.
        newest: Loss, gradient norm and learning rate of the newest update that has been read.
    """

    step: int
    updates: int
    epoch: float
    epochs: int
    samples: int
    tokens: int | None
    newest: Mapping[str, float]

    @classmethod
    def of(cls, trainer: Any) -> Progress:
        """The progress of a Trainer; called between two updates."""
        state, run = trainer.state, trainer.current_run
        return cls(
            step=state.global_step,
            updates=state.max_steps,
            epoch=float(state.epoch),
            epochs=state.num_train_epochs if state.num_train_epochs < 2**31 - 1 else 0,
            samples=run.samples,
            tokens=run.tokens if run.count_tokens is not None else None,
            newest=dict(run.newest_values),
        )


class View:
    """Shows the moments of a run; a screen overrides what it shows.

    The methods are called in the thread of ``fit``, one after the other, except ``notice``.
    """

    def phase(self, text: str) -> None:
        """Something that may take long begins: building, compiling, restoring, evaluating."""

    def begin(self, trainer: Any, facts: RunFacts, trial: bool) -> None:
        """Training begins; a trial of a search is shown by its progress alone."""

    def first_update(self, progress: Progress, seconds: float) -> None:
        """The first update is done; it took so long, most of it compiling."""

    def progress(self, progress: Progress) -> None:
        """Updates are done; called ten times a second at most."""

    def training_log(self, logs: dict[str, Any], step: int, updates: int) -> None:
        """The training has logged its loss and other values."""

    def batches(self, done: int, total: int | None) -> None:
        """An evaluation or prediction has done so many batches of ``total``; None if unknown."""

    def evaluation(self, result: Evaluation, in_training: bool) -> None:
        """An evaluation, or outside of ``fit`` also a prediction, is complete.

        That of a trial has no metrics and leaves no line.
        """

    def notice(self, text: str) -> None:
        """Something to be seen at once; called from another thread."""

    def end(self, ending: RunEnding) -> None:
        """``fit`` ends, in whatever way."""

    def close(self) -> None:
        """Leave the screen as it is: nothing more comes for now."""
