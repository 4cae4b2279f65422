"""All logs of a run in one table."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kbtrain.callbacks.state import TrainerState
from kbtrain.trackers.log_file import LogFile, replace_whole

FILE_NAME = "log.csv"

Row = dict[str, Any]


class CsvCallback(LogFile):
    """Write ``log.csv`` in the output directory: a row for each log, a column for each name.

    Rows are appended; a new name (from the first evaluation, for example) rewrites the file with an
    additional column. A resumed run first drops the rows after the step it resumes from; a new run
    starts a new file. If writing fails (disk full, no permission), a warning is logged, and the
    rows are kept and written with the next one.
    """

    file_name, unit = FILE_NAME, "rows"

    def __init__(self) -> None:
        super().__init__()
        self._columns: list[str] = []

    def read(self, path: Path) -> list[Row]:
        """The rows; one that a crash cut short has too few columns and is left out."""
        if not path.exists():
            return []
        with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            rows = list(csv.DictReader(file))
        return [row for row in rows if None not in row and None not in row.values()]

    def step_of(self, record: Row) -> float:
        """The step of a row; infinity for a row without one, so that it is dropped."""
        try:
            return float(record["step"])
        except (KeyError, ValueError):
            return float("inf")

    def record(self, logs: dict[str, Any], state: TrainerState) -> Row:
        """The row of a log."""
        return {"step": state.global_step, "epoch": state.epoch, **logs}

    def is_summary_record(self, record: Row) -> bool:
        """Whether a row is the log at the end of a ``fit``."""
        return bool(record.get("train_runtime")) and bool(record.get("train_loss"))

    def put(self, path: Path, begin: Sequence[Row] | None, waiting: Sequence[Row]) -> None:
        """Append the rows, or rewrite the file if there is a new column."""
        fit = all(set(row) <= set(self._columns) for row in waiting)
        if begin is None and path.exists() and fit:
            self._tail.append(path, _csv_bytes(self._columns, waiting))
            return
        self._tail.settle(path)
        rows = [*(self.read(path) if begin is None else begin), *waiting]
        columns = list(dict.fromkeys(["step", "epoch", *(name for row in rows for name in row)]))
        header = dict(zip(columns, columns, strict=True))
        replace_whole(path, _csv_bytes(columns, [header, *rows]))
        self._columns = columns


def _csv_bytes(columns: list[str], rows: Sequence[Row]) -> bytes:
    text = io.StringIO(newline="")
    csv.DictWriter(text, columns).writerows(rows)
    return text.getvalue().encode("utf-8", "surrogateescape")
