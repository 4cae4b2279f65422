"""Orders that depend on the lengths of samples: less padding, or micro-batches of equal cost."""

from __future__ import annotations

import numpy as np

from kbtrain.errors import ConfigurationError, DataError

MEGA_BATCHES = 50
"""Maximum number of batches that ``group_by_length`` sorts together."""

QUADRATIC = 0.001
"""Weight of the quadratic cost of attention, see ``rebalance``."""


def group_by_length(order: np.ndarray, lengths: np.ndarray, batch_size: int) -> np.ndarray:
    """Group samples of similar length, keeping most of the randomness of an order.

    The order is split into mega-batches of ``min(n // (4 * batch_size), 50)`` batches (at least
    one), and each is sorted from long to short. The longest sample of all is swapped with the
    first, so that running out of memory shows at once.

    Args:
        order: Indices of shape ``(n,)``, the random order of the epoch.
        lengths: Length of each sample, shape ``(n,)``.
        batch_size: Samples of one update.

    Returns:
        The same indices in a different order.

    Example:
        >>> group_by_length(np.arange(6), np.array([1, 3, 2, 9, 7, 8]), 3).tolist()
        [3, 2, 0, 1, 5, 4]
    """
    if not len(order):
        return order
    mega = batch_size * max(1, min(len(order) // (batch_size * 4), MEGA_BATCHES))
    visited = lengths[order]
    # The last key is the primary one; equal lengths keep the random order.
    grouped = order[np.lexsort((-visited, np.arange(len(order)) // mega))]
    heads = np.arange(0, len(order), mega)
    longest = heads[np.argmax(lengths[grouped[heads]])]
    grouped[[0, longest]] = grouped[[longest, 0]]
    return grouped


def rebalance(lengths: np.ndarray, groups: int) -> list[np.ndarray]:
    """Split the samples of one update into micro-batches that cost about the same.

    Padded to its longest sample ``L``, a micro-batch of ``k`` samples costs
    ``k * L + 0.001 * k * L^2``. The samples are sorted by length and split into ``groups`` runs
    with the lowest possible maximum cost: many short samples, or a few long ones.

    Args:
        lengths: Lengths of the samples of the update, shape ``(n,)``.
        groups: Number of micro-batches, at most ``n``.

    Returns:
        Positions in ``lengths`` for each micro-batch, the costliest first, so that running out of
        memory shows at once.

    Example:
        >>> [group.tolist() for group in rebalance(np.arange(1, 13), 4)]
        [[4, 3, 2, 1, 0], [11, 10], [7, 6, 5], [9, 8]]
    """
    longest_first = np.argsort(-lengths, kind="stable")
    each = lengths[longest_first].astype(np.float64)
    each += QUADRATIC * each**2
    low, high = 0.0, float(each[0]) * len(each)
    best = _split_by_cost(each, groups, high)
    # The maximum cost is one of finitely many numbers, which bisection finds well within 60 steps.
    for _ in range(60):
        if high - low <= 1e-9 * high:
            break
        middle = (low + high) / 2
        cuts = _split_by_cost(each, groups, middle)
        if cuts is None:
            low = middle
        else:
            best, high = cuts, middle
    assert best is not None  # with the first limit everything fits into one micro-batch
    parts = [(float(each[a]) * (b - a), longest_first[a:b]) for a, b in best]
    parts.sort(key=lambda part: -part[0])
    return [part for _, part in parts]


def _split_by_cost(each: np.ndarray, groups: int, limit: float) -> list[tuple[int, int]] | None:
    """Split into exactly ``groups`` runs of costs up to ``limit``; None if that is impossible."""
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
    """Validate lengths and convert them to an array of integers, one for each sample.

    Raises:
        DataError: There are too few or too many, or they are not valid lengths.
    """
    lengths = np.asarray(values)
    if lengths.shape != (count,) or lengths.dtype.kind not in "iuf":
        raise DataError(
            f"There must be one length for each of the {count} samples of {name}. "
            f"Received: shape {lengths.shape}, dtype {lengths.dtype}"
        )
    if count and lengths.min() < 0:
        raise DataError(f"The lengths of {name} must not be negative. Received: {lengths.min()}")
    return lengths.astype(np.int64)


def no_lengths(name: str, column: str, why: str) -> ConfigurationError:
    """The error for data whose lengths cannot be determined."""
    return ConfigurationError(
        f"This train_sampling_strategy needs the length of each sample of {name}, but {why}. Add "
        f"a column {column!r} to the data (for another name set length_column_name), or an "
        "attribute `lengths`, or use train_sampling_strategy='random'."
    )
