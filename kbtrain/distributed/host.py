"""Messages between the processes on the host, between two steps. All processes call them alike."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

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


def gather_arrays(backend: Backend, array: np.ndarray) -> list[np.ndarray]:
    """The arrays of all processes, in order of rank; their shapes may differ."""
    if current().size == 1:
        return [array]
    data = io.BytesIO()
    np.save(data, array, allow_pickle=False)
    parts = backend.exchange(data.getvalue())
    return [np.load(io.BytesIO(part), allow_pickle=False) for part in parts]
