"""A log of everything that was logged, as one table."""

from __future__ import annotations

import csv
import io
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kbtrain.callbacks import TrainerCallback
from kbtrain.state import TrainerControl, TrainerState
from kbtrain.trackers.json_lines import append_whole

if TYPE_CHECKING:
    from kbtrain.training_args import TrainingArguments

logger = logging.getLogger("kbtrain")

FILE_NAME = "log.csv"


class CsvCallback(TrainerCallback):
    """Write ``log.csv`` in the output directory: a row for each log, a column for each name.

    A row whose names all have a column is appended; a new name (the first evaluation, say) writes
    the file anew with one more column. A resumed run first drops the rows after the step it resumes
    from; a fresh run begins a new file. If the disk refuses (full, no permission), a warning says
    so, and the rows are kept and written with the next one.
    """

    def __init__(self) -> None:
        self._path = Path(FILE_NAME)
        self._columns: list[str] = []
        self._begin: list[dict[str, Any]] | None = None  # what the table is to begin with
        self._waiting: list[dict[str, Any]] = []
        self._warned = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Cut the table back to the step the run begins at."""
        if state.is_world_process_zero:
            # Once: a program may go to another folder meanwhile.
            self._path = (Path(args.output_dir) / FILE_NAME).absolute()
            self._begin = _known(_rows(self._path), state) if state.global_step else []
            self._waiting, self._warned = [], False
            self._write()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Append one row."""
        if not state.is_world_process_zero:
            return
        if self._begin is None and not self._columns:  # logged outside of a training
            self._path = (Path(args.output_dir) / FILE_NAME).absolute()
        row = {"step": state.global_step, "epoch": state.epoch, **kwargs["logs"]}
        self._waiting.append(row)
        self._write()

    def _write(self) -> None:
        """Write what is waiting; the file keeps whole rows whatever happens."""
        known = self._begin is None and self._path.exists()
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if known and all(set(row) <= set(self._columns) for row in self._waiting):
                append_whole(self._path, _text(self._columns, self._waiting))
            else:
                begin = _rows(self._path) if self._begin is None else self._begin
                self._replace([*begin, *self._waiting])
        except OSError as error:
            if not self._warned:
                logger.warning(
                    "Could not write %s: %s. Training goes on; the rows are kept and written as "
                    "soon as the disk takes them.",
                    self._path,
                    error.strerror or error,
                )
            self._warned = True
        else:
            self._begin = None
            self._waiting.clear()

    def _replace(self, rows: list[dict[str, Any]]) -> None:
        columns = list(dict.fromkeys(["step", "epoch", *(name for row in rows for name in row)]))
        temporary = self._path.with_suffix(".tmp-csv")
        temporary.write_bytes(_text(columns, [dict(zip(columns, columns, strict=True)), *rows]))
        os.replace(temporary, self._path)
        self._columns = columns


def _text(columns: list[str], rows: list[dict[str, Any]]) -> bytes:
    text = io.StringIO(newline="")
    csv.DictWriter(text, columns).writerows(rows)
    return text.getvalue().encode()


def _rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a table; one that was torn by a crash has too few columns and is left out."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if None not in row.values()]


def _known(rows: list[dict[str, Any]], state: TrainerState) -> list[dict[str, Any]]:
    """The rows that the resumed state knows of: it may have been saved between two logs."""
    before = [row for row in rows if int(row["step"]) < state.global_step]
    at_step = [row for row in rows if int(row["step"]) == state.global_step]
    known = sum(1 for entry in state.log_history if entry.get("step") == state.global_step)
    return before + at_step[:known]
