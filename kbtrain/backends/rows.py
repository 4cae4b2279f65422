"""The rows of a batch that one process computes, of several that train together.

A batch is that of all processes; each takes consecutive rows of it when the batch is copied to its
device. The number of rows of the whole batch travels with them as the shape of an empty array, so
that a step that was compiled for another position in a batch is not used for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from kbtrain.data.tree import map_structure
from kbtrain.utils.machine.processes import current

_BATCH, _ROWS = "kbtrain_batch", "kbtrain_rows"


class LocalRows(NamedTuple):
    """The rows of a batch that this process computes.

    Attributes:
        batch: The rows.
        total: The number of rows of the whole batch.
        start: Index of the first of these rows.
        stop: Index after the last of them. If it equals ``start``, there is none for this process:
            ``batch`` then has a row of another one, which must not count.
        rows: The number of rows in ``batch``.
    """

    batch: Any
    total: int
    start: int
    stop: int
    rows: int

    @property
    def size(self) -> int:
        """The number of rows that count; 0 if they are another's."""
        return self.stop - self.start


def span(total: int, index: int, parts: int) -> tuple[int, int]:
    """The rows ``start`` to ``stop`` of one of several parts: sizes differ by one at most.

    Example:
        >>> [span(5, i, 2) for i in range(2)]
        [(0, 2), (2, 5)]
    """
    return total * index // parts, total * (index + 1) // parts


def share(tree: Any, index: int, parts: int) -> Any:
    """Take the rows of one of several parts.

    Args:
        tree: The chunks of a block, or the batches of an evaluation along a leading axis.
        index: The part to take.
        parts: The number of parts.

    Returns:
        A structure of the same form; each batch is replaced by one that ``taken`` reads.
    """
    if not isinstance(tree, list):
        return _share(tree, 1, index, parts)
    # The rows of stacked micro-batches are along the axis after them.
    return [
        {
            kind: _share(batch, 1 + (kind == "stacked"), index, parts)
            for kind, batch in chunk.items()
        }
        for chunk in tree
    ]


def own_share(tree: Any) -> Any:
    """``share`` for this process, on the host; the whole tree where it is alone."""
    group = current()
    return tree if group.size == 1 else share(tree, group.rank, group.size)


def _share(batch: Any, axis: int, index: int, parts: int) -> Any:
    leaves: list[np.ndarray] = []
    map_structure(leaves.append, batch)
    with_rows = [leaf for leaf in leaves if leaf.ndim > axis]
    lead = leaves[0].shape[:axis]
    total = with_rows[0].shape[axis] if with_rows else 0
    start, stop = span(total, index, parts)
    if start == stop:
        start, stop = 0, min(1, total)
    cut = (slice(None),) * axis + (slice(start, stop),)

    def take(leaf: np.ndarray) -> np.ndarray:
        has_rows = leaf.ndim > axis and leaf.shape[axis] == total
        return np.ascontiguousarray(leaf[cut]) if has_rows else leaf

    return {_BATCH: map_structure(take, batch), _ROWS: np.zeros((*lead, total, 0), bool)}


def taken(batch: Any, index: int, parts: int) -> LocalRows | None:
    """The rows in a batch from ``share``; None for another batch.

    Args:
        batch: The batch, as tensors.
        index: The part that was taken.
        parts: The number of parts.
    """
    if not isinstance(batch, Mapping) or _ROWS not in batch:
        return None
    total = batch[_ROWS].shape[-2]
    start, stop = span(total, index, parts)
    return LocalRows(batch[_BATCH], total, start, stop, max(stop - start, 1))


def whole(batch: Any, rows: int) -> LocalRows:
    """A batch that this process computes alone."""
    return LocalRows(batch, rows, 0, rows, rows)


def gather_rows(shards: int, all_gather: Any, tree: Any, rows: LocalRows) -> Any:
    """The rows of all processes, in order, of tensors with this process's rows along axis 0.

    Args:
        shards: The number of processes.
        all_gather: See ``Backend.all_gather``.
        tree: A structure of tensors. What has another first axis, or is no tensor, stays as it is.
        rows: The rows of this process.
    """
    leaves = keras.tree.flatten(tree)
    found = [i for i, leaf in enumerate(leaves) if has_rows(leaf, rows)]
    longest = -(-rows.total // shards)

    def padded(x: Any) -> Any:
        missing = longest - rows.rows
        return ops.pad(x, [(0, missing)] + [(0, 0)] * (len(x.shape) - 1)) if missing else x

    gathered = all_gather([padded(leaves[i]) for i in found])
    sizes = [stop - start for start, stop in (span(rows.total, i, shards) for i in range(shards))]
    for i, parts in zip(found, gathered, strict=True):
        leaves[i] = ops.concatenate([parts[j, :size] for j, size in enumerate(sizes) if size])
    return keras.tree.pack_sequence_as(tree, leaves)


def has_rows(leaf: Any, rows: LocalRows) -> bool:
    """Whether a leaf is a tensor with this process's rows along axis 0."""
    return ops.is_tensor(leaf) and len(leaf.shape) > 0 and leaf.shape[0] == rows.rows
