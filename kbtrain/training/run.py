"""The state of one ``fit``: data, compiled step, results in flight."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from kbtrain import distributed
from kbtrain.backends.protocol import Backend
from kbtrain.callbacks.adapters.epoch_results import EpochResults
from kbtrain.callbacks.lazy_values import LazyMapping, LazyNumber, MicroBatches
from kbtrain.callbacks.state import TrainerState, TrainingPlan
from kbtrain.checkpoint.run_state import Progress
from kbtrain.data import Batches, Block, without_none
from kbtrain.data.block_length import BlockLength
from kbtrain.distributed import host
from kbtrain.distributed.same_data import checked
from kbtrain.errors import NonFiniteError, OutOfMemoryError, first_lines
from kbtrain.model.losses.label_check import BatchCheck
from kbtrain.model.metrics import MetricSet
from kbtrain.model.trainable_flags import TrainableFlags
from kbtrain.utils.timing import StepTimes, speed

logger = logging.getLogger("kbtrain")

MAX_PENDING = 4
"""Calls in flight at most. A signal, an error or a save may have to wait for all of them."""

RUN_AHEAD = 2
"""Calls left in flight when that limit is reached, so that the device does not idle."""


class _Launched(NamedTuple):
    """A call in flight: its first update, their number, the samples of each, and the data."""

    first: int
    updates: int
    samples: float
    chunks: Any


@dataclass
class Run:
    """State of one ``fit`` that is not part of a checkpoint, and the fetching of results.

    Attributes:
        backend: The backend in use.
        plan: The number of updates and epochs.
        batches: The data.
        accumulation: Micro-batches per update.
        step: The compiled train steps, ``step(tensors, block)``.
        state: The run's progress, as callbacks see it.
        progress: The run's progress, for resuming.
        on_nonfinite: How to handle a non-finite loss or gradient.
        last_checkpoint: Returns the newest checkpoint, for error messages.
        limit: Returns the number of updates until an action may be due.
        first_step: The step at which this call started.
        block_length: Determines how many updates one call of the compiled step runs.
        count_tokens: Counts the tokens of a block, or None.
        pin: Whether to copy batches to the device from page-locked memory.
        is_compiled: Whether a block runs without being compiled first.
        explain: Describes the first non-finite value of an update, given the chunks of its block
            and its index there; None for no description.
        checks: Validate the data of the first epoch.
        newest_only: Whether a log has the extras of its newest update instead of their means, as
            a custom step returns means itself.
        running_loss: Whether the loss of an update is the mean of all since the last log.
        trainable_at_start: The trainable flags when this call started.
        samples: Samples of this call so far.
        tokens: Tokens of this call so far.
        times: The time spent in each part of the loop.
        compile_seconds: Duration of the calls of the steps that were compiled first, most of it
            compiling.
        compiling_samples, compiling_tokens: Samples and tokens of these calls.
        seconds: Duration of the loop, once it is over.
        processing_files: Files that ``processing_class`` wrote for the first checkpoint: path ->
            content.
        score: Step and metric of the last evaluation that counts for the best model.
        best_is_lost: Whether the checkpoint of the best step could not be written.
        epoch_results: Adds up loss and metrics over an epoch, for callbacks of Keras.
        ends_at_nonfinite: Whether the first update that is not finite ends the run without an
            error (``keras.callbacks.TerminateOnNaN``).
    """

    backend: Backend
    plan: TrainingPlan
    batches: Batches
    accumulation: int
    step: Callable[[Any, Block], dict[str, Any]]
    state: TrainerState
    progress: Progress
    on_nonfinite: str
    last_checkpoint: Callable[[], Any]
    limit: Callable[[], int]
    first_step: int
    block_length: BlockLength = field(default_factory=BlockLength)
    count_tokens: Callable[[Block], int] | None = None
    pin: bool = False
    is_compiled: Callable[[Block], bool] = lambda block: True
    explain: Callable[[Any, int], str] | None = None
    checks: Sequence[BatchCheck] = ()
    newest_only: bool = False
    running_loss: bool = False
    trainable_at_start: TrainableFlags | None = None
    samples: int = 0
    tokens: int = 0
    times: StepTimes = field(default_factory=StepTimes)
    compile_seconds: float = 0.0
    compiling_samples: int = 0
    compiling_tokens: int = 0
    seconds: float | None = None
    processing_files: Mapping[str, bytes] | None = None
    score: tuple[int, float] | None = None
    best_is_lost: bool = False
    epoch_results: EpochResults | None = None
    ends_at_nonfinite: bool = False
    _block: Block | None = None
    _result: dict[str, Any] | None = None
    _pending: list[tuple[_Launched, Callable[[], dict[str, Any]]]] = field(default_factory=list)
    _newest: dict[str, Any] = field(default_factory=dict)

    def blocks(self) -> Generator[Block, None, None]:
        """The rest of the current epoch, in blocks that end where an action may be due."""
        progress = self.progress
        blocks = self.batches.blocks(
            progress.epoch, progress.batch, self.accumulation, self._block_limit
        )
        blocks = checked(self.backend, self.batches.loader, blocks)
        with contextlib.closing(blocks):
            while True:
                with self.times.of("data"):
                    block = next(blocks, None)
                if block is None:
                    return
                self._block, self._result = block, None
                yield block

    @property
    def next_is_compiled(self) -> bool:
        """Whether the newest block runs, or ran, without being compiled first."""
        return self._block is not None and self.is_compiled(self._block)

    def newest(self, metrics: MetricSet | None) -> dict[str, Any]:
        """Lazy ``batch``, ``loss`` and ``metrics`` of the newest update, for callbacks.

        Args:
            metrics: The metrics of the training.
        """
        block, result = self._block, self._result
        return {
            "batch": None if block is None else MicroBatches(block),
            "loss": None if block is None or result is None else self._lazy_loss(block, result),
            "metrics": LazyMapping(dict if metrics is None else metrics.result),
        }

    def _lazy_loss(self, block: Block, result: dict[str, Any]) -> LazyNumber:
        def read() -> float:
            with self.times.of("compute"):
                losses: Any = self.backend.to_host(result["loss"])
            return float(losses[block.updates - 1])

        return LazyNumber(read)

    def _block_limit(self) -> int:
        return max(1, min(self.limit(), self.block_length.affordable))

    def update(self, block: Block) -> None:
        """Launch the updates of a block without waiting for them."""
        start, compiles = time.perf_counter(), not self.is_compiled(block)
        distributed.at(f"update {self.state.global_step + 1}")
        self._check_data(block)
        try:
            with self.times.of("compute"):
                chunks = self.backend.to_device(without_none(block.chunks), self.pin)
                result = self.step(chunks, block)
                # Queued right behind these updates, so that waiting for the copy does not wait
                # for work launched later.
                wait = self.backend.start_to_host(result)
        except Exception as error:
            self._raise_if_memory(error, self.state.global_step + 1, block.outline)
            error.add_note(
                f"Raised by update {self.state.global_step + 1}, whose micro-batches have the "
                f"structure and shapes {block.outline}."
            )
            raise
        if compiles:
            self.compile_seconds += time.perf_counter() - start
            self.compiling_samples += block.samples
        self._result = result
        chunks = None if self.explain is None else block.chunks
        samples, step = block.samples / block.updates, self.state.global_step + 1
        self._pending.append((_Launched(step, block.updates, samples, chunks), wait))
        self.state.global_step += block.updates
        self.progress.batch += block.updates * block.micro_batches
        self.state.epoch = self.plan.epoch_at(
            self.progress.epoch, self.progress.batch, self.accumulation
        )
        self.samples += block.samples
        if self.count_tokens is not None:
            tokens = self.count_tokens(block)
            self.tokens += tokens
            self.compiling_tokens += tokens * compiles
            self.state.num_input_tokens_seen += tokens
        if self.block_length.is_worth_measuring(block.outline):
            self.read()
            seconds = host.slowest(self.backend, time.perf_counter() - start)
            self.block_length.measured(block.updates, block.capacity, seconds)
        elif len(self._pending) >= MAX_PENDING:
            self.read(keep=RUN_AHEAD)

    def _check_data(self, block: Block) -> None:
        parts = [part for chunk in block.chunks for part in chunk.items()] if self.checks else []
        for kind, batches in parts:
            axes = ("update",) if kind == "single" else ("update", "micro-batch")
            for check in self.checks:
                check(batches, block.updates, axes, self.state.global_step + 1)

    def end_epoch(self, stopped: bool) -> None:
        """Advance to the next epoch, unless the run was stopped in the middle of this one."""
        length = self.plan.batches_per_epoch
        if not stopped or (length is not None and self.progress.batch >= length):
            self.progress.epoch, self.progress.batch = self.progress.epoch + 1, 0
            self.checks = ()
            if length is None and not self.plan.max_steps:
                self.state.epoch = float(self.progress.epoch)

    def read(self, keep: int = 0) -> None:
        """Wait for the updates in flight and accumulate their results.

        Args:
            keep: Number of newest calls to leave in flight.

        Raises:
            OutOfMemoryError: An update did not fit into memory.
            NonFiniteError: An update was not finite and ``on_nonfinite`` is ``"raise"``.
        """
        ready = self._pending[: len(self._pending) - keep]
        self._pending = self._pending[len(ready) :]
        blocks = [launched for launched, _ in ready]
        try:
            with self.times.of("compute"):
                results = [wait() for _, wait in ready]
        except Exception as error:
            self._raise_if_memory(error, self.state.global_step)
            raise
        for launched, block in zip(blocks, results, strict=True):
            # Python numbers: element access of arrays is ten times slower.
            extras = {name: x.tolist() for name, x in block.pop("extras").items()}
            values = {name: x.tolist() for name, x in block.items()}
            for i in range(launched.updates):
                more = {name: x[i] for name, x in extras.items()}
                result = {name: x[i] for name, x in values.items()}
                if not result["finite"] and self.on_nonfinite != "ignore":
                    self._nonfinite(launched.first + i, result, launched.chunks, i)
                else:
                    self._add(result, more, launched.samples)

    def _raise_if_memory(self, error: Exception, step: int, outline: Any = None) -> None:
        """Raise advice if an update did not fit into memory."""
        if self.backend.is_oom(error):
            what = "" if outline is None else f" Structure and shapes of its batches: {outline}."
            raise OutOfMemoryError(
                f"Update {step} did not fit into memory: {first_lines(error)}.{what} Set "
                "auto_find_batch_size=True, or lower per_device_train_batch_size and raise "
                "gradient_accumulation_steps by the same factor, which gives the same updates.",
                in_training=True,
            ) from error

    def _add(self, result: dict[str, Any], extras: dict[str, float], samples: float) -> None:
        """Accumulate the results of one update."""
        loss, progress = result["loss"], self.progress
        progress.window_steps += 1
        if self.running_loss:  # the mean of the window so far
            loss = loss * progress.window_steps - progress.window_sum
        if self.epoch_results is not None:
            self.epoch_results.add(loss, extras, samples)
        progress.loss_sum += loss
        progress.window_sum += loss
        if self.newest_only:
            self.progress.window_extras = extras
        elif extras:
            sums = self.progress.window_extras or {}
            for name, value in extras.items():
                sums[name] = sums.get(name, 0.0) + value
            self.progress.window_extras = sums
        self._newest = result

    def _nonfinite(self, step: int, result: dict[str, Any], chunks: Any, index: int) -> None:
        loss, norm = result["loss"], result.get("grad_norm", "not known")
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
        # All later updates were no-ops on the device: the weights are those before this one.
        self.state.global_step = step - 1
        checkpoint = self.last_checkpoint()
        why = (
            "Check the data of this update for NaN or infinity, or lower the learning rate."
            if self.newest_only
            else "Check the data of this update for NaN or infinity (debug='underflow_overflow' "
            "names the layer), lower learning_rate, or set max_grad_norm."
            if self.explain is None
            else self.explain(chunks, index)
        )
        raise NonFiniteError(
            f"Update {step} was not finite: loss {loss}, gradient norm {norm}. The weights are as "
            f"update {step - 1} left them. Last checkpoint: {checkpoint or 'none was saved'}. "
            f"{why} on_nonfinite='skip' skips such updates, 'ignore' applies them."
        )

    def take_window(self) -> dict[str, float]:
        """Means since the last log, with the newest gradient norm and learning rate."""
        self.read()
        progress, steps = self.progress, self.progress.window_steps
        if not steps:
            return {}
        known = [name for name in ("grad_norm", "learning_rate") if name in self._newest]
        logs = {} if self.newest_only else {"loss": progress.window_sum / steps}
        logs |= {name: self._newest[name] for name in known}
        extras = progress.window_extras or {}
        logs |= extras if self.newest_only else {n: total / steps for n, total in extras.items()}
        if self.count_tokens is not None:
            logs["num_input_tokens_seen"] = self.state.num_input_tokens_seen
            logs |= self.speed(self.times.total)
        progress.window_sum, progress.window_steps, progress.window_extras = 0.0, 0, None
        return logs

    @property
    def newest_values(self) -> dict[str, float]:
        """Loss, gradient norm and learning rate of the newest update that has been read."""
        return self._newest

    @property
    def has_loss(self) -> bool:
        """Whether the updates have a loss: a custom step may return other values instead."""
        return not self.newest_only or not math.isnan(self.progress.loss_sum)

    def speed(self, seconds: float) -> dict[str, float]:
        """Samples, steps and tokens per second, and the time spent in each part of the loop.

        Args:
            seconds: Duration of this call so far.
        """
        rates = speed("train", seconds, self.samples, self.state.global_step - self.first_step)
        if self.count_tokens is not None:
            rates["train_tokens_per_second"] = round(self.tokens / max(seconds, 1e-9), 3)
        return rates | self.times.split(seconds)
