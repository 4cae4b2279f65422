"""One pass over an evaluation set, exact whatever the batch size."""

from __future__ import annotations

import collections
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kbtrain.backends.protocol import Backend
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
from kbtrain.evaluation.compiled_steps import CompiledEvalStep
from kbtrain.evaluation.gather import (
    BatchwiseMetrics,
    ConcatenatedOutputs,
    ListedOutputs,
    compute_on_host,
)
from kbtrain.evaluation.loss_totals import Totals, losses_of_batches
from kbtrain.evaluation.results import EvalLoopOutput
from kbtrain.model.losses.label_check import LabelCheck
from kbtrain.model.metrics import MetricSet
from kbtrain.utils.timing import speed

logger = logging.getLogger("kbtrain")

UNREAD_CALLS = 16
"""Calls whose losses stay on the device; bounds memory and keeps the device busy."""


@dataclass(frozen=True)
class EvalSpec:
    """What is asked of a pass over the data.

    Attributes:
        prefix: Put before every metric's name, with an underscore.
        with_loss: Compute the loss and the metrics; the data has labels.
        compute_metrics: Called on the host, with everything or batch by batch; None for none.
        keep_outputs: Return outputs and labels.
        batchwise: ``batch_eval_metrics``.
        concatenate: ``eval_do_concat_batches``.
        include: Members of ``include_for_metrics``.
        label_names: Keys of the labels in a batch that is a dict, if not the usual ones.
        expected: Samples there will be, if that is known.
        max_batches: Batches at most; None for all.
        bound: Batches after which data without a length is taken for endless.
        batches_per_call: Batches whose outputs may be on the device at a time; None for as many as
            fit.
        generate: From the inputs of a batch to what counts as its outputs; None for the model's.
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
        """Whether outputs come to the host."""
        return self.keep_outputs or self.compute_metrics is not None

    @property
    def gather_from_model(self) -> bool:
        """Whether these are what the model returns when it is called."""
        return self.gather and self.generate is None


@dataclass
class _Started:
    """A call to the device whose results have not been read; becomes a ``gathering.Part``."""

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
        on_batches: Called after each call to the device with the number of its batches.
        every_batch: Every batch is to be a call of its own.
        label_check: Looks at the labels; None does not.
        pin: Copy batches to the device from page-locked memory.
    """

    def __init__(
        self,
        backend: Backend,
        step: CompiledEvalStep,
        spec: EvalSpec,
        on_batches: Callable[[int], None],
        every_batch: bool,
        label_check: LabelCheck | None = None,
        pin: bool = False,
    ) -> None:
        self._label_check, self._pin = label_check, pin
        self._backend, self._step, self._spec = backend, step, spec
        self._on_batches, self._every_batch = on_batches, every_batch
        self._started: collections.deque[_Started] = collections.deque()
        self._totals = Totals()
        self._logs: dict[str, Any] | None = None  # what a model's own test_step returned last
        self._samples = self._batches = 0
        compute = spec.compute_metrics
        self._batchwise = (
            BatchwiseMetrics(compute) if compute is not None and spec.batchwise else None
        )
        self._gathered: ConcatenatedOutputs | ListedOutputs | None = None
        if spec.keep_outputs or (compute is not None and not spec.batchwise):
            # A part of the set needs memory for that part: it grows then.
            expected = spec.expected if spec.max_batches is None else None
            self._gathered = ConcatenatedOutputs(expected) if spec.concatenate else ListedOutputs()

    def run(self, batches: Batches, metrics: MetricSet | None) -> EvalLoopOutput:
        """Pass over ``batches``.

        The loss is (sum of all sums) / (sum of all counts), of each output, added up batch by batch
        in float64 on the host, so that it does not depend on how batches fall into calls.
        """
        start = time.perf_counter()
        with contextlib.closing(batches.blocks(0, 0, 1, self._limit)) as blocks:
            for block in blocks:
                self._run_block(block)
                self._on_batches(block.updates)
                if self._batches == self._spec.max_batches:
                    break
                if self._batches == self._spec.bound:
                    logger.warning(
                        "The evaluation data has no length and had not ended after %d batches: the "
                        "evaluation stops here, and its results are of these batches. "
                        "eval_max_steps sets another number.",
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
        if self._batchwise is not None:
            values |= self._without_loss(self._batchwise.result())
        elif self._spec.compute_metrics is not None and "labels" in gathered:
            computed = compute_on_host(self._spec.compute_metrics, gathered)
            values |= self._without_loss(computed)
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

    def _without_loss(self, computed: dict[str, Any]) -> dict[str, Any]:
        """The results of ``compute_metrics`` without one that would hide the loss."""
        names = {"loss", f"{self._spec.prefix}_loss"} if self._spec.with_loss else set()
        if hidden := sorted(names & computed.keys()):
            logger.warning(
                "compute_metrics returned %r, which is the name of the loss: it is left out. "
                "Choose another name.",
                hidden[0],
            )
        return {name: value for name, value in computed.items() if name not in names}

    def _limit(self) -> int:
        """Batches that the next block may have."""
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
        """Start the batches of a block, in as many calls as their outputs need."""
        begin = time.perf_counter()
        ((_, rows),) = block.chunks[0].items()
        if self._label_check is not None:
            self._label_check(rows, block.updates, ("batch",), self._batches)
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
            # Outputs leave the device while the next call runs: never more than two calls' worth.
            self._read(keep=1 if self._spec.gather else UNREAD_CALLS)
        self._samples += block.samples
        self._batches += block.updates
        if measure:
            self._read(keep=0)
            self._step.block_length.measured(
                block.updates, block.capacity, time.perf_counter() - begin
            )

    def _generated(self, x: Any, batch: int) -> Any:
        """What the model generates for the one batch in ``x``."""
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
        """Wait for all started calls but the newest ``keep``, and take in their results."""
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


def as_plain(array: np.ndarray) -> np.ndarray:
    """The array in a dtype of NumPy's own: bfloat16 and 8-bit floats become float32."""
    return array.astype(np.float32) if array.dtype.kind == "V" else array


def _with_prefix(name: str, prefix: str) -> str:
    return name if name.startswith(f"{prefix}_") else f"{prefix}_{name}"
