"""Orders that look at how long the samples are: less padding, or micro-batches of equal cost."""

from __future__ import annotations

import numpy as np

from kbtrain.errors import ConfigurationError, DataError

MEGA_BATCHES = 50
"""Batches that are sorted together by ``group_by_length``, at most."""

QUADRATIC = 0.001
"""Weight of the term of attention in the cost of a batch, see ``rebalance``."""


def group_by_length(order: np.ndarray, lengths: np.ndarray, batch_size: int) -> np.ndarray:
    """Bring samples of similar length together, keeping most of the randomness of an order.

    The order is cut into mega-batches of ``min(n // (4 * batch_size), 50)`` batches (at least one),
    and each is sorted from long to short. The longest sample of all changes places with the first,
    so that a lack of memory shows at once.

    Args:
        order: Indices of shape ``(n,)``, the random order of the epoch.
        lengths: Length of each sample, shape ``(n,)``.
        batch_size: Samples of one update.

    Returns:
        The same indices in another order.

    Example:
        >>> group_by_length(np.arange(6), np.array([1, 3, 2, 9, 7, 8]), 3).tolist()
        [3, 2, 0, 1, 5, 4]
    """
    if not len(order):
        return order
    mega = batch_size * max(1, min(len(order) // (batch_size * 4), MEGA_BATCHES))
    visited = lengths[order]
    # The last key counts first; equal lengths keep the random order.
    grouped = order[np.lexsort((-visited, np.arange(len(order)) // mega))]
    heads = np.arange(0, len(order), mega)
    longest = heads[np.argmax(lengths[grouped[heads]])]
    grouped[[0, longest]] = grouped[[longest, 0]]
    return grouped


def rebalance(lengths: np.ndarray, groups: int) -> list[np.ndarray]:
    """Split the samples of one update into micro-batches that cost about the same.

    Padded to its longest sample ``L``, a micro-batch of ``k`` samples costs
    ``k * L + 0.001 * k * L^2``. The samples are sorted by length and cut into ``groups`` runs so
    that the highest cost is as low as it can be: many short samples, or few long ones.

    Args:
        lengths: Lengths of the samples of the update, shape ``(n,)``.
        groups: Number of micro-batches, at most ``n``.

    Returns:
        Positions in ``lengths`` for each micro-batch, the costliest micro-batch first, so that a
        lack of memory shows at once.

    Example:
        >>> [group.tolist() for group in rebalance(np.arange(1, 13), 4)]
        [[4, 3, 2, 1, 0], [11, 10], [7, 6, 5], [9, 8]]
    """
    longest_first = np.argsort(-lengths, kind="stable")
    each = lengths[longest_first].astype(np.float64)
    each += QUADRATIC * each**2
    low, high = 0.0, float(each[0]) * len(each)
    best = _cut(each, groups, high)
    # The highest cost is one of finitely many numbers: halving finds it long before 60 times.
    for _ in range(60):
        if high - low <= 1e-9 * high:
            break
        middle = (low + high) / 2
        cuts = _cut(each, groups, middle)
        if cuts is None:
            low = middle
        else:
            best, high = cuts, middle
    assert best is not None  # everything fits into one micro-batch of the first limit
    parts = [(float(each[a]) * (b - a), longest_first[a:b]) for a, b in best]
    parts.sort(key=lambda part: -part[0])
    return [part for _, part in parts]


def _cut(each: np.ndarray, groups: int, limit: float) -> list[tuple[int, int]] | None:
    """Runs of costs up to ``limit``, exactly ``groups`` of them; None if that many do not do."""
    cuts, start = [], 0
    for left in range(groups, 0, -1):
        available = len(each) - start - (left - 1)  # every later one needs a sample
        fits = available if each[start] * available <= limit else int(limit / each[start])
        count = min(available, fits)
        if count < 1:
            return None
        cuts.append((start, start + count))
        start += count
    return cuts if start == len(each) else None


def checked_lengths(values: object, count: int, name: str) -> np.ndarray:
    """Lengths as an array of integers, one for each sample.

    Raises:
        DataError: There are too few or too many, or they are no lengths.
    """
    lengths = np.asarray(values)
    if lengths.shape != (count,) or lengths.dtype.kind not in "iuf":
        raise DataError(
            f"The lengths of {name} must be one number for each of its {count} samples. "
            f"Received: shape {lengths.shape}, dtype {lengths.dtype}"
        )
    if count and lengths.min() < 0:
        raise DataError(f"The lengths of {name} must not be negative. Received: {lengths.min()}")
    return lengths.astype(np.int64)


def no_lengths(name: str, column: str, why: str) -> ConfigurationError:
    """The error for data whose lengths cannot be found."""
    return ConfigurationError(
        f"This train_sampling_strategy needs the length of each sample of {name}, and {why}. Give "
        f"the data a column {column!r} (another name: length_column_name), or an attribute "
        "`lengths`, or use train_sampling_strategy='random'."
    )
