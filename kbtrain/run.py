"""One call of ``fit``: its data, its compiled step, and the numbers the device still owes us."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np

from kbtrain.data import Loader, batch_size, map_structure, signature, stack
from kbtrain.data.structure import leaves_with_paths
from kbtrain.errors import NonFiniteError
from kbtrain.persistence import Progress
from kbtrain.state import Plan, TrainerState

logger = logging.getLogger("kbtrain")

MAX_PENDING = 64
"""Calls the host may run ahead of what it has read; bounds memory and the age of an error."""

MAX_BLOCK = 64
"""Updates in one call to the device, at most."""

BLOCK_BYTES = 1 << 20
"""Size of the batches of one call, at most, if it is to hold more than one update."""

BLOCK_SECONDS = 0.1
"""How long one call may take: the progress bar and an interrupt wait that long."""


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

    def blocks(
        self, epoch: int, start: int, accumulation: int, limit: Callable[[], int]
    ) -> Iterator[list[list[Any]]]:
        """Blocks of updates of equal shapes, each update a list of micro-batches.

        Args:
            epoch: Number of the epoch.
            start: Micro-batches of it to leave out.
            accumulation: Micro-batches per update; the last update may have fewer.
            limit: Asked before each block how many updates it may have.
        """
        batches = self._from(epoch, start)
        waiting: list[Any] = []
        while True:
            block: list[list[Any]] = []
            for _ in range(limit()):
                group = waiting or list(itertools.islice(batches, accumulation))
                waiting = []
                if not group:
                    break
                if block and _outline(group) != _outline(block[0]):
                    waiting = group
                    break
                block.append(group)
            if not block:
                return
            yield block

    def _from(self, epoch: int, start: int) -> Iterator[Any]:
        first, self._first = self._first, None
        if first is not None and epoch == 0 and (start == 0 or not self._loader.sized):
            return itertools.islice(itertools.chain([first[0]], first[1]), start, None)
        return iter(self._loader.epoch(epoch, start))


def _outline(group: list[Any]) -> list[Any]:
    return [signature(batch) for batch in group]


def to_chunks(block: list[list[Any]], room: int) -> list[dict[str, Any]]:
    """What the step takes, for all updates of a block along a new leading axis.

    Neighbouring micro-batches of equal shape are stacked, so that the step can loop over them on
    the device.

    Args:
        block: Updates of equal shapes, each a list of micro-batches.
        room: Length of the leading axis; entries after the block's are not initialised.
    """
    chunks = []
    position = 0
    for _, same in itertools.groupby(block[0], key=signature):
        count = len(list(same))
        parts = [group[position : position + count] for group in block]
        position += count
        if count == 1:
            chunks.append({"single": _stack_with_room([part[0] for part in parts], room)})
        else:
            chunks.append({"stacked": _stack_with_room([stack(part) for part in parts], room)})
    return chunks


def _stack_with_room(batches: list[Any], room: int) -> Any:
    if room == 1:
        return map_structure(lambda x: x[None], batches[0])

    def fill(*arrays: np.ndarray) -> np.ndarray:
        result = np.empty((room, *arrays[0].shape), arrays[0].dtype)
        np.stack(arrays, out=result[: len(arrays)])
        return result

    return map_structure(fill, *batches)


def room_for(group: list[Any]) -> int:
    """Length of the leading axis for blocks of updates like this one.

    A function of the shapes alone: the compiled code, and so every number, is the same however
    fast the machine is. Large batches get no room to spare, because it is copied to the device.
    """
    size = sum(leaf.nbytes for batch in group for _, leaf in leaves_with_paths(batch))
    return max(1, min(MAX_BLOCK, BLOCK_BYTES // max(size, 1)))


@dataclass
class Run:
    """State of one ``fit`` that is not part of a checkpoint, and the reading of results.

    Attributes:
        backend: A module of ``kbtrain.backends``.
        plan: How many updates and epochs there are.
        batches: The data.
        accumulation: Micro-batches per update.
        step: The compiled train steps, ``step(block, count)``.
        state: The run's progress, for people.
        progress: The run's progress, for resuming.
        on_nonfinite: What to do about a non-finite loss or gradient.
        last_checkpoint: Returns the newest checkpoint, to name it in an error.
        limit: Returns how many updates may run before something may be due.
        first_step: The step this call began at.
        samples: Samples of this call so far.
    """

    backend: ModuleType
    plan: Plan
    batches: Batches
    accumulation: int
    step: Callable[[Any, int], dict[str, Any]]
    state: TrainerState
    progress: Progress
    on_nonfinite: str
    last_checkpoint: Callable[[], Any]
    limit: Callable[[], int]
    first_step: int
    samples: int = 0
    _affordable: int = 1
    _pending: list[tuple[int, int, dict[str, Any]]] = field(default_factory=list)
    _newest: dict[str, Any] = field(default_factory=dict)

    def blocks(self) -> Iterator[list[list[Any]]]:
        """The rest of the current epoch, as blocks that end where something may be due."""
        progress = self.progress
        return self.batches.blocks(
            progress.epoch, progress.batch, self.accumulation, self._block_limit
        )

    def _block_limit(self) -> int:
        return max(1, min(self.limit(), self._affordable))

    def update(self, block: list[list[Any]]) -> None:
        """Start the updates of a block; nothing is waited for."""
        room = room_for(block[0])
        start = time.perf_counter()
        chunks = self.backend.to_device(to_chunks(block, room))
        try:
            result = self.step(chunks, len(block))
        except Exception as error:
            error.add_note(
                f"Raised by update {self.state.global_step + 1} on micro-batches of shapes "
                f"{_outline(block[0][:1])}."
            )
            raise
        first = self.state.global_step + 1
        self.state.global_step += len(block)
        self.progress.batch += sum(map(len, block))
        self.state.epoch = self.plan.epoch_at(
            self.progress.epoch, self.progress.batch, self.accumulation
        )
        self.samples += sum(batch_size(batch) for group in block for batch in group)
        self._pending.append((first, len(block), result))
        if self._affordable < room and room > 1 or len(self._pending) >= MAX_PENDING:
            self.read()
            self._pace(room, len(block), time.perf_counter() - start)

    def _pace(self, room: int, count: int, seconds: float) -> None:
        """Grow the blocks while one takes less than ``BLOCK_SECONDS``."""
        per_step = seconds / count
        fits = int(BLOCK_SECONDS / max(per_step, 1e-9))
        self._affordable = max(1, min(room, fits, 4 * self._affordable))

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
        blocks = [(first, count) for first, count, _ in self._pending]
        results = self.backend.to_host([result for *_, result in self._pending])
        self._pending.clear()
        for (first, count), block in zip(blocks, results, strict=True):
            for i in range(count):
                self._add(first + i, map_structure(lambda x, i=i: x[i], block))

    def _add(self, step: int, result: dict[str, Any]) -> None:
        """Add one update's results to the sums."""
        if not bool(result["finite"]) and self.on_nonfinite != "ignore":
            self._nonfinite(step, result)
            return
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
            self.progress.skipped += 1
            logger.warning(
                "Update %d skipped: loss %s, gradient norm %s (%d skipped so far).",
                step,
                loss,
                norm,
                self.progress.skipped,
            )
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
