"""The record of a run, ``run.json``: what its reports are made of."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kbtrain.utils.files.filesystem import replacing

FILE_NAME = "run.json"
FORMAT = 1

MAX_LOGS = 4000
"""Training logs that are kept, and as many evaluations; beyond, they are thinned out evenly."""

MAX_WARNINGS = 200

Log = Mapping[str, Any]


@dataclass
class RunRecord:
    """What a run was, did and became; plain values that JSON can hold.

    Attributes:
        facts: What the run is (``RunFacts.to_dict``); empty if unknown.
        arguments: All ``TrainingArguments``.
        layers: Name, class, output shape and parameters of each layer.
        sessions: One for each ``fit`` and each resume: its ``facts``, and its ``ending``
            (``RunEnding.to_dict``), None while it runs or if it was killed.
        logs: The log history, thinned out where it is long.
        throughput: (step, samples per second) between two logs.
        checkpoints: ``{"step", "name", "best"}`` of each, by step.
        warnings: ``{"step", "level", "text", "count"}`` of each text.
        sections: ``{"title", "html"}``, added by callbacks.
        metric: Name of ``metric_for_best_model`` in the logs, or None.
        best: ``{"step", "value"}`` of the best evaluation, or None.
        tests: Results of the newest ``predict``.
        written: When this was written, local time in ISO 8601.
        live: Whether the run was going on then.
        pid: Process that wrote it.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    layers: list[list[Any]] = field(default_factory=list)
    sessions: list[dict[str, Any]] = field(default_factory=list)
    logs: list[dict[str, Any]] = field(default_factory=list)
    throughput: list[list[float]] = field(default_factory=list)
    checkpoints: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[dict[str, Any]] = field(default_factory=list)
    sections: list[dict[str, Any]] = field(default_factory=list)
    metric: str | None = None
    best: dict[str, Any] | None = None
    tests: dict[str, Any] = field(default_factory=dict)
    written: str = ""
    live: bool = False
    pid: int = 0

    @property
    def ending(self) -> dict[str, Any] | None:
        """How the newest session ended; None while it runs, or if that is unknown."""
        return self.sessions[-1].get("ending") if self.sessions else None

    @property
    def steps(self) -> int:
        """Updates done, as far as the logs and the ending tell."""
        ended = (self.ending or {}).get("step") or 0
        return int(max([ended, *(log.get("step", 0) for log in self.logs[-5:])]))

    @property
    def name(self) -> str:
        """The name of the run, or of its folder."""
        return str(self.facts.get("run_name") or "run")

    # --- what happens in a run --------------------------------------------------------------------

    def add_log(self, log: Log) -> None:
        """Append a log, with its step."""
        self.logs.append(dict(log))
        if len(self.logs) > 3 * MAX_LOGS:  # up to two thirds of them stay
            self.logs = thinned_logs(self.logs)

    def add_throughput(self, step: int, rate: float) -> None:
        """Append the speed since the last log."""
        self.throughput.append([step, float(f"{rate:.4g}")])
        if len(self.throughput) > 2 * MAX_LOGS:
            self.throughput = spread(self.throughput, MAX_LOGS)

    def add_warning(self, level: str, text: str, step: int) -> None:
        """Record a warning; one with the same text is counted."""
        for entry in self.warnings:
            if entry["text"] == text and entry["level"] == level:
                entry["count"] += 1
                return
        if len(self.warnings) < MAX_WARNINGS:
            self.warnings.append({"step": step, "level": level, "text": text[:2000], "count": 1})

    def add_section(self, title: str, content: str | Sequence[Sequence[Any]]) -> None:
        """Show something of a callback's own in the report; it replaces one of the same title.

        Args:
            title: Its heading.
            content: HTML, which must not load anything (pictures as ``data:`` addresses), or a
                table: rows of cells, the first one its head.
        """
        entry: dict[str, Any] = {"title": str(title)}
        if isinstance(content, str):
            entry["html"] = str(content)
        else:
            entry["table"] = [[_cell(cell) for cell in row] for row in content]
        for index, section in enumerate(self.sections):
            if section["title"] == entry["title"]:
                self.sections[index] = entry
                return
        self.sections.append(entry)

    def continue_from(self, older: RunRecord, step: int, history: Sequence[Log]) -> None:
        """Continue an older record from a step; what it has after that did not happen.

        Args:
            older: The record of the sessions before.
            step: Updates done where the run resumes.
            history: The ``log_history`` of the checkpoint, which knows all logs up to it but those
                beyond its length.
        """
        self.logs = joined_logs(older.logs, history, step)
        self.throughput = [point for point in older.throughput if point[0] <= step]
        self.warnings = [w for w in older.warnings if w.get("step", 0) <= step] + self.warnings
        self.sections = list(older.sections)
        self.sessions = list(older.sessions)

    # --- the file ---------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON values; the lists are shared, not copied."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {"format": FORMAT, **values}

    @classmethod
    def from_dict(cls, values: Any) -> RunRecord:
        """Inverse of ``to_dict``; what a newer version has added is left out.

        Raises:
            ValueError: It is not the record of a run.
        """
        if not isinstance(values, Mapping) or not isinstance(values.get("format"), int):
            raise ValueError("it is not the record of a run")
        empty = cls()
        known = {f.name: values[f.name] for f in dataclasses.fields(cls) if f.name in values}
        for name, value in known.items():
            expected = getattr(empty, name)
            if expected is not None and not isinstance(value, type(expected)):
                raise ValueError(f"{name} is {type(value).__name__}")
        record = cls(**known)
        for name in ("sessions", "logs", "checkpoints", "warnings", "sections"):
            if not all(isinstance(entry, dict) for entry in getattr(record, name)):
                raise ValueError(f"{name} has something that is no object")
        if not all(isinstance(log.get("step", 0), int | float) for log in record.logs):
            raise ValueError("logs have no steps")
        return record

    def save(self, folder: Path) -> None:
        """Write ``run.json``, replaced whole.

        Raises:
            OSError: It cannot be written.
        """
        data = json.dumps(self.to_dict(), default=str).encode("utf-8", "replace")
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / FILE_NAME) as temporary:
            temporary.write_bytes(data)

    @classmethod
    def load(cls, path: Path) -> RunRecord:
        """Read a record.

        Raises:
            OSError: It cannot be read.
            ValueError: It is damaged.
        """
        return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))


