"""The base class of log files in the output directory.

A resumed run continues after the last log in its checkpoint, and a failing disk does not end the
training.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kbtrain.callbacks.base import TrainerCallback
from kbtrain.callbacks.state import TrainerControl, TrainerState
from kbtrain.trackers.completed import is_summary, nothing_to_do
from kbtrain.utils.best_effort import best_effort
from kbtrain.utils.files.filesystem import replacing

if TYPE_CHECKING:
    from kbtrain.config.training_args import TrainingArguments

logger = logging.getLogger("kbtrain")


class LogFile(TrainerCallback):
    """Base class of log files: implement ``read``, ``step_of``, ``record`` and ``put``.

    A resumed run first drops the records after the step it resumes from, so every step appears
    once; a new run starts a new file. If writing fails (disk full, no permission), a warning is
    logged, and the records are kept and written with the next log.

    Attributes:
        file_name: Name of the file.
        unit: Its records, in the plural, for the warning: "lines", "rows".
    """

    decides_alike = True

    file_name: str
    unit: str

    def __init__(self) -> None:
        self._path: Path | None = None
        self._begin: list[Any] | None = None  # first records of a file that is not written yet
        self._resumed: TrainerState | None = None  # state to truncate the file to, if not done yet
        self._waiting: list[Any] = []
        self._tail = Tail()
        self._warned = self._nothing_to_do = False

    def read(self, path: Path) -> list[Any]:
        """The records of a file; empty if it does not exist."""
        raise NotImplementedError

    def step_of(self, record: Any) -> float:
        """The step of a record."""
        raise NotImplementedError

    def record(self, logs: dict[str, Any], state: TrainerState) -> Any:
        """The record of a log."""
        raise NotImplementedError

    def is_summary_record(self, record: Any) -> bool:
        """Whether a record is the log at the end of a ``fit``."""
        raise NotImplementedError

    def put(self, path: Path, begin: Sequence[Any] | None, waiting: Sequence[Any]) -> None:
        """Append ``waiting``; with ``begin``, rewrite the file as ``begin`` and then ``waiting``.

        Raises:
            OSError: ``waiting`` may not be in the file, so it will be passed again.
        """
        raise NotImplementedError

    @best_effort
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Truncate the file to the step the run starts at."""
        if not state.is_world_process_zero:
            return
        self._path = self._path_of(args)
        self._begin, self._waiting, self._warned = [], [], False
        self._tail, self._resumed = Tail(), None
        self._nothing_to_do = nothing_to_do(state, kwargs)
        if state.global_step:
            self._begin, self._resumed = None, copy.copy(state)
            self._resumed.log_history = list(state.log_history)
        self._write(self._path)

    @best_effort
    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add one record."""
        if not state.is_world_process_zero:
            return
        if self._path is None:  # logged outside of a training
            self._path = self._path_of(args)
        if self._nothing_to_do and is_summary(kwargs["logs"]) and self._has_summary(self._path):
            return  # the one of the run that trained stays
        self._waiting.append(self.record(kwargs["logs"], state))
        self._write(self._path)

    def close(self) -> None:
        """Try again to write the records that are left."""
        if self._path is not None and self._waiting:
            self._write(self._path)

    def _path_of(self, args: TrainingArguments) -> Path:
        # Absolute, because the program may change its working folder.
        return (args.output_folder / self.file_name).absolute()

    def _known(self, records: list[Any], state: TrainerState) -> list[Any]:
        """The records covered by the resumed state, which may have been saved between two logs."""
        before = [record for record in records if self.step_of(record) < state.global_step]
        at_step = [record for record in records if self.step_of(record) == state.global_step]
        if self._nothing_to_do:  # logs after the last checkpoint will not be repeated
            return before + at_step
        known = sum(1 for entry in state.log_history if entry.get("step") == state.global_step)
        return before + at_step[:known]

    def _has_summary(self, path: Path) -> bool:
        """Whether the file has the summary of the last training, after the last step."""
        try:
            records = [*self.read(path), *self._waiting]
        except OSError:
            return False
        return any(self.is_summary_record(record) for record in records)

    def _write(self, path: Path) -> None:
        """Write the pending records; after an error the file still has only complete records."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if self._resumed is not None:
                self._begin = self._known(self.read(path), self._resumed)
                self._resumed = None
            self.put(path, self._begin, self._waiting)
        except OSError as error:
            if not self._warned:
                logger.warning(
                    "Could not write %s: %s. Training continues; the %s are kept and written as "
                    "soon as that is possible.",
                    path,
                    error.strerror or error,
                    self.unit,
                )
            self._warned = True
        else:
            self._begin = None
            self._waiting.clear()


def replace_whole(path: Path, data: bytes) -> None:
    """Replace a file atomically."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


class Tail:
    """Appends to a file so that each piece appears exactly once, even after failed writes.

    On some disks (NFS, quotas) a write error is reported only when the file is closed. The data may
    then be in the file or not, so it is cut off before it is written again.
    """

    def __init__(self) -> None:
        self._unsure: int | None = None  # offset of a piece that may be in the file

    def append(self, path: Path, data: bytes) -> None:
        """Append a piece of data, all of it or nothing.

        Args:
            path: The file.
            data: The piece; after an error the next one must begin with it.

        Raises:
            OSError: The piece may not be in the file.
        """
        self.settle(path)
        file = path.open("ab", buffering=0)
        try:
            self._unsure = file.seek(0, os.SEEK_END)
            done = 0
            while done < len(data):
                done += file.write(data[done:])
        finally:
            file.close()
        self._unsure = None

    def settle(self, path: Path) -> None:
        """Cut off the remains of a piece whose write failed.

        Raises:
            OSError: The file cannot be truncated now.
        """
        if self._unsure is not None and path.exists():
            with path.open("rb+", buffering=0) as file:
                if file.seek(0, os.SEEK_END) > self._unsure:
                    file.truncate(self._unsure)
        self._unsure = None
