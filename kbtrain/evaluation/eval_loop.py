"""One pass over an evaluation set. Results do not depend on the batch size."""

from __future__ import annotations

import collections
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kbtrain import distributed
from kbtrain.backends.protocol import Backend
from kbtrain.callbacks.state import to_json_value
from kbtrain.data import (
    Batches,
    Block,
    LabelNames,
    map_structure,
    signature,
    unpack,
    with_none,
    without_none,
)
from kbtrain.distributed import host
from kbtrain.distributed.same_data import checked
from kbtrain.errors import DistributedError, first_lines
from kbtrain.evaluation.compiled_steps import CompiledEvalStep
from kbtrain.evaluation.gather import (
    BatchwiseMetrics,
    ConcatenatedOutputs,
    ListedOutputs,
    compute_on_host,
)
from kbtrain.evaluation.loss_totals import Totals, losses_of_batches
from kbtrain.evaluation.results import EvalLoopOutput
from kbtrain.model.losses.label_check import BatchCheck
from kbtrain.model.metrics import MetricSet
from kbtrain.utils.machine.processes import current
from kbtrain.utils.timing import speed

logger = logging.getLogger("kbtrain")

UNREAD_CALLS = 16
"""Calls in flight at most; bounds memory and keeps the device busy."""


@dataclass(frozen=True)
class EvalSpec:
    """What a pass over the data computes and returns.

    Attributes:
        prefix: Prefix of every metric's name, joined by an underscore.
        with_loss: Whether to compute the loss and the metrics; the data has labels.
        compute_metrics: Called on the host, once or per batch; None for none.
        keep_outputs: Whether to return outputs and labels.
        batchwise: ``batch_eval_metrics``.
        concatenate: ``eval_do_concat_batches``.
        include: Members of ``include_for_metrics``.
        label_names: Keys of the labels in a batch that is a dict, if not the usual ones.
        expected: The number of samples, if known.
        max_batches: The maximum number of batches; None for all.
        bound: Batches after which data without a length is assumed to be endless.
        batches_per_call: Maximum number of batches whose outputs are on the device at a time; None
            for as many as fit.
        generate: Computes the outputs from the inputs of a batch; None to call the model.
    """

    prefix: str
    with_loss: bool
    compute_metrics: Callable[..., Any] | None = None
    keep_outputs: bool = False
    batchwise: bool = False
    concatenate: bool = True
    include: Sequence[str] = ()
    label_names: LabelNames = None
    expected: int | None = None
    max_batches: int | None = None
    bound: int | None = None
    batches_per_call: int | None = None
    generate: Callable[[Any], Any] | None = None

    @property
    def gather(self) -> bool:
        """Whether outputs are copied to the host."""
        return self.keep_outputs or self.compute_metrics is not None

    @property
    def gather_from_model(self) -> bool:
        """Whether these outputs come from a call of the model."""
        return self.gather and self.generate is None


@dataclass
class _Started:
    """A call in flight; once its results are fetched, it is a ``gather.OutputBlock``."""

    results: Callable[[], dict[str, Any]]
    labels: Any
    inputs: Any
    batches: int
    size: int
    outputs: Any = None
    losses: np.ndarray | None = None


