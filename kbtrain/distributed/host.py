"""Messages between the processes on the host, between two steps. All processes call them alike."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from kbtrain.backends.protocol import Backend
from kbtrain.errors import DistributedError
from kbtrain.utils.machine.processes import current

_messages = itertools.count(1)


def gather(backend: Backend, value: Any, what: str = "a value") -> list[Any]:
    """The values of all processes, in order of rank.

    Args:
        backend: The backend in use.
        value: A value that JSON can hold.
        what: What it is, for the message if a process sends something else.

    Raises:
        DistributedError: The processes are at different points of the program, such as after an
            exception that one of them has caught.
    """
    if current().size == 1:
        return [value]
    sent = json.dumps([next(_messages), what, value]).encode()
    return [value for *_, value in _matched(backend.exchange(sent))]


def _matched(parts: list[bytes]) -> list[list[Any]]:
    """The messages, if all are of the same kind and have the same number."""
    try:
        found = [json.loads(part) for part in parts]
        kinds = [(number, what) for number, what, _ in found]
    except ValueError:  # an array of another call
        kinds, found = [(0, "one thing"), (0, "another")], []
    if len(set(kinds)) > 1:
        (first, one), (second, other) = kinds[0], next(k for k in kinds if k != kinds[0])
        raise DistributedError(
            "The processes are at different points of the program: one sends message "
            f"{first} ({one}), another {second} ({other}). All have to make the same calls: one "
            "that catches an exception must not go on alone."
        )
    return found


def broadcast(backend: Backend, value: Any, what: str = "a value of process 0") -> Any:
    """The value of process 0; see ``gather``."""
    return gather(backend, value if current().rank == 0 else None, what)[0]


def barrier(backend: Backend) -> None:
    """Wait for all processes."""
    gather(backend, None, "that it is here")


def any_of(backend: Backend, flags: Mapping[str, bool]) -> dict[str, bool]:
    """Flags that are set on at least one process."""
    found = gather(backend, dict(flags), ", ".join(flags))
    return {name: any(each[name] for each in found) for name in flags}


def slowest(backend: Backend, seconds: float) -> float:
    """The longest of the times that the processes measured, of which this is one."""
    longest: float = max(gather(backend, seconds, "a time"))
    return longest


def gather_arrays(backend: Backend, array: np.ndarray) -> list[np.ndarray]:
    """The arrays of all processes, in order of rank; their shapes may differ."""
    if current().size == 1:
        return [array]
    data = io.BytesIO()
    np.save(data, array, allow_pickle=False)
    parts = backend.exchange(data.getvalue())
    return [np.load(io.BytesIO(part), allow_pickle=False) for part in parts]
