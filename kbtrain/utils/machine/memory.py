"""Memory use of training or evaluation, from the counters of the system and the backend."""

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
    """The part of a backend used here; see ``kbtrain.backends.protocol``."""

    def memory_stats(self) -> dict[str, int]:
        """Current and peak bytes in use on the accelerator."""


@contextlib.contextmanager
def measured(backend: CountsMemory, prefix: str, skip: bool) -> Iterator[dict[str, float]]:
    """Measure the memory used inside, with the metric names of Transformers.

    ``{prefix}_mem_cpu_alloc_delta`` is the growth of the process, and
    ``{prefix}_mem_cpu_peaked_delta`` is how far its peak was above the use at the end; likewise
    ``gpu``, if the device reports its memory. Nothing is sampled in between: peaks are counted from
    the start of the process, so the peak may be an earlier, higher one.

    Args:
        backend: The backend in use.
        prefix: "train", "eval" or "test".
        skip: Measure nothing.

    Yields:
        A dict that is filled on exit; values are in bytes.
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
    """Current and peak bytes, by ``"cpu"`` and ``"gpu"``."""
    places = {}
    if resource is not None and _STATM.exists():
        held = int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        places["cpu"] = (held, peak if sys.platform == "darwin" else peak * 1024)
    stats = backend.memory_stats()
    if {"in_use", "peak"} <= stats.keys():
        places["gpu"] = (stats["in_use"], stats["peak"])
    return places
