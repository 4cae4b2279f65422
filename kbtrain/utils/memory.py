"""Memory of a training or an evaluation, from what the system and the backend count anyway."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]

_STATM = Path("/proc/self/statm")


class CountsMemory(Protocol):
    """A backend, as far as its memory goes; see ``kbtrain.backends.protocol``."""

    def memory_stats(self) -> dict[str, int]:
        """Bytes in use and at the peak on the accelerator."""


@contextlib.contextmanager
def measured(backend: CountsMemory, prefix: str, skip: bool) -> Iterator[dict[str, float]]:
    """Memory that a piece of work took, by the reference's names.

    ``{prefix}_mem_cpu_alloc_delta`` is what the process holds more than before, and
    ``{prefix}_mem_cpu_peaked_delta`` how much its peak is above what it holds at the end; ``gpu``
    likewise, where the device counts. Nothing is sampled in between: the peaks are since the
    process began, so work that stays below an earlier peak shows that one.

    Args:
        backend: The backend in use.
        prefix: "train", "eval" or "test".
        skip: Measure nothing.

    Yields:
        A dict that is filled when the work is done; values are in bytes.
    """
    found: dict[str, float] = {}
    before = {} if skip else _now(backend)
    yield found
    if skip:
        return
    for place, (held, peak) in _now(backend).items():
        found[f"{prefix}_mem_{place}_alloc_delta"] = held - before[place][0]
        found[f"{prefix}_mem_{place}_peaked_delta"] = max(0, peak - held)


def _now(backend: CountsMemory) -> dict[str, tuple[int, int]]:
    """Bytes held and at the peak, by place."""
    places = {}
    if resource is not None and _STATM.exists():
        held = int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        places["cpu"] = (held, peak if sys.platform == "darwin" else peak * 1024)
    stats = backend.memory_stats()
    if {"in_use", "peak"} <= stats.keys():
        places["gpu"] = (stats["in_use"], stats["peak"])
    return places
