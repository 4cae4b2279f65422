"""A log of everything that was logged, one JSON object a line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kbtrain.callbacks import TrainerCallback
from kbtrain.state import TrainerControl, TrainerState

if TYPE_CHECKING:
    from kbtrain.training_args import TrainingArguments

FILE_NAME = "log.jsonl"


class JsonLinesCallback(TrainerCallback):
    """Write ``log.jsonl`` in the output directory.

    Each line has what was logged, its ``step`` and ``epoch``. A resumed run first drops the lines
    after the step it resumes from, so every step is there once; a fresh run begins a new file.
    Values that are not finite are written as ``NaN`` and ``Infinity``, which Python reads.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Cut the file back to the step the run begins at."""
        path = _path(args)
        kept = _known(_lines(path), state) if state.global_step else []
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        os.replace(temporary, path)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Append one line."""
        path = _path(args)
        path.parent.mkdir(parents=True, exist_ok=True)
        record = {**kwargs["logs"], "epoch": state.epoch, "step": state.global_step}
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def _path(args: TrainingArguments) -> Path:
    return Path(args.output_dir) / FILE_NAME


def _known(lines: list[str], state: TrainerState) -> list[str]:
    """The lines that the resumed state knows of: it may have been saved between two logs."""
    before = [line for line in lines if _step(line) < state.global_step]
    at_step = [line for line in lines if _step(line) == state.global_step]
    known = sum(1 for entry in state.log_history if entry.get("step") == state.global_step)
    return before + at_step[:known]


def _lines(path: Path) -> list[str]:
    if not path.exists():
        return []
    return path.read_text(encoding="utf-8").splitlines(keepends=True)


def _step(line: str) -> float:
    """The step of a line; a line torn by a crash sorts after everything and is dropped."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
