"""TensorFlow: several processes that train together."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import keras

from kbtrain.backends.rows import LocalRows, whole
from kbtrain.utils.processes import ProcessGroup


def joined_processes() -> tuple[int, int] | None:
    """``(rank, size)`` if the framework's processes have been joined by another program."""
    return None


def start_processes(group: ProcessGroup, timeout: float) -> None:
    """Join the processes of ``group``."""
    raise NotImplementedError


def stop_processes() -> None:
    """Leave the processes; do nothing if none were joined."""


def exchange(data: bytes) -> list[bytes]:
    """The ``data`` of every process, in order of rank."""
    return [data]


def shards() -> int:
    """The number of processes whose rows of a batch a step sees separately."""
    return 1


def all_sum(tensors: Sequence[Any]) -> list[Any]:
    """The sums over all shards of each tensor."""
    return list(tensors)


def all_gather(tensors: Sequence[Any]) -> list[Any]:
    """Each tensor of all shards along a new first axis."""
    return [keras.ops.expand_dims(tensor, 0) for tensor in tensors]


def copy_from_first(variables: Sequence[keras.Variable]) -> None:
    """Give variables the values that they have in process 0."""


@contextlib.contextmanager
def local_rows(batch: Any) -> Iterator[LocalRows]:
    """Context in which a step runs on its rows of a batch."""
    yield whole(batch, keras.tree.flatten(batch)[0].shape[0])
