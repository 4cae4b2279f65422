"""One call of ``fit``: its data, its compiled step, and the numbers the device still owes us."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from kbtrain.data import Loader, batch_size, signature, stack
from kbtrain.errors import NonFiniteError
from kbtrain.persistence import Progress
from kbtrain.state import Plan, TrainerState

logger = logging.getLogger("kbtrain")

MAX_PENDING = 64
"""Updates the host may run ahead of what it has read; bounds memory and the age of an error."""


class Batches:
    """The micro-batches of a loader in groups, one group an update.

    The first batch is looked at before training (to build the model from its shapes) and given
    back, because a generator could not produce it a second time.
    """

    def __init__(self, loader: Loader) -> None:
        self._loader = loader
        self._first: tuple[Any, Iterator[Any]] | None = None

    def peek(self) -> Any:
        """The first batch of epoch 0; None if there is none."""
        batches = iter(self._loader.epoch(0))
        first = next(batches, None)
        if first is not None:
            self._first = (first, batches)
        return first

    def __iter__(self) -> Iterator[Any]:
        """The batches of epoch 0."""
        return self._from(0, 0)

    def groups(self, epoch: int, start: int, size: int) -> Iterator[list[Any]]:
        """Lists of up to ``size`` micro-batches of ``epoch``, from number ``start`` on."""
        batches = self._from(epoch, start)
        while group := list(itertools.islice(batches, size)):
            yield group

    def _from(self, epoch: int, start: int) -> Iterator[Any]:
        first, self._first = self._first, None
        if first is not None and epoch == 0 and (start == 0 or not self._loader.sized):
            return itertools.islice(itertools.chain([first[0]], first[1]), start, None)
        return iter(self._loader.epoch(epoch, start))


def to_chunks(micro_batches: list[Any]) -> list[dict[str, Any]]:
    """Stack neighbours of equal shape, so that the step can loop over them on the device."""
    chunks = []
    for _, group in itertools.groupby(micro_batches, key=signature):
        same = list(group)
        chunks.append({"single": same[0]} if len(same) == 1 else {"stacked": stack(same)})
    return chunks


@dataclass
class Run:
    """State of one ``fit`` that is not part of a checkpoint, and the reading of results.

    Attributes:
        backend: A module of ``kbtrain.backends``.
        plan: How many updates and epochs there are.
        batches: The data.
        accumulation: Micro-batches per update.
        step: The compiled train step.
        state: The run's progress, for people.
        progress: The run's progress, for resuming.
        on_nonfinite: What to do about a non-finite loss or gradient.
        last_checkpoint: Returns the newest checkpoint, to name it in an error.
        first_step: The step this call began at.
        samples: Samples of this call so far.
        skipped: Updates left out because they were not finite.
        started: When the first update began, in seconds of ``time.perf_counter``.
    """

    backend: ModuleType
    plan: Plan
    batches: Batches
    accumulation: int
    step: Callable[[Any], dict[str, Any]]
    state: TrainerState
    progress: Progress
    on_nonfinite: str
    last_checkpoint: Callable[[], Any]
    first_step: int
    samples: int = 0
    skipped: int = 0
    started: float = field(default_factory=time.perf_counter)
    _pending: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    _newest: dict[str, Any] = field(default_factory=dict)

    def update(self, micro_batches: list[Any]) -> None:
        """Start one update; nothing is waited for."""
        chunks = self.backend.to_device(to_chunks(micro_batches))
        try:
            result = self.step(chunks)
        except Exception as error:
            error.add_note(
                f"Raised by update {self.state.global_step + 1} on micro-batches of shapes "
                f"{[signature(b) for b in micro_batches[:1]]}."
            )
            raise
        self.state.global_step += 1
        self.progress.batch += len(micro_batches)
        self.state.epoch = self.plan.epoch_at(
            self.progress.epoch, self.progress.batch, self.accumulation
        )
        self.samples += sum(batch_size(batch) for batch in micro_batches)
        self._pending.append((self.state.global_step, result))
        if len(self._pending) >= MAX_PENDING:
            self.read()

    def end_epoch(self, stopped: bool) -> None:
        """Move on to the next epoch, unless the run was stopped in the middle of this one."""
        length = self.plan.batches_per_epoch
        if not stopped or (length is not None and self.progress.batch >= length):
            self.progress.epoch, self.progress.batch = self.progress.epoch + 1, 0

    def read(self) -> None:
        """Wait for the updates that were started and add up their results.

        Raises:
            NonFiniteError: One of them was not finite and ``on_nonfinite`` is ``"raise"``.
        """
        steps = [step for step, _ in self._pending]
        results = self.backend.to_host([result for _, result in self._pending])
        self._pending.clear()
        for step, result in zip(steps, results, strict=True):
            if not bool(result["finite"]) and self.on_nonfinite != "ignore":
                self._nonfinite(step, result)
                continue
            loss = float(result["loss"])
            self.progress.loss_sum += loss
            self.progress.window_sum += loss
            self.progress.window_steps += 1
            if result["extras"]:
                sums = self.progress.window_extras or {}
                for name, value in result["extras"].items():
                    sums[name] = sums.get(name, 0.0) + float(value)
                self.progress.window_extras = sums
            self._newest = result

    def _nonfinite(self, step: int, result: dict[str, Any]) -> None:
        loss, norm = float(result["loss"]), float(result["grad_norm"])
        if self.on_nonfinite == "skip":
            self.skipped += 1
            logger.warning("Update %d skipped: loss %s, gradient norm %s (%d skipped so far).",
                           step, loss, norm, self.skipped)
            return
        # Every update after this one was a no-op on the device: the run stands before it.
        self.state.global_step = step - 1
        checkpoint = self.last_checkpoint()
        raise NonFiniteError(
            f"Update {step} was not finite: loss {loss}, gradient norm {norm}. The weights are as "
            f"update {step - 1} left them. Last checkpoint: {checkpoint or 'none was saved'}. "
            "Look for NaN or infinity in the data of this update, lower learning_rate, or set "
            "max_grad_norm. on_nonfinite='skip' leaves such updates out, 'ignore' applies them."
        )

    def take_window(self) -> dict[str, float]:
        """Means since the last log, with the newest gradient norm and learning rate."""
        self.read()
        progress, steps = self.progress, self.progress.window_steps
        if not steps:
            return {}
        logs = {
            "loss": progress.window_sum / steps,
            "grad_norm": float(self._newest["grad_norm"]),
            "learning_rate": float(self._newest["learning_rate"]),
        }
        logs |= {name: total / steps for name, total in (progress.window_extras or {}).items()}
        progress.window_sum, progress.window_steps, progress.window_extras = 0.0, 0, None
        return logs
