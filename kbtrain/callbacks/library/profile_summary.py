"""What a profile tells: the slowest operations, and how long none was running."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kbtrain.utils.files.chrome_trace import Span, busy_time, own_times

SLOWEST = 10
"""Operations that a summary names."""


@dataclass(frozen=True)
class Operation:
    """An operation of a profile, over all its calls.

    Attributes:
        name: Its name, as the framework records it.
        count: How often it ran.
        seconds: The time that it ran, without operations that it called itself.
        share: That time as a share of the time of all operations.
    """

    name: str
    count: int
    seconds: float
    share: float


@dataclass(frozen=True)
class ProfileSummary:
    """A profile of some updates.

    Attributes:
        trace: The file for TensorBoard and Perfetto.
        first_step: The first update in it.
        updates: How many updates it covers.
        seconds: The time from the begin of its first operation to the end of its last one.
        idle_share: The share of that time in which no operation was running.
        operations: The ten slowest operations, slowest first.
    """

    trace: str
    first_step: int
    updates: int
    seconds: float
    idle_share: float
    operations: tuple[Operation, ...]

    def to_dict(self) -> dict[str, Any]:
        """The summary as JSON values."""
        values = dataclasses.asdict(self)
        return values | {"operations": list(values["operations"])}

    def rows(self) -> list[list[Any]]:
        """The table of operations: its head, and a row for each."""
        head = ["operation", "calls", "total ms", "share"]
        rows = [
            [each.name, each.count, f"{1e3 * each.seconds:.3f}", f"{each.share:.1%}"]
            for each in self.operations
        ]
        return [head, *rows]

    def caption(self) -> str:
        """One line about the whole profile."""
        last = self.first_step + self.updates - 1
        return (
            f"Updates {self.first_step} to {last}: {1e3 * self.seconds:.1f} ms, of which no "
            f"operation was running in {self.idle_share:.1%}."
        )

    def title(self) -> str:
        """The heading of the table in a report."""
        last = self.first_step + self.updates - 1
        return (
            f"Profile of updates {self.first_step} to {last}: {1e3 * self.seconds:.1f} ms, "
            f"{self.idle_share:.1%} idle"
        )

    def text(self) -> str:
        """The caption and the table, for a log."""
        rows = [[str(cell) for cell in row] for row in self.rows()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join(
                [row[0].ljust(widths[0])]
                + [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)]
            )
            for row in rows
        ]
        return "\n".join([self.caption(), *lines])


def summarize(trace: Path, spans: Sequence[Span], first_step: int, updates: int) -> ProfileSummary:
    """Summarize a profile.

    Args:
        trace: The file that has it.
        spans: The operations in it.
        first_step: The first update in it.
        updates: How many updates it covers.
    """
    totals: dict[str, tuple[int, float]] = {}
    for span, own in zip(spans, own_times(spans), strict=True):
        count, time = totals.get(span.name, (0, 0.0))
        totals[span.name] = count + 1, time + own
    whole = sum(time for _, time in totals.values())
    slowest = sorted(totals.items(), key=lambda item: -item[1][1])[:SLOWEST]
    length = max((s.end for s in spans), default=0.0) - min((s.start for s in spans), default=0.0)
    return ProfileSummary(
        str(trace),
        first_step,
        updates,
        length / 1e6,
        1.0 - busy_time(spans) / length if length else 0.0,
        tuple(
            Operation(name, count, time / 1e6, time / whole if whole else 0.0)
            for name, (count, time) in slowest
        ),
    )
