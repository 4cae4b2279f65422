"""The processes that train together: how many there are, and which one this is.

``kbtrain.distributed.initialize`` finds out and records it here, where arguments, data and backends
read it. A program that runs alone is a group of one process.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class ProcessGroup:
    """The processes that train together, and the place of this one among them.

    Attributes:
        rank: Index of this process, from 0.
        size: Number of processes.
        local_rank: Index of this process among those on its machine.
        local_size: Number of processes on its machine.
        address: Host name or IP address of process 0.
        port: A port on that host, at which process 0 can listen.
        addresses: ``host:port`` of each process, in order of rank, where the launcher knows them.
        launcher: What started the processes, for messages, such as "kbtrain launch".
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    address: str = "127.0.0.1"
    port: int = 0
    addresses: tuple[str, ...] = ()
    launcher: str = "one process"


ALONE = ProcessGroup()

_current = ALONE
_barrier: Callable[[], None] | None = None


def current() -> ProcessGroup:
    """The group of this process."""
    return _current


def set_current(group: ProcessGroup, barrier: Callable[[], None]) -> None:
    """Record the group of this process.

    Args:
        group: The group.
        barrier: Waits for all processes.
    """
    global _current, _barrier
    _current, _barrier = group, barrier


@contextlib.contextmanager
def one_after_the_other(first: bool) -> Iterator[None]:
    """Context that some processes run before the others; with one there is no waiting.

    Args:
        first: Whether this process is one of the first.
    """
    wait = _barrier
    if wait is not None and not first:
        wait()
    try:
        yield
    finally:
        if wait is not None and first:
            wait()