def _cell(cell: Any) -> Any:
    return cell if cell is None or isinstance(cell, bool | int | float | str) else str(cell)


def is_evaluation(log: Log) -> bool:
    """Whether a log has results of an evaluation."""
    return any(name.startswith("eval_") for name in log)


def on_curves(log: Log) -> bool:
    """Whether a log is a point of the run's curves.

    An evaluation after the run, of the best weights for example, is none: its step is the last one,
    and its weights are those of ``weights_step``.
    """
    return "weights_step" not in log or not is_evaluation(log)


def joined_logs(older: Iterable[Log], history: Sequence[Log], step: int) -> list[dict[str, Any]]:
    """The log history of a checkpoint at ``step``, after older logs that it no longer has."""
    first = history[0].get("step", 0) if history else step + 1
    return thinned_logs([*(log for log in older if log.get("step", 0) < first), *history])


def thinned_logs(logs: Iterable[Log], most: int | None = None) -> list[dict[str, Any]]:
    """At most ``most`` training logs and as many evaluations, evenly over the steps."""
    found = [dict(log) for log in logs]
    kept: set[int] = set()
    for evaluations in (False, True):
        places = [i for i, log in enumerate(found) if is_evaluation(log) is evaluations]
        points = [[found[i].get("step", 0), i] for i in places]
        kept |= {int(index) for _, index in spread(points, most or MAX_LOGS)}
    return [log for i, log in enumerate(found) if i in kept]


def spread(points: Sequence[Sequence[float]], most: int) -> list[Any]:
    """At most ``most`` points: the first of each of as many pieces of equal length, and the last.

    Args:
        points: (step, ...), by step.
        most: How many to keep.
    """
    if len(points) <= most:
        return list(points)
    start, length = points[0][0], max(points[-1][0] - points[0][0], 1)
    kept, filled = [], -1
    for point in points[:-1]:
        piece = math.floor((point[0] - start) / length * (most - 1))
        if piece > filled:
            kept.append(point)
            filled = piece
    return [*kept, points[-1]]
