"""Identifies the data sets of other libraries without importing them.

For data that could yield either, Keras' convention applies: a ``tf.data.Dataset`` and a
``PyDataset`` yield batches, and so does a Grain data set with a ``batch`` transformation.
"""

from __future__ import annotations

import itertools
import logging
import operator
from collections.abc import Iterator
from typing import Any

from kbtrain.data.tree import leaves_with_paths
from kbtrain.errors import DataError

logger = logging.getLogger("kbtrain")


def derives_from(value: Any, class_name: str, package: str = "") -> bool:
    """Whether ``value`` is an instance of a class of that name from that package."""
    return any(
        cls.__name__ == class_name and cls.__module__.partition(".")[0].startswith(package)
        for cls in type(value).__mro__
    )


def yields_batches(data: Any) -> bool:
    """Whether the elements of ``data`` are batches rather than samples."""
    if is_tf_dataset(data) or derives_from(data, "PyDataset"):
        return True
    if is_grain(data):
        return any("Batch" in type(step).__name__ for step in _grain_steps(data))
    knows_samples = hasattr(data, "dataset") or hasattr(data, "num_examples")
    return hasattr(data, "batch_size") and knows_samples


def is_tf_dataset(data: Any) -> bool:
    """Whether ``data`` is a ``tf.data.Dataset``."""
    return derives_from(data, "DatasetV2", "tensorflow")


def is_grain(data: Any) -> bool:
    """Whether ``data`` is one of Grain's data sets or loaders."""
    kinds = ("MapDataset", "IterDataset", "DataLoader")
    return any(derives_from(data, kind, "grain") for kind in kinds)


def _grain_steps(data: Any) -> Iterator[Any]:
    """The transformations of a Grain data set or loader, last one first."""
    yield from getattr(data, "_operations", ())
    while data is not None:
        yield data
        parents = getattr(data, "_parents", None) or (None,)
        data = parents[0]


def _tf_steps(data: Any) -> Iterator[Any]:
    """The transformations of a ``tf.data.Dataset``."""
    yield data
    for parent in data._inputs():
        yield from _tf_steps(parent)


ENDLESS_LENGTH = 2**48
"""Lengths from here on mean endless data: Grain's ``repeat()`` has one near the largest int."""


def is_endless(data: Any) -> bool:
    """Whether data declares itself to be endless."""
    if is_tf_dataset(data):
        return int(data.cardinality()) == -1  # tf.data.INFINITE_CARDINALITY
    if isinstance(data, (itertools.cycle, itertools.count)):
        return True
    if isinstance(data, itertools.repeat):
        return operator.length_hint(data, -1) < 0
    try:
        if derives_from(data, "PyDataset"):
            return data.num_batches is None
        return len(data) >= ENDLESS_LENGTH
    except (TypeError, NotImplementedError, AttributeError):
        return False
    except OverflowError:
        return True


def check_batched(data: Any, name: str) -> None:
    """Raise a ``DataError`` for a ``tf.data.Dataset`` whose elements can only be samples."""
    if not is_tf_dataset(data):
        return
    for path, spec in leaves_with_paths(data.element_spec, "element"):
        if spec.shape.rank == 0:
            raise DataError(
                f"{name} is a tf.data.Dataset of samples: {path} is a scalar. As in Keras, it must "
                "yield batches. Pass dataset.batch(n). "
                f"Received: element_spec={data.element_spec}"
            )


def ends_epochs(data: Any) -> bool:
    """Whether ``data`` is a ``PyDataset`` with its own ``on_epoch_end``."""
    if not derives_from(data, "PyDataset"):
        return False
    owner = next(cls for cls in type(data).__mro__ if "on_epoch_end" in cls.__dict__)
    return owner.__name__ != "PyDataset"


def resume_caveat(data: Any) -> str | None:
    """Why a resumed run on ``data`` may see different data; None if it does not.

    A resumed run reads and skips the data before its position, so the resume is exact if the order
    is the same on every read.
    """
    if is_tf_dataset(data):
        shuffles = any("Shuffle" in type(step).__name__ for step in _tf_steps(data))
        return (
            "it shuffles, and its order depends on how often it was iterated in the process"
            if shuffles
            else None
        )
    sampler = getattr(data, "sampler", None)
    if sampler is not None and hasattr(data, "dataset"):
        # The second is torch's sampler for streams, whose order is that of the stream.
        in_order = type(sampler).__name__ in ("SequentialSampler", "_InfiniteConstantSampler")
        if in_order or hasattr(sampler, "set_epoch"):
            return None
        return (
            f"its {type(sampler).__name__} draws a new order (for an exact resume pass "
            "`loader.dataset`, with `loader.collate_fn` as data_collator)"
        )
    if ends_epochs(data):
        return (
            "its on_epoch_end changes it (after a resume it is called once for each completed "
            "epoch, which is the same only if it draws from a generator of its own)"
        )
    if isinstance(data, Iterator):
        return "it is an iterator (after a resume a new one is read from its beginning)"
    return None
