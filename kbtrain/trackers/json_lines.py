"""All logs of a run, one JSON object per line."""

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

    Each line has the logged values with their ``step`` and ``epoch``. A resumed run first drops the
    lines after the step it resumes from, so every step appears once; a new run starts a new file.
    Non-finite values are written as ``NaN`` and ``Infinity``, which Python can read. If writing
    fails (disk full, no permission), a warning is logged, and the lines are kept and written with
    the next one.
    """

    file_name, unit = FILE_NAME, "lines"

    def read(self, path: Path) -> list[str]:
        """The lines."""
        if not path.exists():
            return []
        # Split at line feeds only, and keep the bytes of a line that a crash cut short.
        text = path.read_bytes().decode("utf-8", "surrogateescape")
        return [line + "\n" for line in text.removesuffix("\n").split("\n")] if text else []

    def step_of(self, record: str) -> float:
        """The step of a line; infinity for one that a crash cut short, so that it is dropped."""
        try:
            return float(json.loads(record)["step"])
        except (ValueError, KeyError, TypeError):
            return float("inf")

    def record(self, logs: dict[str, Any], state: TrainerState) -> str:
        """The line of a log."""
        return json.dumps({**logs, "epoch": state.epoch, "step": state.global_step}) + "\n"

    def is_summary_record(self, record: str) -> bool:
        """Whether a line is the log at the end of a ``fit``."""
        return self.step_of(record) < float("inf") and is_summary(json.loads(record))

    def put(self, path: Path, begin: Sequence[str] | None, waiting: Sequence[str]) -> None:
        """Append the lines, or rewrite the file."""
        if begin is not None:
            replace_whole(path, _json_bytes([*begin, *waiting]))
        elif waiting:
            self._tail.append(path, _json_bytes(waiting))


def _json_bytes(lines: Sequence[str]) -> bytes:
    return "".join(lines).encode("utf-8", "surrogateescape")
