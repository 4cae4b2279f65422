"""A random permutation that is computed lazily, for any length.

An array of 10^8 shuffled indices needs 800 MB and takes seconds to create. Here any part of the
order is computed on its own, from tables of about the square root of the length.
"""

from __future__ import annotations

import math

import numpy as np

ROUNDS = 8
"""Twice what Luby and Rackoff need; see ``FeistelPermutation``."""


class FeistelPermutation:
    """A random order of ``0 .. length - 1`` that is not stored.

    A number below ``a * b`` is a pair (left, right) with ``left < a`` and ``right < b``. Each round
    adds a random function of one half to the other::

        left  = (left + F_i(right)) mod a        for even i
        right = (right + F_i(left)) mod b        for odd i

    Every round is invertible, so the result is a permutation of ``0 .. a * b - 1``. With ``a`` and
    ``b`` near the square root of the length, fewer than ``a`` results are not below the length.
    These go through the rounds again until they are (cycle walking), so the result is a permutation
    of ``0 .. length - 1``. The round functions are tables of random numbers from Philox.

    Args:
        length: How many numbers, at least 1.
        seed: Seed of the tables, an integer >= 0.
        epoch: Selects another permutation of the same seed, an integer >= 0.

    Example:
        >>> order = FeistelPermutation(10, seed=0, epoch=0)
        >>> sorted(order[0:10].tolist()) == list(range(10))
        True
        >>> order[4:6].tolist() == order[0:10].tolist()[4:6]
        True

    Reference:
        Luby and Rackoff, How to construct pseudorandom permutations from pseudorandom functions,
        1988 (four rounds of random functions suffice against an observer of few values). Black and
        Rogaway, Ciphers with arbitrary finite domains, 2002 (the form with two moduli, and cycle
        walking).
    """

    def __init__(self, length: int, seed: int, epoch: int) -> None:
        self._length = length
        self._a = math.isqrt(max(length - 1, 0)) + 1
        self._b = -(-length // self._a)
        sequence = np.random.SeedSequence(seed, spawn_key=(epoch,))
        words = np.random.Philox(sequence)
        self._tables = [
            _random_table(words, *((self._a, self._b) if i % 2 == 0 else (self._b, self._a)))
            for i in range(ROUNDS)
        ]

    def __len__(self) -> int:
        """Return the number of indices."""
        return self._length

    def __getitem__(self, part: slice) -> np.ndarray:
        """Return a slice of the order, as int64; its cost does not depend on the position."""
        start, stop, step = part.indices(self._length)
        result = self._rounds(np.arange(start, stop, step, dtype=np.int64))
        while len(beyond := np.flatnonzero(result >= self._length)):
            result[beyond] = self._rounds(result[beyond])
        return result

    def _rounds(self, numbers: np.ndarray) -> np.ndarray:
        left, right = np.divmod(numbers, self._b)
        for i, table in enumerate(self._tables):
            changed, other, modulus = (
                (left, right, self._a) if i % 2 == 0 else (right, left, self._b)
            )
            changed += table.take(other)
            # Both terms are below the modulus, so one subtraction is enough and cheaper than `%`.
            np.subtract(changed, modulus, out=changed, where=changed >= modulus)
        left *= self._b
        left += right
        return left


def _random_table(words: np.random.Philox, modulus: int, size: int) -> np.ndarray:
    """Random numbers below ``modulus`` (uneven by less than modulus / 2^32)."""
    high = words.random_raw(size) >> np.uint64(32)
    return ((high * np.uint64(modulus)) >> np.uint64(32)).astype(np.int64)
