"""The 8-bit codes: which numbers they stand for, and tables that find them. NumPy alone."""

from __future__ import annotations

from functools import cache
from typing import Literal

import numpy as np

BLOCK = 256
"""Numbers that share a scale."""

SMALLEST_SCALE = 1e-37
"""What numbers are divided by where their block's scale is smaller."""

HASH_FACTORS = (0x7FEB352D, 0x846CA68B - 2**32)
"""Of the hash that decides when codes are chosen at random."""


@cache
def code_values(signed: bool) -> np.ndarray:
    """The 256 numbers in [-1, 1], or [0, 1], that a code can stand for, in ascending order.

    A dynamic scale has, for every power of ten down to 1e-7, a number of evenly spaced values that
    doubles with the power: fine near 1, and still there at 1e-7.

    Args:
        signed: Whether there are negative ones.

    Returns:
        Float32 array of 256 numbers with 0 and 1 among them.
    """
    values = [0.0, 1.0]
    for power in range(7):
        count = 2 ** (power if signed else power + 1)
        edges = np.linspace(0.1, 1.0, count + 1)
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (power - 6)
        values += [*middles, *(-middles if signed else ())]
    return np.sort(np.asarray(values, "float32"))


@cache
def nearest(signed: bool) -> np.ndarray:
    """`_finder` of the nearest code; without signs, what is above 0 gets a code above 0."""
    return _finder(_borders(signed), "left")


@cache
def nearest_to_root() -> np.ndarray:
    """`_finder` of the code that `nearest` finds, without signs, for the root of a number."""
    return _finder((_borders(False).astype("float64") ** 2).astype("float32"), "left")


def _borders(signed: bool) -> np.ndarray:
    table = code_values(signed)
    borders = (table[:-1] + table[1:]) / 2
    if not signed:
        borders[0] = 0.0
    result: np.ndarray = borders
    return result


@cache
def not_larger(signed: bool) -> np.ndarray:
    """`_finder` of the last code above -1 and below 1 whose number is not larger."""
    return _finder(code_values(signed)[1:-1], "right")


def _finder(borders: np.ndarray, side: Literal["left", "right"]) -> np.ndarray:
    """A table with which one look-up counts the borders below a float32.

    A binary search for each element takes PyTorch many times as long as all the rest of an update.
    The upper half of a float32's bits tells its place already, but for the one border that may
    cross the range of numbers with these bits. What the table has for an upper half is such that
    adding all of the bits leaves the count in the upper half of the sum: the lower half carries
    over if it is beyond the border. Negative numbers count downwards, so theirs is the negative
    count: ``count = abs((table[bits >> 16 & 0xffff] + bits) >> 16)``, in int32 that wraps around.

    Args:
        borders: Ascending float32 numbers, not two of them with the same upper half.
        side: ``"left"`` if a number on a border counts as below it, ``"right"`` if as above.

    Returns:
        int32 array of 65,536 elements.
    """
    upper = np.arange(1 << 16, dtype="uint32")
    first, last = ((upper << 16 | low).view("float32") for low in (0, 0xFFFF))
    finite = np.isfinite(last)
    count = np.searchsorted(borders, first, side=side).astype("int64")
    count[~finite] = len(borders)  # no border is crossed by what is not a number
    crossed = finite & (np.searchsorted(borders, last, side=side) != count)
    # The first lower half beyond the border: of equal bits, too, if that changes the count.
    low = (borders.view("uint32") & 0xFFFF).astype("int64")
    negative = upper >> 15 != 0
    border = np.where(negative, count - 1, count)[crossed]
    equal_is_beyond = negative[crossed] == (side == "left")
    carry = np.zeros(1 << 16, "int64")
    carry[crossed] = (1 << 16) - low[border] - np.where(equal_is_beyond, 0, 1)
    signed_upper = upper.astype("uint16").view("int16").astype("int64")
    entry = (np.where(negative, -count, count) - signed_upper << 16) + carry
    result: np.ndarray = entry.astype("uint64").astype("uint32").view("int32")
    return result
