"""Files that process 0 writes outside of checkpoints, and for which the other processes wait."""

from __future__ import annotations

import collections
import contextlib
import logging
import threading
from collections.abc import Iterator

from kbtrain import distributed
from kbtrain.errors import OutputError, first_lines

logger = logging.getLogger("kbtrain")

NOTICE = 8.0
"""Seconds after which a process says that it waits."""

_calls: collections.Counter[tuple[object, str]] = collections.Counter()


@contextlib.contextmanager
def written_by_first(path: str) -> Iterator[None]:
    """Context of a call that writes on process 0, at whose end the file is there for all.

    A program may also make the call on process 0 alone, which waits for no other process.

    Args:
        path: What is written. Calls of different processes belong together if it is the same.

    Raises:
        OutputError: In the processes that wait: process 0 could not write it.
    """
    peers = distributed.get_peers()
    if peers is None:
        yield
        return
    # Not counted through the whole program, in which process 0 may have made a call alone before.
    call = distributed.progress(), path
    _calls[call] += 1
    key = f"written {_calls[call]} {call}"
    try:
        yield
    except Exception as error:
        if peers.rank == 0:
            peers.announce(key, first_lines(error).encode())
        raise
    if peers.rank == 0:
        peers.announce(key)
        return
    with _saying_what_it_waits_for(path):
        problem = peers.announce(key)
    if problem:
        raise OutputError(f"Process 0 could not write {path}: {problem.decode()}")


@contextlib.contextmanager
def _saying_what_it_waits_for(path: str) -> Iterator[None]:
    timer = threading.Timer(
        NOTICE,
        logger.warning,
        ("Waiting for process 0 to write %s: it has to make the same call, with this path.", path),
    )
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
