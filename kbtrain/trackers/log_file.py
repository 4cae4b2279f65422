"""What the logs that are one file in the output directory share: when they write, and what if not.

A run that is resumed goes on after what its checkpoint knows of, and a disk that refuses does not
end a training.
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
from kbtrain.utils.filesystem import replacing

if TYPE_CHECKING:
    from kbtrain.config.training_args import TrainingArguments

logger = logging.getLogger("kbtrain")


class LogFile(TrainerCallback):
    """Base class: implement `read`, `step_of`, `record` and `put`.

    A resumed run first drops what comes after the step it resumes from, so every step is there
    once; a fresh run begins a new file. If the disk refuses (full, no permission), a warning says
    so, and what was to be written is kept and written with the next log.

    Attributes:
        file_name: Name of the file.
        unit: What it consists of, for the warning: "lines", "rows".
    """

    file_name: str
    unit: str

    def __init__(self) -> None:
        self._path: Path | None = None
        self._begin: list[Any] | None = None  # what the file is to begin with, if not yet written
        self._resumed: TrainerState | None = None  # what to cut the file back to, if not yet read
        self._waiting: list[Any] = []
        self._tail = Tail()
        self._warned = self._nothing_to_do = False

    def read(self, path: Path) -> list[Any]:
        """The records of a file, none if it does not exist."""
        raise NotImplementedError

    def step_of(self, record: Any) -> float:
        """The step of a record."""
        raise NotImplementedError

    def record(self, logs: dict[str, Any], state: TrainerState) -> Any:
        """A log as the file holds it."""
        raise NotImplementedError

    def is_summary_record(self, record: Any) -> bool:
        """Whether a record is the log at the end of a ``fit``."""
        raise NotImplementedError

    def put(self, path: Path, begin: Sequence[Any] | None, waiting: Sequence[Any]) -> None:
        """Write: the whole file is ``begin`` and then ``waiting``, without ``begin`` add to it.

        Raises:
            OSError: ``waiting`` is not in the file, or nobody knows: it will be put again.
        """
        raise NotImplementedError

    @best_effort
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Cut the file back to the step the run begins at."""
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
        """Try once more what could not be written."""
        if self._path is not None and self._waiting:
            self._write(self._path)

    def _path_of(self, args: TrainingArguments) -> Path:
        # Made once: a program may go to another folder meanwhile.
        return (Path(args.output_dir) / self.file_name).absolute()

    def _known(self, records: list[Any], state: TrainerState) -> list[Any]:
        """The records that the resumed state knows of: it may have been saved between two logs."""
        before = [record for record in records if self.step_of(record) < state.global_step]
        at_step = [record for record in records if self.step_of(record) == state.global_step]
        if self._nothing_to_do:  # what follows the last checkpoint is not logged again
            return before + at_step
        known = sum(1 for entry in state.log_history if entry.get("step") == state.global_step)
        return before + at_step[:known]

    def _has_summary(self, path: Path) -> bool:
        """Whether the last training has summed itself up, after the last step."""
        try:
            records = [*self.read(path), *self._waiting]
        except OSError:
            return False
        return any(self.is_summary_record(record) for record in records)

    def _write(self, path: Path) -> None:
        """Write what is waiting; the file keeps whole records whatever happens."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if self._resumed is not None:
                self._begin = self._known(self.read(path), self._resumed)
                self._resumed = None
            self.put(path, self._begin, self._waiting)
        except OSError as error:
            if not self._warned:
                logger.warning(
                    "Could not write %s: %s. Training goes on; the %s are kept and written as "
                    "soon as the disk takes them.",
                    path,
                    error.strerror or error,
                    self.unit,
                )
            self._warned = True
        else:
            self._begin = None
            self._waiting.clear()


def replace_whole(path: Path, data: bytes) -> None:
    """Put a new file in the place of an old one, all or nothing."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


class Tail:
    """Appends to a file so that each piece is there once and whole, whatever a write reports.

    On some disks (NFS, quotas) closing a file reports what writing could not. What was written may
    then be in the file or not: it is cut off before it is written again.
    """

    def __init__(self) -> None:
        self._unsure: int | None = None  # where the piece begins that may be there

    def append(self, path: Path, data: bytes) -> None:
        """Append a piece: half a line would end up in the middle of the file.

        Args:
            path: The file.
            data: The piece; after an error the next one has to begin with it.

        Raises:
            OSError: It is not known to be in the file.
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
        """Cut off what may have been written of a piece whose write was reported as failed.

        Raises:
            OSError: That is not possible now.
        """
        if self._unsure is not None and path.exists():
            with path.open("rb+", buffering=0) as file:
                if file.seek(0, os.SEEK_END) > self._unsure:
                    file.truncate(self._unsure)
        self._unsure = None