class Evaluation:
    """One pass over a data set: several batches per call, results read while the next ones run.

    Args:
        backend: The backend in use.
        step: The compiled evaluation step.
        spec: What to compute and return.
        before_batches: Called before each call to the device.
        on_batches: Called after each call to the device with the number of its batches.
        every_batch: Whether to run every batch in a separate call.
        checks: Validate the data.
        pin: Whether to copy batches to the device from page-locked memory.
    """

    def __init__(
        self,
        backend: Backend,
        step: CompiledEvalStep,
        spec: EvalSpec,
        before_batches: Callable[[], None],
        on_batches: Callable[[int], None],
        every_batch: bool,
        checks: Sequence[BatchCheck] = (),
        pin: bool = False,
    ) -> None:
        self._checks, self._pin = checks, pin
        self._backend, self._step, self._spec = backend, step, spec
        self._before_batches, self._on_batches = before_batches, on_batches
        self._every_batch = every_batch
        self._started: collections.deque[_Started] = collections.deque()
        self._totals = Totals()
        self._logs: dict[str, Any] | None = None  # the result of the last custom test_step
        self._samples = self._batches = 0
        compute = spec.compute_metrics
        self._calls_metrics = current().rank == 0
        self._batchwise = (
            BatchwiseMetrics(compute)
            if compute is not None and spec.batchwise and self._calls_metrics
            else None
        )
        self._gathered: ConcatenatedOutputs | ListedOutputs | None = None
        called = compute is not None and self._calls_metrics and not spec.batchwise
        if spec.keep_outputs or called:
            # With max_batches the number of rows is not known in advance: the memory grows.
            expected = spec.expected if spec.max_batches is None else None
            self._gathered = ConcatenatedOutputs(expected) if spec.concatenate else ListedOutputs()

    def run(self, batches: Batches, metrics: MetricSet | None) -> EvalLoopOutput:
        """Evaluate all ``batches``.

        The loss of each output is (sum of all sums) / (sum of all counts), accumulated batch by
        batch in float64 on the host, so that it does not depend on how batches are grouped into
        calls.
        """
        start = time.perf_counter()
        read = checked(self._backend, batches.loader, batches.blocks(0, 0, 1, self._limit))
        with contextlib.closing(read) as blocks:
            for block in blocks:
                self._before_batches()
                self._run_block(block)
                self._on_batches(block.updates)
                if self._batches == self._spec.max_batches:
                    break
                if self._batches == self._spec.bound:
                    logger.warning(
                        "The evaluation data has no length and had not ended after %d batches: the "
                        "evaluation stops here, and its results cover these batches. Set "
                        "eval_max_steps to change the number.",
                        self._batches,
                    )
                    break
        self._read(keep=0)
        if self._logs is not None:
            values = self._logs
        else:
            values = self._totals.result() if self._spec.with_loss else {}
        if metrics is not None:
            values |= metrics.result()
        gathered = {} if self._gathered is None else self._gathered.take()
        values |= self._without_loss(self._computed(gathered))
        seconds = time.perf_counter() - start
        prefix, keep = self._spec.prefix, self._spec.keep_outputs
        prefixed = {_with_prefix(name, prefix): value for name, value in values.items()}
        prefixed |= speed(prefix, seconds, self._samples, self._batches)
        return EvalLoopOutput(
            gathered.get("outputs") if keep else None,
            gathered.get("labels") if keep else None,
            prefixed,
            self._samples,
        )

    def loss_so_far(self) -> dict[str, float]:
        """The loss of the batches so far; waits for the device."""
        self._read(keep=0)
        return self._totals.result() if self._spec.with_loss and self._batches else {}

    def _computed(self, gathered: dict[str, Any]) -> dict[str, Any]:
        """The results of ``compute_metrics``, which process 0 calls for all."""
        computed: dict[str, Any] = {}
        problem: Exception | None = None
        try:
            if self._batchwise is not None:
                computed = self._batchwise.result()
            elif self._calls_metrics and self._spec.compute_metrics and "labels" in gathered:
                computed = compute_on_host(self._spec.compute_metrics, gathered)
        except Exception as error:
            problem = error
        text = None if problem is None else f"{type(problem).__name__}: {first_lines(problem)}"
        what = "what compute_metrics returned"
        result, failed = host.broadcast(self._backend, [_sendable(computed), text], what)
        if problem is not None:
            raise problem
        if failed is not None:
            raise DistributedError(f"compute_metrics failed in process 0: {failed}")
        return computed if self._calls_metrics else dict(result)

    def _without_loss(self, computed: dict[str, Any]) -> dict[str, Any]:
        """The results of ``compute_metrics``, without an entry that would overwrite the loss."""
        names = {"loss", f"{self._spec.prefix}_loss"} if self._spec.with_loss else set()
        if hidden := sorted(names & computed.keys()):
            logger.warning(
                "compute_metrics returned %r, which is the name of the loss: it is left out. "
                "Choose another name.",
                hidden[0],
            )
        return {name: value for name, value in computed.items() if name not in names}

    def _limit(self) -> int:
        """The maximum number of batches in the next block."""
        spec, limits = self._spec, [self._step.block_length.affordable]
        if self._every_batch or spec.generate is not None:
            limits.append(1)
        if spec.gather and spec.batches_per_call is not None:
            limits.append(spec.batches_per_call)
        for end in (spec.max_batches, spec.bound):
            if end is not None:
                limits.append(end - self._batches)
        return min(limits)

    def _run_block(self, block: Block) -> None:
        """Launch the batches of a block, in as many calls as the size of their outputs requires."""
        begin = time.perf_counter()
        distributed.at(f"batch {self._batches} of an evaluation")
        ((_, rows),) = block.chunks[0].items()
        for check in self._checks:
            check(rows, block.updates, ("batch",), self._batches)
        measure = self._step.block_length.is_worth_measuring(signature(rows))
        tensors = self._backend.to_device(without_none(rows), self._pin)
        first = 0
        while first < block.updates:
            results, count = self._call(tensors, first, block)
            labels = inputs = outputs = None
            if self._spec.gather:
                part = map_structure(lambda x, a=first, b=first + count: x[a:b], rows)
                x, labels, _ = unpack(part, self._spec.label_names)
                inputs = x if "inputs" in self._spec.include else None
                outputs = None if self._spec.generate is None else self._generated(x, first)
            size = block.samples // block.updates
            pending = self._backend.start_to_host(results)
            self._started.append(_Started(pending, labels, inputs, count, size, outputs))
            first += count
            # Outputs are copied to the host while the next call runs, so the device holds those of
            # two calls at most.
            self._read(keep=1 if self._spec.gather else UNREAD_CALLS)
        self._samples += block.samples
        self._batches += block.updates
        if measure:
            self._read(keep=0)
            seconds = host.slowest(self._backend, time.perf_counter() - begin)
            self._step.block_length.measured(block.updates, block.capacity, seconds)

    def _generated(self, x: Any, batch: int) -> Any:
        """Generate outputs for the single batch in ``x``."""
        assert self._spec.generate is not None
        try:
            rows = self._spec.generate(map_structure(lambda a: a[0], x))
        except Exception as error:
            error.add_note(f"Raised by the model's generate, at batch {self._batches + batch}.")
            raise
        return map_structure(lambda a: a[None], rows)

    def _call(self, tensors: Any, first: int, block: Block) -> tuple[dict[str, Any], int]:
        if not self._spec.with_loss and not self._spec.gather_from_model:
            return {}, block.updates - first
        try:
            return self._step.run(tensors, first, block.updates - first)
        except Exception as error:
            error.add_note(
                f"Raised in evaluation, at batch {self._batches + first}, in batches of the "
                f"structure and shapes {block.outline}."
            )
            raise

    def _read(self, keep: int) -> None:
        """Wait for all calls in flight but the newest ``keep``, and process their results."""
        while len(self._started) > keep:
            part = self._started.popleft()
            count = part.batches
            results = map_structure(lambda x, n=count: x[:n], part.results())
            if "logs" in results:
                self._logs = {name: x[-1].tolist() for name, x in results["logs"].items()}
            if "loss" in results:
                self._totals.add(results["loss"])
                if "loss" in self._spec.include:
                    part.losses = losses_of_batches(results["loss"])
            if not self._spec.gather:
                continue
            if self._spec.generate is None:
                part.outputs = with_none(map_structure(as_plain, results["outputs"]))
            if self._gathered is not None:
                self._gathered.add(part)
            if self._batchwise is not None:
                self._batchwise.add(part)


def _sendable(computed: dict[str, Any]) -> Any:
    """The results of ``compute_metrics`` as JSON values, which travel to the other processes."""
    return to_json_value(computed) if current().size > 1 else computed


def as_plain(array: np.ndarray) -> np.ndarray:
    """The array in a native NumPy dtype: bfloat16 and 8-bit floats become float32."""
    return array.astype(np.float32) if array.dtype.kind == "V" else array


def _with_prefix(name: str, prefix: str) -> str:
    return name if name.startswith(f"{prefix}_") else f"{prefix}_{name}"
