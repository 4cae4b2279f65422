"""Messages between the processes on the host, between two steps. All processes call them alike."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from kbtrain.backends.protocol import Backend
from kbtrain.utils.processes import current


def gather(backend: Backend, value: Any) -> list[Any]:
    """The values of all processes, in order of rank.

    Args:
        backend: The backend in use.
        value: A value that JSON can hold.
    """
    if current().size == 1:
        return [value]
    return [json.loads(part) for part in backend.exchange(json.dumps(value).encode())]


def broadcast(backend: Backend, value: Any) -> Any:
    """The value of process 0."""
    return gather(backend, value if current().rank == 0 else None)[0]


def barrier(backend: Backend) -> None:
    """Wait for all processes."""
    gather(backend, None)


def any_of(backend: Backend, flags: Mapping[str, bool]) -> dict[str, bool]:
    """Flags that are set on at least one process."""
    found = gather(backend, dict(flags))
    return {name: any(each[name] for each in found) for name in flags}


@contextmanager
def first(backend: Backend, leads: bool) -> Iterator[None]:
    """Context that some processes run before the others.

    Args:
        backend: The backend in use.
        leads: Whether this process is one of the first.
    """
    if not leads:
        barrier(backend)
    try:
        yield
    finally:
        if leads:
            barrier(backend)
