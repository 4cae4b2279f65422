"""A log of everything that was logged, one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kbtrain.callbacks.state import TrainerState
from kbtrain.trackers.completed import is_summary
from kbtrain.trackers.log_file import LogFile, replace_whole

FILE_NAME = "log.jsonl"


class JsonLinesCallback(LogFile):
    """Write ``log.jsonl`` in the output directory.

    Each line has what was logged, its ``step`` and ``epoch``. A resumed run first drops the lines
    after the step it resumes from, so every step is there once; a fresh run begins a new file.
    Values that are not finite are written as ``NaN`` and ``Infinity``, which Python reads. If the
    disk refuses (full, no permission), a warning says so, and the lines are kept and written with
    the next one.
    """

    file_name, unit = FILE_NAME, "lines"

    def read(self, path: Path) -> list[str]:
        """The lines."""
        if not path.exists():
            return []
        # Line ends only, and whatever bytes a crash has left there: they come back as they were.
        text = path.read_bytes().decode("utf-8", "surrogateescape")
        return [line + "\n" for line in text.removesuffix("\n").split("\n")] if text else []

    def step_of(self, record: str) -> float:
        """The step of a line; a line torn by a crash sorts after everything and is dropped."""
        try:
            return float(json.loads(record)["step"])
        except (ValueError, KeyError, TypeError):
            return float("inf")

    def record(self, logs: dict[str, Any], state: TrainerState) -> str:
        """A line."""
        return json.dumps({**logs, "epoch": state.epoch, "step": state.global_step}) + "\n"

    def is_summary_record(self, record: str) -> bool:
        """Whether a line is the log at the end of a ``fit``."""
        return self.step_of(record) < float("inf") and is_summary(json.loads(record))

    def put(self, path: Path, begin: Sequence[str] | None, waiting: Sequence[str]) -> None:
        """Append the lines, or write all of them."""
        if begin is not None:
            replace_whole(path, _bytes([*begin, *waiting]))
        elif waiting:
            self._tail.append(path, _bytes(waiting))


def _bytes(lines: Sequence[str]) -> bytes:
    return "".join(lines).encode("utf-8", "surrogateescape")
