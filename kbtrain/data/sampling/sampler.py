"""The order in which samples are visited: a pure function of (length, seed, epoch).

There is no random stream with a state, so the order of any epoch can be computed at any time, in
any process and on any backend, and a resumed run computes it again.
"""

from __future__ import annotations

import numpy as np

from kbtrain.data.sampling.by_length import group_by_length
from kbtrain.data.sampling.permutation import FeistelPermutation
from kbtrain.errors import ConfigurationError

Order = np.ndarray | range | FeistelPermutation
"""Sample indices in the order of visits, accessed by slices; a ``range`` if consecutive."""

STRATEGIES = ("batch_rebalance", "group_by_length", "random", "sequential")
"""Names of the orders."""

NEED_LENGTHS = ("batch_rebalance", "group_by_length")
"""The orders that depend on the lengths of samples."""

MAX_STORED = 1 << 22
"""Longest random order that is stored as an array (32 MiB); longer ones are computed lazily.

Must not be changed: it determines the order of the data, which resumed runs depend on."""


def epoch_order(
    length: int,
    seed: int,
    epoch: int,
    strategy: str = "random",
    lengths: np.ndarray | None = None,
    batch_size: int = 1,
) -> Order:
    """Return the order in which an epoch visits ``length`` samples.

    Args:
        length: Number of samples.
        seed: Any integer >= 0; the run's data seed.
        epoch: Number of the epoch, from 0.
        strategy: ``"random"`` for a new permutation each epoch, ``"sequential"`` for 0, 1, ...,
            ``"group_by_length"`` for one that groups similar lengths
            (``kbtrain.data.sampling.by_length``). ``"batch_rebalance"`` has the order of
            ``"random"``; it only changes how an update is split into micro-batches.
        lengths: Length of each sample, for ``"group_by_length"``.
        batch_size: Samples of an update, for ``"group_by_length"``.

    Returns:
        An int64 array of shape ``(length,)``; a ``range`` for ``"sequential"``; for more than
        ``MAX_STORED`` samples a ``FeistelPermutation``, whose slices are arrays.

    Raises:
        ConfigurationError: The strategy is unknown, or a number is negative.

    Example:
        >>> epoch_order(4, seed=0, epoch=0, strategy="sequential")
        range(0, 4)
        >>> sorted(epoch_order(4, seed=0, epoch=0).tolist())
        [0, 1, 2, 3]
    """
    check_strategy(strategy)
    if min(length, seed, epoch) < 0:
        raise ConfigurationError(
            "length, seed and epoch must be integers >= 0. "
            f"Received: length={length}, seed={seed}, epoch={epoch}"
        )
    if strategy == "sequential":
        return range(length)
    order = _random_order(length, seed, epoch)
    if strategy == "group_by_length":
        assert lengths is not None
        return group_by_length(np.asarray(order[:]), lengths, batch_size)
    return order


def check_strategy(strategy: str) -> None:
    """Raise a ``ConfigurationError`` that lists the strategies unless this is one of them."""
    if strategy not in STRATEGIES:
        known = ", ".join(repr(name) for name in sorted(STRATEGIES))
        raise ConfigurationError(
            f"Unknown sampling strategy. Expected one of {known}. Received: strategy={strategy!r}"
        )


def _random_order(length: int, seed: int, epoch: int) -> Order:
    """A new permutation for each epoch."""
    if length > MAX_STORED:
        return FeistelPermutation(length, seed, epoch)
    return _sorted_keys(length, seed, epoch)


def _sorted_keys(length: int, seed: int, epoch: int) -> np.ndarray:
    """Permute by sorting random keys.

    ``Generator.permutation`` would be as short, but NumPy may change its stream between versions;
    the raw words of a bit generator never change. Each key has its index in the low bits, so a
    plain sort of 64-bit integers is enough and there are no ties. The remaining random bits (42 for
    four million samples) are more than enough for the order.
    """
    # spawn_key, not [seed, epoch]: a seed above 32 bits would overlap with the epoch's word.
    words = np.random.Philox(np.random.SeedSequence(seed, spawn_key=(epoch,))).random_raw(length)
    index_bits = np.uint64(max(length - 1, 0).bit_length())
    keys = words.astype(np.uint64, copy=False)
    keys >>= index_bits
    keys <<= index_bits
    keys |= np.arange(length, dtype=np.uint64)
    keys.sort()
    keys &= (np.uint64(1) << index_bits) - np.uint64(1)
    return keys.view(np.int64)
