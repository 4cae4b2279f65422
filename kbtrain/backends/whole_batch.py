"""Layers that look at their batch as a whole, in a step that sees some of its rows.

With several processes each runs the layers on its rows. Two things would then differ from one
process that runs them on all rows: batch normalization, whose statistics are those of the batch,
and random numbers, such as the masks of dropout. Inside ``whole_batch`` they are the same:

- ``BatchNormalization`` adds up its sums over the processes.
- A random tensor with as many rows as the batch has here is drawn for the whole batch, from the
  same seed on all processes, and cut to these rows. One of another length (noise for weights, say)
  is drawn as it is, so that it is equal on all processes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import keras
from keras import ops

from kbtrain.backends.rows import LocalRows, taken, whole
from kbtrain.utils.fallback import report

AllSum = Callable[[Sequence[Any]], list[Any]]

_current: tuple[LocalRows, AllSum] | None = None


def is_active() -> bool:
    """Whether the statistics of batches are being added up over processes."""
    return _current is not None


def rows_in_all(rows: int) -> int:
    """The number of rows of the whole batch, of which this process sees ``rows``."""
    return rows if _current is None else _current[0].total


def sum_in_all(value: Any) -> Any:
    """The sum over processes of what each has for its rows."""
    if _current is None:
        return value
    rows, all_sum = _current
    return all_sum([value if rows.size else ops.zeros_like(value)])[0]


@contextlib.contextmanager
def whole_batch(rows: LocalRows, all_sum: AllSum) -> Iterator[None]:
    """Context in which layers compute what they would on the whole batch.

    Args:
        rows: The rows that this process computes.
        all_sum: Adds up tensors over the processes.
    """
    global _current
    before = _current
    with contextlib.ExitStack() as replaced:
        for name, make in _drawn(rows).items():
            _replace(replaced, _keras_random, name, make, "Random numbers")
        _replace(
            replaced,
            lambda: keras.layers.BatchNormalization,
            "_moments",
            lambda _: _moments(rows, all_sum),
            "The statistics of BatchNormalization",
        )
        _current = rows, all_sum
        try:
            yield
        finally:
            _current = before


@contextlib.contextmanager
def rows_of(batch: Any, joined: tuple[int, int] | None, all_sum: AllSum) -> Iterator[LocalRows]:
    """Context in which a step runs on its rows of a batch: ``Backend.local_rows``.

    Args:
        batch: A batch from ``to_device``.
        joined: Rank and number of the processes; None for one.
        all_sum: Adds up tensors over the processes.
    """
    found = None if joined is None else taken(batch, *joined)
    if found is None:
        yield whole(batch, keras.tree.flatten(batch)[0].shape[0])
        return
    with whole_batch(found, all_sum):
        yield found


def _keras_random() -> Any:
    from keras.src import backend

    return backend.random


def _replace(
    replaced: contextlib.ExitStack,
    owner: Callable[[], Any],
    name: str,
    make: Callable[[Any], Any],
    what: str,
) -> None:
    """Replace an attribute of Keras; report once where it is not found."""
    try:
        original = getattr(owner(), name)
    except (ImportError, AttributeError) as error:
        instead = f"{what} are those of each process's rows, not of the whole batch."
        report(f"{what} over several processes", "keras", error, instead)
        return
    replaced.enter_context(mock.patch.object(owner(), name, make(original)))


# --- random numbers -------------------------------------------------------------------------------


def _drawn(rows: LocalRows) -> dict[str, Callable[[Any], Callable[..., Any]]]:
    """Replacements of Keras' random functions, which take the original ones."""
    here = rows.rows

    def cut(tensor: Any) -> Any:
        # Without rows of its own a process runs on the first row of another.
        return tensor[rows.start : rows.stop] if rows.size else tensor[:here]

    def is_row_wise(shape: Any) -> bool:
        return bool(len(shape)) and shape[0] == here and here != rows.total

    def by_shape(original: Any) -> Callable[..., Any]:
        def draw(shape: Any, *args: Any, **kwargs: Any) -> Any:
            shape = tuple(shape)
            if not is_row_wise(shape):
                return original(shape, *args, **kwargs)
            whole = (rows.total, *shape[1:])
            return cut(original(whole, *map(_spread, args), **_spread_all(kwargs)))

        def _spread(value: Any) -> Any:
            """A parameter with a value for each row, such as the rate of a distribution."""
            if not ops.is_tensor(value) or not is_row_wise(value.shape):
                return value
            lead = rows.start if rows.size else 0
            tail = rows.total - lead - here
            return ops.pad(value, [(lead, tail)] + [(0, 0)] * (len(value.shape) - 1), "constant", 1)

        def _spread_all(kwargs: dict[str, Any]) -> dict[str, Any]:
            return {n: v if n == "seed" else _spread(v) for n, v in kwargs.items()}

        return draw

    def dropout(original: Any) -> Callable[..., Any]:
        def drop(inputs: Any, rate: Any, noise_shape: Any = None, seed: Any = None) -> Any:
            if not is_row_wise(inputs.shape):
                return original(inputs, rate, noise_shape, seed)
            shape = (rows.total, *inputs.shape[1:])
            if noise_shape is not None:
                given = tuple(noise_shape)
                shape = tuple(
                    size if asked is None else asked
                    for size, asked in zip(shape, given, strict=True)
                )
                if given[0] is not None:
                    if not is_row_wise(given):
                        return original(inputs, rate, noise_shape, seed)
                    shape = (rows.total, *shape[1:])
            kept = original(ops.ones(shape, inputs.dtype), rate, None, seed)
            return inputs * ops.stop_gradient(cut(kept))

        return drop

    def categorical(original: Any) -> Callable[..., Any]:
        def draw(logits: Any, *args: Any, **kwargs: Any) -> Any:
            if not is_row_wise(logits.shape):
                return original(logits, *args, **kwargs)
            lead = rows.start if rows.size else 0
            padding = [(lead, rows.total - lead - here), (0, 0)]
            return cut(original(ops.pad(logits, padding), *args, **kwargs))

        return draw

    shapes = ("normal", "uniform", "truncated_normal", "randint", "gamma", "binomial", "beta")
    return {**dict.fromkeys(shapes, by_shape), "dropout": dropout, "categorical": categorical}


# --- batch normalization --------------------------------------------------------------------------


def _moments(rows: LocalRows, all_sum: AllSum) -> Callable[..., tuple[Any, Any]]:
    """``BatchNormalization._moments`` over all processes."""

    def moments(self: Any, inputs: Any, mask: Any) -> tuple[Any, Any]:
        axes = self._reduction_axes
        valid = ops.ones_like(inputs)
        if mask is not None:
            mask = ops.broadcast_to(ops.expand_dims(mask, -1), ops.shape(inputs))
            valid = ops.cast(mask, inputs.dtype)
        if not rows.size:
            valid = ops.zeros_like(inputs)
        masked = mask is not None or not rows.size
        kept = ops.where(valid > 0, inputs, ops.zeros_like(inputs)) if masked else inputs
        total, count = all_sum([ops.sum(kept, axes, keepdims=True), ops.sum(valid, axes)])
        if mask is not None:
            count = count + keras.config.epsilon()
        shape = ops.shape(total)
        mean = total / ops.reshape(count, shape)
        difference = (inputs - mean) * valid if masked else inputs - mean
        (squares,) = all_sum([ops.sum(ops.square(difference), axes, keepdims=True)])
        variance = squares / ops.reshape(count, shape)
        return ops.reshape(mean, count.shape), ops.reshape(variance, count.shape)

    return moments
