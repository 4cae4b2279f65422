"""Outputs of an evaluation on the host: concatenated, listed, or processed batch by batch."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from kbtrain.data import map_structure
from kbtrain.data.plain_values import plain_values
from kbtrain.errors import ConfigurationError, DataError

PADDING = -100
"""Padding value for outputs and labels of different lengths, so that they can be concatenated."""


@dataclass
class EvalPrediction:
    """The argument of ``compute_metrics``, with NumPy arrays.

    It unpacks and indexes like a tuple of the attributes that are set:
    ``predictions, label_ids = p``, ``p[0]``.

    Attributes:
        predictions: The model's outputs for the whole set, in the model's structure; with
            ``eval_do_concat_batches=False`` a list with those of each batch; with
            ``batch_eval_metrics=True`` those of one batch.
        label_ids: The labels, in the same form.
        inputs: The inputs, if ``include_for_metrics`` contains "inputs".
        losses: The mean loss of each sample's batch, if it contains "loss".
    """

    predictions: Any
    label_ids: Any
    inputs: Any = None
    losses: Any = None

    @property
    def elements(self) -> tuple[Any, ...]:
        """Predictions and labels, followed by inputs and losses if they are set."""
        extra = [x for x in (self.inputs, self.losses) if x is not None]
        return (self.predictions, self.label_ids, *extra)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.elements)

    def __len__(self) -> int:
        return len(self.elements)

    def __getitem__(self, index: Any) -> Any:
        return self.elements[index]


class Rows:
    """Accumulates the rows of one array in a buffer that is allocated once.

    Axes after the first may differ between pieces; they are padded to the longest with ``PADDING``.
    A longer piece requires a copy, which reserves another quarter, so that data sorted by length is
    not copied for each new length.

    Args:
        expected: The number of rows, or None if unknown; the buffer then grows by half, in place
            if the system can.

    Example:
        >>> rows = Rows(expected=3)
        >>> rows.add(np.array([[1, 2]]))
        >>> rows.add(np.array([[3], [4]]))
        >>> rows.result().tolist()
        [[1, 2], [3, -100], [4, -100]]
    """

    def __init__(self, expected: int | None = None) -> None:
        self._expected = expected
        self._buffer: np.ndarray | None = None
        self._longest: tuple[int, ...] = ()
        self._count = 0

    def add(self, rows: np.ndarray) -> None:
        """Append a copy of rows.

        Args:
            rows: Shape ``(n, ...)``.

        Raises:
            DataError: The number of axes differs, or lengths do in a dtype that cannot hold the
                padding.
        """
        buffer = self._buffer
        if buffer is None:
            size = max(len(rows), self._expected or 0)
            buffer = self._buffer = np.empty((size, *rows.shape[1:]), rows.dtype)
            self._longest = rows.shape[1:]
        if self._longest != rows.shape[1:] or buffer.dtype != rows.dtype:
            buffer = self._buffer = self._fit(buffer, rows)
        end = self._count + len(rows)
        if end > len(buffer):
            buffer.resize((max(end, len(buffer) * 3 // 2), *buffer.shape[1:]), refcheck=False)
        target = buffer[self._count : end]
        if target.shape != rows.shape:
            target[...] = PADDING
        target[(slice(None), *map(slice, rows.shape[1:]))] = rows
        self._count = end

    def _fit(self, buffer: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """A larger buffer with the current rows, for rows of another shape or dtype."""
        if buffer.ndim != rows.ndim:
            raise DataError(
                "Outputs and labels must have the same number of axes in every batch. "
                f"Received: shapes {self._longest} and {rows.shape[1:]} (without the first "
                "axis). Return one shape from preprocess_logits_for_metrics, or set "
                "eval_do_concat_batches=False."
            )
        dtype = np.result_type(buffer.dtype, rows.dtype)
        if self._longest != rows.shape[1:] and dtype.kind in "bu":
            raise DataError(
                f"Outputs or labels of dtype {dtype} have different lengths, but the padding value "
                f"{PADDING} is not representable in this dtype. Cast them to a signed integer or "
                "a float, or set eval_do_concat_batches=False. "
                f"Received: shapes {self._longest} and {rows.shape[1:]} (without the first axis)"
            )
        self._longest = tuple(map(max, self._longest, rows.shape[1:]))
        if dtype == buffer.dtype and all(map(operator.le, self._longest, buffer.shape[1:])):
            return buffer
        shape = [
            old if new <= old else max(new, old * 5 // 4)
            for new, old in zip(self._longest, buffer.shape[1:], strict=True)
        ]
        wider = np.empty((len(buffer), *shape), dtype)
        wider[: self._count] = PADDING
        wider[(slice(self._count), *map(slice, buffer.shape[1:]))] = buffer[: self._count]
        return wider

    def result(self) -> np.ndarray:
        """All rows. No rows may be added afterwards."""
        assert self._buffer is not None
        if self._longest != self._buffer.shape[1:]:
            rows = (slice(self._count), *map(slice, self._longest))
            return np.ascontiguousarray(self._buffer[rows])
        if self._count < len(self._buffer):
            self._buffer.resize((self._count, *self._longest), refcheck=False)
        return self._buffer


class OutputBlock(Protocol):
    """The outputs of consecutive batches of equal shapes.

    Attributes:
        outputs, labels, inputs: Structures of arrays ``(batches, batch size, ...)``, or None.
        losses: The mean loss of each batch, ``(batches,)``, or None.
        batches: Number of batches.
        size: Samples per batch.
    """

    outputs: Any
    labels: Any
    inputs: Any
    losses: np.ndarray | None
    batches: int
    size: int


NAMES = ("outputs", "labels", "inputs", "losses")


class ConcatenatedOutputs:
    """Concatenates all batches into one array per output.

    Args:
        expected: The number of samples, if known.
    """

    def __init__(self, expected: int | None) -> None:
        self._expected = expected
        self._rows: dict[str, Any] = {}

    def add(self, block: OutputBlock) -> None:
        """Append the batches of ``block``."""
        for name in NAMES:
            tree = getattr(block, name)
            if name == "losses" and tree is not None:
                tree = np.repeat(tree.astype(np.float32), block.size).reshape(-1, block.size)
            if tree is None:
                continue
            if name not in self._rows:
                self._rows[name] = map_structure(lambda x: self._make(x, block), tree)
            map_structure(lambda rows, x: rows.add(_merge(x)), self._rows[name], tree)

    def _make(self, x: np.ndarray, block: OutputBlock) -> Rows:
        # The number of rows is unknown for an output without one row per sample (a scalar or a
        # matrix per batch).
        per_sample = x.ndim > 1 and x.shape[1] == block.size
        return Rows(self._expected if per_sample else None)

    def take(self) -> dict[str, Any]:
        """The arrays, by name."""
        return {
            name: map_structure(lambda rows: rows.result(), rows)
            for name, rows in self._rows.items()
        }


class ListedOutputs:
    """Collects the arrays of each batch in lists (``eval_do_concat_batches=False``)."""

    def __init__(self) -> None:
        self._lists: dict[str, list[Any]] = {}

    def add(self, block: OutputBlock) -> None:
        """Append the batches of ``block``."""
        for batch in batches_of(block):
            for name, tree in batch.items():
                self._lists.setdefault(name, []).append(tree)

    def take(self) -> dict[str, Any]:
        """The lists, by name."""
        return self._lists


class BatchwiseMetrics:
    """Calls ``compute_metrics`` for each batch (``batch_eval_metrics=True``).

    Args:
        compute_metrics: ``(EvalPrediction, compute_result) -> dict``; only the last call has
            ``compute_result=True``, and only its result counts.
    """

    def __init__(self, compute_metrics: Callable[..., Any]) -> None:
        self._compute = compute_metrics
        self._waiting: dict[str, Any] | None = None

    def add(self, block: OutputBlock) -> None:
        """Process all batches but the newest, which may be the last one."""
        for batch in batches_of(block):
            if self._waiting is not None:
                compute_on_host(self._compute, self._waiting, compute_result=False)
            self._waiting = batch if "labels" in batch else None

    def result(self) -> dict[str, Any]:
        """Process the last batch and return the result of ``compute_metrics``."""
        if self._waiting is None:
            return {}
        return compute_on_host(self._compute, self._waiting, compute_result=True)


def batches_of(block: OutputBlock) -> Iterator[dict[str, Any]]:
    """Copies of the arrays of each batch."""
    for i in range(block.batches):
        batch = {
            name: map_structure(lambda x, i=i: np.array(x[i]), getattr(block, name))
            for name in ("outputs", "labels", "inputs")
            if getattr(block, name) is not None
        }
        if block.losses is not None:
            batch["losses"] = np.full(block.size, block.losses[i], np.float32)
        yield batch


def compute_on_host(
    compute_metrics: Callable[..., Any],
    gathered: Mapping[str, Any],
    compute_result: bool | None = None,
) -> dict[str, Any]:
    """Call ``compute_metrics``, for one batch if ``compute_result`` is not None.

    Returns:
        The metrics; empty for a batch that is not the last one.
    """
    kwargs = {} if compute_result is None else {"compute_result": compute_result}
    try:
        values = compute_metrics(prediction(gathered), **kwargs)
    except Exception as error:
        error.add_note("Raised by compute_metrics.")
        raise
    return {} if compute_result is False else checked_metrics(values)


def prediction(gathered: Mapping[str, Any]) -> EvalPrediction:
    """Build the argument of ``compute_metrics``."""
    return EvalPrediction(
        gathered["outputs"], gathered["labels"], gathered.get("inputs"), gathered.get("losses")
    )


def check_batchwise(compute_metrics: Any) -> None:
    """Check that ``compute_metrics`` can be called batch by batch.

    Raises:
        ConfigurationError: It does not take ``compute_result``.
    """
    if compute_metrics is None:
        return
    parameters = inspect.signature(compute_metrics).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    if "compute_result" not in parameters and not takes_any:
        raise ConfigurationError(
            "batch_eval_metrics=True calls compute_metrics(prediction, compute_result=...) for "
            "each batch, with True for the last one. Add that argument. "
            f"Received: compute_metrics with the arguments {list(parameters)}."
        )


def checked_metrics(values: Any) -> dict[str, Any]:
    """The result of ``compute_metrics`` as JSON values.

    Raises:
        ConfigurationError: It is not a dict, or a value is not a number.
    """
    if not isinstance(values, Mapping):
        raise ConfigurationError(
            "compute_metrics must return a dict from names to numbers. "
            f"Received: {type(values).__name__}."
        )
    return plain_values(values, "compute_metrics returned")


def _merge(x: np.ndarray) -> np.ndarray:
    """Merge the batches along one axis; an output without a batch axis gives one row per batch."""
    return x.reshape(-1, *x.shape[2:]) if x.ndim > 1 else x
