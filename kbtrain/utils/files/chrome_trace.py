"""Files in the Chrome trace format, which Perfetto and TensorBoard show."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Span:
    """Something that ran for a time, on a thread of the host or a stream of a device.

    Attributes:
        name: Its name.
        start: When it began, in microseconds.
        duration: How long it ran, in microseconds.
        process: The name of the process or device, "" if unknown.
        thread: The name of the thread or stream, or its number.
        category: Its category, "" if it has none.
        args: What else is known about it.
    """

    name: str
    start: float
    duration: float
    process: str = ""
    thread: str = ""
    category: str = ""
    args: dict[str, Any] = field(default_factory=dict)

    @property
    def end(self) -> float:
        """When it ended, in microseconds."""
        return self.start + self.duration


def read(path: Path) -> list[Span]:
    """The complete events of a trace, compressed or not, in the order of the file.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is no trace.
    """
    data = path.read_bytes()
    document = json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)
    events = document.get("traceEvents") if isinstance(document, dict) else document
    if not isinstance(events, list):
        raise ValueError(f"{path} is not in the Chrome trace format.")
    names: dict[tuple[Any, ...], str] = {}
    for event in events:
        if event.get("ph") == "M" and event.get("name") in ("process_name", "thread_name"):
            thread = (event.get("tid"),) if event["name"] == "thread_name" else ()
            names[(event.get("pid"), *thread)] = str(event.get("args", {}).get("name", ""))
    return [
        Span(
            str(event.get("name", "")),
            float(event["ts"]),
            float(event.get("dur", 0.0)),
            names.get((event.get("pid"),), ""),
            names.get((event.get("pid"), event.get("tid")), str(event.get("tid", ""))),
            str(event.get("cat", "")),
            event.get("args") or {},
        )
        for event in events
        if event.get("ph") == "X"
    ]


def write(path: Path, spans: Iterable[Span]) -> None:
    """Write a compressed trace.

    Raises:
        OSError: The file cannot be written.
    """
    numbers: dict[tuple[str, ...], int] = {}
    events: list[dict[str, Any]] = []

    def number(*names: str) -> int:
        if names not in numbers:
            numbers[names] = len(numbers) + 1
            where = {"pid": number(names[0]), "tid": numbers[names]} if len(names) > 1 else {}
            kind = "thread_name" if where else "process_name"
            where = where or {"pid": numbers[names]}
            events.append({"ph": "M", "name": kind, **where, "args": {"name": names[-1]}})
        return numbers[names]

    for span in spans:
        place = {"pid": number(span.process), "tid": number(span.process, span.thread)}
        times = {"ts": span.start, "dur": span.duration}
        more = {"cat": span.category} if span.category else {}
        events.append({"ph": "X", "name": span.name, **place, **times, **more, "args": span.args})
    document = {"displayTimeUnit": "ms", "traceEvents": events}
    path.write_bytes(gzip.compress(json.dumps(document).encode()))


def own_times(spans: Sequence[Span]) -> list[float]:
    """The microseconds of each span without the spans of its thread that ran inside it."""
    own = [span.duration for span in spans]
    threads: dict[tuple[str, str], list[int]] = {}
    for i, span in enumerate(spans):
        threads.setdefault((span.process, span.thread), []).append(i)
    for members in threads.values():
        members.sort(key=lambda i: (spans[i].start, -spans[i].duration))
        around: list[int] = []
        for i in members:
            while around and spans[around[-1]].end <= spans[i].start:
                around.pop()
            if around:
                own[around[-1]] -= min(spans[i].end, spans[around[-1]].end) - spans[i].start
            around.append(i)
    return [max(0.0, time) for time in own]


def busy_time(spans: Iterable[Span]) -> float:
    """The microseconds during which at least one of the spans was running."""
    total, until = 0.0, float("-inf")
    for span in sorted(spans, key=lambda span: span.start):
        if span.end > until:
            total += span.end - max(span.start, until)
            until = span.end
    return total
