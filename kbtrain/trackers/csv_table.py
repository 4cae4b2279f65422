"""A log of everything that was logged, as one table."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kbtrain.callbacks import TrainerCallback
from kbtrain.state import TrainerControl, TrainerState

if TYPE_CHECKING:
    from kbtrain.training_args import TrainingArguments

FILE_NAME = "log.csv"


class CsvCallback(TrainerCallback):
    """Write ``log.csv`` in the output directory: a row for each log, a column for each name.

    A row whose names all have a column is appended; a new name (the first evaluation, say) writes
    the file anew with one more column. A resumed run first drops the rows after the step it resumes
    from; a fresh run begins a new file.
    """

    def __init__(self) -> None:
        self._columns: list[str] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Cut the table back to the step the run begins at."""
        if state.is_world_process_zero:
            path = Path(args.output_dir) / FILE_NAME
            self._write(path, _known(_rows(path), state) if state.global_step else [])

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Append one row."""
        if not state.is_world_process_zero:
            return
        path = Path(args.output_dir) / FILE_NAME
        row = {"step": state.global_step, "epoch": state.epoch, **kwargs["logs"]}
        if not path.exists() or not set(row) <= set(self._columns):
            self._write(path, [*_rows(path), row])
            return
        with path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._columns).writerow(row)

    def _write(self, path: Path, rows: list[dict[str, Any]]) -> None:
        names = dict.fromkeys(["step", "epoch"])
        for row in rows:
            names |= dict.fromkeys(row)
        self._columns = list(names)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp-csv")
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(temporary, path)


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
