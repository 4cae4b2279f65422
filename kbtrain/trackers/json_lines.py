"""A log of everything that was logged, one JSON object a line."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kbtrain.callbacks import TrainerCallback
from kbtrain.state import TrainerControl, TrainerState

if TYPE_CHECKING:
    from kbtrain.training_args import TrainingArguments

FILE_NAME = "log.jsonl"

logger = logging.getLogger("kbtrain")


class JsonLinesCallback(TrainerCallback):
    """Write ``log.jsonl`` in the output directory.

    Each line has what was logged, its ``step`` and ``epoch``. A resumed run first drops the lines
    after the step it resumes from, so every step is there once; a fresh run begins a new file.
    Values that are not finite are written as ``NaN`` and ``Infinity``, which Python reads. If the
    disk refuses (full, no permission), a warning says so, and the lines are kept and written with
    the next one.
    """

    def __init__(self) -> None:
        self._path = Path(FILE_NAME)
        self._begin: list[str] | None = None  # what the file is to begin with, if not yet written
        self._waiting: list[str] = []
        self._warned = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Cut the file back to the step the run begins at."""
        # Once: a program may go to another folder meanwhile.
        self._path = (Path(args.output_dir) / FILE_NAME).absolute()
        self._begin, self._waiting, self._warned = [], [], False
        if state.global_step:
            self._begin = _known(_lines(self._path), state)
        self._write(self._path)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Append one line."""
        record = {**kwargs["logs"], "epoch": state.epoch, "step": state.global_step}
        self._waiting.append(json.dumps(record) + "\n")
        self._write(self._path)

    def _write(self, path: Path) -> None:
        """Write what is waiting; the file keeps whole lines whatever happens."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if self._begin is not None:
                temporary = path.with_suffix(".tmp")
                temporary.write_text("".join(self._begin), encoding="utf-8")
                os.replace(temporary, path)
                self._begin = None
            if self._waiting:
                append_whole(path, "".join(self._waiting).encode())
                self._waiting.clear()
        except OSError as error:
            if not self._warned:
                logger.warning(
                    "Could not write %s: %s. Training goes on; the lines are kept and written as "
                    "soon as the disk takes them.",
                    path,
                    error.strerror or error,
                )
            self._warned = True


def append_whole(path: Path, data: bytes) -> None:
    """Append all or nothing: half a line would end up in the middle of the file."""
    with path.open("ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        try:
            done = 0
            while done < len(data):
                done += file.write(data[done:])
        except OSError:
            file.truncate(end)
            raise


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
