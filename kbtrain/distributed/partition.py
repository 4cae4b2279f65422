"""Divides whole variables among processes."""

from __future__ import annotations

from collections.abc import Sequence


def owners_of(sizes: Sequence[int], processes: int) -> list[int]:
    """The process that owns each variable: the largest first, each to the one that has least.

    Args:
        sizes: Number of elements of each variable.
        processes: Number of processes.

    Returns:
        The rank of the owner of each variable.

    Example:
        >>> owners_of([10, 70, 40, 30], 2)
        [0, 0, 1, 1]
    """
    loads = [0] * processes
    owners = [0] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        owners[i] = loads.index(min(loads))
        loads[owners[i]] += sizes[i]
    return owners
