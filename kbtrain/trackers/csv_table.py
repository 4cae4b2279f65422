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

    The table always equals ``state.log_history``. A row whose names all have a column is
    appended; a new name (the first evaluation, say) writes the file anew with one more column.
    """

    def __init__(self) -> None:
        self._columns: list[str] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin with what the state knows: nothing, or what was logged before the checkpoint."""
        self._rewrite(args, state)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Append one row."""
        if not state.is_world_process_zero:
            return
        path = Path(args.output_dir) / FILE_NAME
        row = state.log_history[-1]
        if not path.exists() or not set(row) <= set(self._columns):
            self._rewrite(args, state)
            return
        with path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._columns).writerow(row)

    def _rewrite(self, args: TrainingArguments, state: TrainerState) -> None:
        if not state.is_world_process_zero:
            return
        names = dict.fromkeys(["step", "epoch"])
        for entry in state.log_history:
            names |= dict.fromkeys(entry)
        self._columns = list(names)
        path = Path(args.output_dir) / FILE_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp-csv")
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(state.log_history)
        os.replace(temporary, path)
