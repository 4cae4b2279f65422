"""Decisions of the loop that several processes take together.

What a run does next follows from the arguments and from results that are the same on all processes,
so they agree without asking each other. They ask where a decision may depend on one of them: a
signal, the clock, a callback of the user. All of them ask at the same updates.
"""

from __future__ import annotations

import hashlib
import re
import socket
import time
from typing import TYPE_CHECKING, Any

import keras

from kbtrain.callbacks.base import STEP_EVENTS
from kbtrain.callbacks.state import TrainerControl
from kbtrain.data import Loader
from kbtrain.distributed import host
from kbtrain.distributed.agreement import agree
from kbtrain.distributed.same_data import described
from kbtrain.errors import DistributedError
from kbtrain.utils.machine.processes import current

if TYPE_CHECKING:
    from kbtrain.training.trainer_base import TrainerBase

ACTION_EVENTS = (
    *("on_log", "on_save", "on_evaluate_begin", "on_evaluate"),
    *("on_prediction_step_begin", "on_prediction_step"),
)
FLAGS = (
    *("should_training_stop", "should_epoch_stop", "should_save", "should_evaluate"),
    "should_log",
)

SECONDS = 0.5
"""Time between two questions whether a process was asked to stop."""


class _Pace:
    """How many blocks pass between two questions, so that there are two in a second."""

    def __init__(self) -> None:
        self._wait = self._every = 1
        self._asked = time.monotonic()

    def is_due(self) -> bool:
        """Whether to ask after this block; the same on all processes."""
        self._wait -= 1
        return self._wait <= 0

    @property
    def passed(self) -> float:
        """Seconds since the last question."""
        return time.monotonic() - self._asked

    def asked(self, seconds: float | None = None) -> None:
        """A question was answered.

        Args:
            seconds: The longest time since the last one on any process; None to keep the pace.
        """
        if seconds is not None:
            factor = SECONDS / max(seconds, 1e-3)
            self._every = max(1, min(2 * self._every, int(self._every * factor)))
        self._wait = self._every
        self._asked = time.monotonic()


class Agreement:
    """Asks all processes; with one process every answer is its own.

    Args:
        trainer: The Trainer.
    """

    def __init__(self, trainer: TrainerBase) -> None:
        self._trainer = trainer
        self._several = current().size > 1
        self._pace = _Pace()
        self._evaluation_pace = _Pace()
        handler = trainer.callback_handler
        mine = {
            "step": any(not c.decides_alike for e in STEP_EVENTS for c in handler.listeners(e)),
            "action": any(not c.decides_alike for e in ACTION_EVENTS for c in handler.listeners(e)),
            "results": any(not c.decides_alike for c in handler.listeners("on_epoch_results")),
            "every_step": handler.need_every_step(),
        }
        self._on = host.any_of(trainer.backend, mine)

    @property
    def every_step(self) -> bool:
        """Whether a callback of any process needs the events of every update."""
        own = self._trainer.callback_handler.need_every_step()
        return self._on["every_step"] if self._several else own

    def stop_reason(self, now: bool = False) -> str | None:
        """The reason to stop here, of the first process that has one.

        Args:
            now: Whether to ask at once; else the processes ask twice a second.
        """
        trainer = self._trainer
        mine = trainer.stop_signals.reason(trainer.saver.longest)
        if not self._several:
            return mine
        if not self._pace.is_due() and not now:
            return None
        reason, slowest = self._asked_all(mine, self._pace.passed)
        self._pace.asked(None if now else slowest)
        return reason

    def begin_evaluation(self) -> None:
        """An evaluation begins that ``reason_to_abandon`` may end."""
        self._evaluation_pace = _Pace()

    def reason_to_abandon(self) -> str | None:
        """The reason to leave an evaluation between two batches, as in ``stop_reason``."""
        trainer, pace = self._trainer, self._evaluation_pace
        mine = trainer.stop_signals.reason(trainer.saver.longest)
        if not self._several:
            return mine
        if not pace.is_due():
            return None
        reason, slowest = self._asked_all(mine, pace.passed)
        pace.asked(slowest)
        return reason

    def _asked_all(self, mine: str | None, passed: float) -> tuple[str | None, float]:
        """The first reason to stop of any process, and the longest of the times."""
        answers = host.gather(self._trainer.backend, [mine, passed], "a reason to stop")
        reason = next((reason for reason, _ in answers if reason is not None), None)
        return reason, max(seconds for _, seconds in answers)

    def control(self, after: str) -> None:
        """Combine the requests of the callbacks of all processes.

        Args:
            after: What may have set them: the events of a "step", an "action", an "epoch", or
                its "results".
        """
        if not self._several or not self._on.get(after, True):
            return
        control: TrainerControl = self._trainer.control
        flags = {name: bool(getattr(control, name)) for name in FLAGS}
        for name, value in host.any_of(self._trainer.backend, flags).items():
            setattr(control, name, value)


def check_weights(trainer: TrainerBase) -> None:
    """Check that all processes have the same weights: something may have changed those of one.

    Raises:
        DistributedError: They do not; it is raised in all processes.
    """
    if current().size == 1:
        return
    weights = [v for v in trainer.model.weights if keras.backend.is_float_dtype(v.dtype)]
    mine = trainer.backend.checksums(weights)
    digest = hashlib.sha256(repr(mine).encode()).hexdigest()
    what = "a checksum of the weights"
    if len(set(host.gather(trainer.backend, digest, what))) == 1:
        return
    sums = host.gather(trainer.backend, [mine, socket.gethostname()], what)
    (first, first_host), step = sums[0], trainer.state.global_step
    rank, other_host, i = next(
        (rank, name, i)
        for rank, (other, name) in enumerate(sums)
        for i, value in enumerate(other)
        if value != first[i]
    )
    raise DistributedError(
        f"The weights of the processes differ after update {step}: {weights[i].path} of process "
        f"{rank} (host {other_host}) is not that of process 0 (host {first_host}). Something has "
        "changed weights on one process only, such as a callback: make every change on all "
        "processes, and alike."
    )


def check_alike(trainer: TrainerBase, loader: Loader, first: Any, updates: int) -> None:
    """Check that all processes are about to train the same model on the same data.

    Args:
        trainer: The Trainer, with a built model.
        loader: The training data.
        first: Its first batch.
        updates: The number of updates; 0 if unknown.

    Raises:
        DistributedError: They are not; it names the processes and what differs.
    """
    if current().size == 1:
        return
    facts: dict[str, Any] = {
        f"TrainingArguments.{name}": value for name, value in trainer.args.to_dict().items()
    }
    facts |= {
        "the number of samples": loader.num_examples,
        "the batch size": loader.batch_size,
        "the number of updates": updates,
        "the first batch": described(first),
        # Without the numbers that Keras counts in each process for itself.
        "the variables of the model": {
            f"{i} {re.sub(r'_[0-9]+', '', v.path)}": f"{v.dtype}{list(v.shape)}"
            for i, v in enumerate(trainer.model.variables)
        },
    }
    agree(current(), trainer.backend.exchange, facts)
