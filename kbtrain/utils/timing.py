"""Speed and time spent, measured with the host's clock only, without waiting for the device."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

SPEED_SUFFIXES = ("_runtime", "_per_second")
"""Ends of the names in logs that say how long something took, or how fast it was."""


def speed(prefix: str, seconds: float, samples: int, steps: int) -> dict[str, float]:
    """Runtime in seconds, samples and steps per second, rounded as in Transformers."""
    seconds = max(seconds, 1e-9)
    return {
        f"{prefix}_runtime": round(seconds, 4),
        f"{prefix}_samples_per_second": round(samples / seconds, 3),
        f"{prefix}_steps_per_second": round(steps / seconds, 3),
    }


def without_durations(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The results of an evaluation without what says how long it took."""
    return {
        name: value
        for name, value in metrics.items()
        if name != "epoch" and not name.endswith(SPEED_SUFFIXES) and "_mem_" not in name
    }


class SparingPace:
    """Lets something be done again and again in at most a 50th of the time of a run.

    After a time of 20 ms there is none for a second.
    """

    SHARE = 50

    def __init__(self) -> None:
        self._not_before = 0.0

    @property
    def is_due(self) -> bool:
        """Whether there is time to do it now."""
        return time.monotonic() >= self._not_before

    @contextmanager
    def spending(self) -> Iterator[None]:
        """Context in which it is done."""
        start = time.monotonic()
        yield
        took = time.monotonic() - start
        self._not_before = start + took * (1 + self.SHARE)


@dataclass
class StepTimes:
    """Seconds of a run by what the host was doing.

    - data: waiting for the next batches. Batches prefetched by a thread or worker cost nothing.
    - compute: dispatching steps and waiting for their results. Work of the device that overlaps
      with the host costs nothing.
    - other: evaluating and saving.
    - host: everything else: callbacks, logging, the loop itself.

    Attributes:
        data, compute, other: Seconds so far.
    """

    data: float = 0.0
    compute: float = 0.0
    other: float = 0.0
    _begin: float = field(default_factory=time.perf_counter)

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Add the time spent inside to ``name``, less any time that is measured inside it."""
        start, before = time.perf_counter(), self._measured()
        try:
            yield
        finally:
            inside = self._measured() - before
            spent = time.perf_counter() - start - inside
            setattr(self, name, getattr(self, name) + spent)

    def restart(self) -> None:
        """Reset all times and start now."""
        self.data = self.compute = self.other = 0.0
        self._begin = time.perf_counter()

    @property
    def total(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._begin

    def split(self, seconds: float) -> dict[str, float]:
        """``train_{data,compute,host}_runtime`` of the steps in a run of ``seconds``."""
        host = max(0.0, seconds - self._measured())
        parts = {"data": self.data, "compute": self.compute, "host": host}
        return {f"train_{name}_runtime": round(value, 4) for name, value in parts.items()}

    def _measured(self) -> float:
        return self.data + self.compute + self.other
