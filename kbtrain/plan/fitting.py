"""How much fits: the largest batch, found with few compilations."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from kbtrain.utils.json_types import JsonDataclass

MOST_COMPILATIONS = 12
"""Sizes that are tried at most."""

LARGEST = 2**16
"""The largest batch of a device that is tried."""


PRECISION = 0.02
"""Part of the largest batch to which it is found: a compilation is dear."""


class SearchStopped(Exception):
    """No more sizes can be tried."""


@dataclass(frozen=True)
class LargestBatch(JsonDataclass):
    """The largest batch of a device that fits.

    Attributes:
        batch_size: Samples of a micro-batch on one device; 0 if not even one fits.
        too_large: A size that does not fit: the next one, or one at most 2 % larger; None if the
            search ended without one.
        peak_bytes: Memory that it needs; None if none fits.
        tried: Sizes that were compiled, in order.
    """

    batch_size: int
    too_large: int | None
    peak_bytes: int | None
    tried: Sequence[int]


def largest_batch(
    peak_of: Callable[[int], int | None],
    limit: int,
    start: int = 1,
    most: int = MOST_COMPILATIONS,
    precision: float = PRECISION,
) -> LargestBatch:
    """Find the largest batch whose memory stays within a limit.

    As in a bisection, sizes are tried between the largest that fits and the smallest that does not
    until none is left. Memory is nearly a straight line over the batch size: the first sizes are
    read off the line through two measured ones, which usually ends it; after that every second one
    halves the interval.

    Args:
        peak_of: Memory that a batch size needs, growing with it; None if it cannot be compiled
            because it does not fit. It may raise ``SearchStopped``: what is known then is the
            result.
        limit: Memory that there is.
        start: The size to begin with.
        most: Sizes to try at most.
        precision: The search ends where the result is known to this part of it.
    """
    peaks: dict[int, int | None] = {}
    low, high = 0, LARGEST + 1
    size = start
    while len(peaks) < most:
        try:
            peak = peaks[size] = peak_of(size)
        except SearchStopped:
            break
        if peak is not None and peak <= limit:
            low = size
        else:
            high = size
        if high - low <= max(1, int(precision * low)):
            break
        size = _next_size(peaks, limit, low, high)
    return LargestBatch(
        batch_size=low,
        too_large=high if high <= LARGEST else None,
        peak_bytes=peaks.get(low),
        tried=list(peaks),
    )


def _next_size(peaks: Mapping[int, int | None], limit: int, low: int, high: int) -> int:
    """A size between the largest that fits and the smallest that does not."""
    guess = _on_the_line(peaks, limit, low, high)
    halved = len(peaks) > 4 and len(peaks) % 2 == 1  # where the line has not ended it by now
    if guess is None or (halved and high <= LARGEST):
        guess = 2 * low if high > LARGEST else (low + high) // 2
    return min(max(guess, low + 1), high - 1)


def _on_the_line(peaks: Mapping[int, int | None], limit: int, low: int, high: int) -> int | None:
    """Where the line through two measured sizes meets the limit; None without two.

    They are those on both sides of it, or else the two nearest.
    """
    known = {size: peak for size, peak in peaks.items() if peak is not None}
    if low in known and high in known:
        size, other = low, high
    elif len(known) > 1:
        size, other = sorted(known, key=lambda each: abs(known[each] - limit))[:2]
    else:
        return None
    rise = (known[other] - known[size]) * (1 if other > size else -1)
    if rise <= 0:
        return None
    slope = rise / abs(other - size)
    return math.floor(size + (limit - known[size]) / slope)
