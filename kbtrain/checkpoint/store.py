"""The checkpoints of one run: written atomically, verified when read, rotated.

``save`` takes host arrays only, so it can run in a thread; its ``CheckpointError`` has the
``OSError`` as ``__cause__``. ``kbtrain/checkpoint/async_checkpointer.py`` decides in which thread
to save and what a failure means, and keeps other runs out of the folder.
"""

from __future__ import annotations

import errno
import functools
import os
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np

from kbtrain.checkpoint import resuming
from kbtrain.checkpoint.ownership import Ownership
from kbtrain.checkpoint.resuming import Log
from kbtrain.checkpoint.storage import run_folder as folder
from kbtrain.checkpoint.storage.faults import exists, explain_failure, is_folder
from kbtrain.checkpoint.storage.folder_reader import (
    Checkpoint,
    everything,
    find_problems,
    manifest_of,
    nothing,
    read_back,
    read_checkpoint,
)
from kbtrain.checkpoint.storage.folder_writer import (
    SHARD_BYTES,
    Contents,
    ExternalLayout,
    write_contents,
)
from kbtrain.checkpoint.storage.run_folder import Listing
from kbtrain.errors import (
    CheckpointDamagedError,
    CheckpointError,
    CheckpointFormatError,
    ConfigurationError,
)
from kbtrain.utils.files import filesystem
from kbtrain.utils.files.addresses import check_local

Paths = list[Path]
Problems = list[str]


class CheckpointStore:
    """The folder of a run with its ``checkpoint-{step}`` folders.

    A checkpoint is complete or absent: it is written into a hidden folder beside the others, every
    file is flushed, the manifest comes last, and one rename makes it visible. Reading verifies
    every byte. Creating a store does not touch the disk. Only one process may write into a folder
    at a time.

    Args:
        directory: The run's folder; created by the first ``save``.
        shard_bytes: A larger group of arrays is split over several files.

    Example:
        >>> import tempfile
        >>> store = CheckpointStore(tempfile.mkdtemp())
        >>> path = store.save(
        ...     10, arrays={"model": {"w": np.ones(2)}}, documents={"trainer_state": {"epoch": 0.5}}
        ... )
        >>> path.name, store.resolve("auto").arrays["model"]["w"]
        ('checkpoint-10', array([1., 1.]))
    """

    is_remote = False
    """Whether checkpoints are uploaded from the folder; see ``remote/store.py``."""

    def __init__(self, directory: str | os.PathLike[str], shard_bytes: int = SHARD_BYTES) -> None:
        check_local("directory", directory)
        self.directory = Path(directory).absolute()  # the program may change its folder later
        self.place = str(self.directory)  # where checkpoints are kept, for messages
        self.shard_bytes = shard_bytes
        self._begin()

    def _begin(self) -> None:
        """Start a new run: existing checkpoints belong to an earlier one from now on."""
        self._own = Ownership()
        # Used by `rotate` only: it never deletes the checkpoint that was written last, and does not
        # count damaged ones among those to keep.
        self._last_saved: Path | None = None
        self._damaged: set[Path] = set()

    def save(
        self,
        step: int,
        arrays: Mapping[str, Mapping[str, Any]],
        documents: Mapping[str, Any] | None = None,
        info: Mapping[str, Any] | None = None,
        places: Mapping[str, ExternalLayout] | None = None,
        other_files: Mapping[str, bytes] | None = None,
    ) -> Path:
        """Write ``checkpoint-{step}``, replacing only a checkpoint of that name.

        When this returns, the checkpoint is on the disk and would survive a power failure. When it
        raises, nothing has changed: no partial folder is left, and an earlier checkpoint of the
        same step still exists. If the process is killed in between, the hidden folder is left for
        ``clean_leftovers``; ``list`` finds a checkpoint that is being replaced at every moment.

        Args:
            step: Optimizer updates done, 0 or more.
            arrays: Group -> variable name -> array in host memory; each group becomes
                ``{group}.h5``.
            documents: Name -> JSON value; each becomes ``{name}.json``.
            info: Recorded in the manifest: backend, package versions, ...
            places: Group -> where Keras looks for its arrays (see ``ExternalLayout``).
            other_files: Path in the folder, with ``/`` -> content of additional files.

        Returns:
            The checkpoint's folder.

        Raises:
            ConfigurationError: If ``step`` is not a whole number of 0 or more.
            CheckpointError: If it could not be written; ``__cause__`` is the ``OSError``, if there
                was one.
        """
        whole = isinstance(step, int | np.integer) and not isinstance(step, bool)
        if not whole or not 0 <= step <= filesystem.MAX_STEP:
            raise ConfigurationError(
                f"`step` must be a whole number from 0 to {filesystem.MAX_STEP}. "
                f"Received: step={step!r}"
            )
        contents = Contents(arrays, documents or {}, info or {}, places or {}, other_files or {})
        contents.check_names()

        def write(temporary: Path, run: str) -> None:
            write_contents(temporary, int(step), contents, self.shard_bytes, run)
            read_back(temporary, self.path(int(step)))

        return self.save_with(int(step), write)

    def save_with(self, step: int, write: Callable[[Path, str], None]) -> Path:
        """Make ``checkpoint-{step}`` of what a function writes; see ``save``.

        Args:
            step: Optimizer updates done.
            write: ``write(folder, run)`` fills an empty folder and flushes it to the disk; ``run``
                is the identity of the run, for the manifest.

        Returns:
            The checkpoint's folder.

        Raises:
            CheckpointError: As for ``save``.
        """
        final = self.path(step)
        self._check_place(final)
        try:
            with self.temporary_folder(step) as temporary:
                write(temporary, self._own.run)
                folder.publish(temporary, final, step)
        except OSError as error:
            raise self.explain_failure(final, error) from error
        self.written(final)
        return final

    def written(self, path: Path) -> None:
        """Record that this run has written a checkpoint, in this process or another one."""
        self._last_saved = path
        self._own.wrote(path)
        self._damaged.discard(path)

    def _check_place(self, final: Path) -> None:
        """Check that writing the checkpoint would not overwrite anything else."""
        if not exists(final):
            return
        if not is_folder(final):
            what = "a file has that name"
        else:
            try:
                manifest_of(final)
            except CheckpointFormatError as error:
                what = f"a folder has that name, and this kbtrain must not replace it. {error}"
            except CheckpointDamagedError:
                return
            else:
                return
        raise CheckpointError(
            f"Could not write {final.name} in {self.directory}: {what}. It was left unchanged; "
            "move it elsewhere, or choose another output_dir."
        ) from FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(final))

    def explain_failure(self, what: Path, error: OSError) -> CheckpointError:
        """Explain why a folder of the run cannot be written, and what to do about it.

        Args:
            what: The checkpoint, or the run's folder.
            error: The error of the operating system.
        """
        return explain_failure(self.directory, what, error)

    def path(self, step: int) -> Path:
        """The path of the checkpoint of ``step``, whether or not it exists."""
        return self.directory / filesystem.checkpoint_name(step)

    def load(self, path: str | os.PathLike[str], lazy: bool = False) -> Checkpoint:
        """Read a checkpoint, verifying sizes and checksums of all its files on the way.

        Args:
            path: The checkpoint's folder.
            lazy: Whether to leave the arrays on the disk. They are then ``StoredArray`` objects,
                of which ``read_block`` reads a part.

        Raises:
            CheckpointNotFoundError: If there is no such folder.
            CheckpointDamagedError: If a file is missing, truncated or altered.
            CheckpointFormatError: If it has a newer format, or is another program's.
            CheckpointUnreadableError: If it cannot be read now.
        """
        return read_checkpoint(Path(path), lazy)

    def verify(self, path: str | os.PathLike[str]) -> Problems:
        """Return descriptions of what is wrong with a checkpoint; an empty list if it is intact.

        All files are read and compared with the manifest; files not in the manifest are ignored.

        Raises:
            CheckpointFormatError: If it has a newer format, or is another program's.
            CheckpointUnreadableError: If a file cannot be read now.
        """
        return find_problems(Path(path))

    def latest_intact(self, log: Log | None = None) -> Checkpoint | None:
        """Load the newest checkpoint that is intact, and continue the run that wrote it.

        Args:
            log: Called with a message for every damaged checkpoint that is skipped; by default a
                warning of the logger ``"kbtrain"``.

        Returns:
            The checkpoint, or None if there is none or all are damaged.

        Raises:
            CheckpointFormatError: If a newer one was written by a newer kbtrain or another
                program.
            CheckpointUnreadableError: If one cannot be read now.
        """
        return self._continue_from(resuming.newest_intact(self.directory, self._damaged, log)[0])

    def resolve(
        self,
        resume: bool | str | os.PathLike[str] | None,
        log: Log | None = None,
        lazy: bool = False,
        read: resuming.Read | None = None,
    ) -> Checkpoint | None:
        """Find the checkpoint for ``resume_from_checkpoint``, and continue its run.

        Later checkpoints belong to the run that wrote this one. Without a checkpoint a new run
        begins, which does not own the checkpoints already in the folder.

        Args:
            resume: None or False: none. True: the newest intact one. ``"auto"``: the newest intact
                one, or none. A path: that checkpoint, or the newest intact one of that run folder.
            log: Called with a message for each damaged checkpoint; by default a warning of the
                logger ``"kbtrain"``.
            lazy: As in ``load``.
            read: Reads and verifies a checkpoint; None for this process alone.

        Returns:
            The checkpoint; None for a fresh start.

        Raises:
            CheckpointNotFoundError: If ``resume`` is True or a run's folder and there is no intact
                checkpoint, or if the path does not exist.
            CheckpointDamagedError: If the path is a damaged checkpoint.
            CheckpointFormatError: If the checkpoint was written by a newer kbtrain or another
                program.
            CheckpointUnreadableError: If one cannot be read now, or the folder cannot be listed.
            CheckpointError: If the path is not a checkpoint.
            ConfigurationError: If ``resume`` is none of these.
        """
        self._begin()
        read = read or functools.partial(read_checkpoint, lazy=lazy)
        return self._continue_from(
            resuming.find_checkpoint(self.directory, resume, self._damaged, log, read)
        )

    def follow(self, name: str | None, lazy: bool = False) -> Checkpoint | None:
        """Continue from the checkpoint that process 0 has found and verified; see ``resolve``.

        Args:
            name: Its path, relative to the run's folder or absolute; None for a fresh start.
            lazy: As in ``load``; then only the blocks that are read are verified.

        Raises:
            CheckpointError: As for ``load``.
        """
        self._begin()
        if name is None:
            return None
        return self._continue_from(
            read_checkpoint(self.directory / name, lazy, nothing if lazy else everything)
        )

    def _continue_from(self, checkpoint: Checkpoint | None) -> Checkpoint | None:
        if checkpoint is not None:
            self._own.resumed_from(checkpoint)
        return checkpoint

    def rotate(self, limit: int | None, protect: Collection[int | str | Path] = ()) -> Paths:
        """Delete the oldest checkpoints of this run beyond a number.

        Only checkpoints of this run are deleted: those it wrote, now or before it was resumed, and
        the one it was resumed from. Those of other runs and programs are neither counted nor
        deleted. Protected ones count towards the limit but are never deleted, nor is the newest or
        the one this store wrote last, so more than ``limit`` may remain. Checkpoints found damaged
        do not count and are deleted first. A folder that cannot be deleted is reported and left.

        Args:
            limit: How many to keep, 1 or more; None keeps all.
            protect: Steps or folders to keep, such as the best one. Only the name of a folder is
                compared, so that the best one is still found after the run's folder was moved.

        Returns:
            The deleted folders, oldest first.

        Raises:
            ConfigurationError: If ``limit`` is not None and below 1, or a folder in ``protect``
                does not have a checkpoint's name.
        """
        if limit is None:
            return []
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
            raise ConfigurationError(
                "`save_total_limit` must be None or a whole number of 1 or more. "
                f"Received: save_total_limit={limit!r}"
            )
        protected = {_protected_step(item) for item in protect}
        present = self.own_checkpoints()
        sound = [path for _, path in present if path not in self._damaged]
        keep = {path for step, path in present if step in protected}
        keep.update(sound[-1:])
        if self._last_saved in sound:
            keep.add(self._last_saved)
        for path in reversed(sound):
            if len(keep) >= limit:
                break
            keep.add(path)
        return self.delete([(step, path) for step, path in present if path not in keep])

    def keep_only(self, best: Path) -> Paths:
        """Delete all checkpoints of this run but the best one, if that is in the folder.

        Returns:
            The deleted folders.
        """
        present = self.own_checkpoints()
        if best.name not in [path.name for _, path in present]:
            return []
        return self.delete([item for item in present if item[1].name != best.name])

    def own_checkpoints(self) -> Listing:
        """(step, folder) of the checkpoints that this run owns, by ascending step."""
        return [(step, path) for step, path in self.list() if path in self._own]

    def owns(self, path: Path) -> bool:
        """Whether this run owns a checkpoint of the folder, so that it may be deleted."""
        return path in self._own

    def delete(self, doomed: Listing) -> Paths:
        """Delete checkpoints so that after a crash each is either complete or hidden.

        Args:
            doomed: (step, folder) as ``list`` returns them.

        Returns:
            The deleted folders; one that cannot be deleted is reported and left.
        """
        deleted = folder.delete(doomed)
        self._damaged.difference_update(deleted)
        return deleted

    def clean_leftovers(self, alone: bool = False) -> Paths:
        """Remove what dead processes left unfinished; call it before a run starts to write.

        Unfinished and half-deleted folders of processes that no longer run, and of this process
        unless it is writing them now, are removed, and so are unfinished logs and result files. A
        checkpoint that was set aside to be replaced is restored if its successor was never written.

        Args:
            alone: Whether no other process can be writing here. Then a process that reuses the id
                of a dead one (in containers the id is always 1) does not protect its leftovers.

        Returns:
            The hidden folders and files that were removed or restored.
        """
        return folder.clean_leftovers(self.directory, alone)

    def list(self) -> Listing:
        """Return (step, folder) of all checkpoints, intact or not, by ascending step.

        If a process was killed while it replaced a checkpoint, after setting the old one aside, the
        old one is listed under its hidden name.

        Raises:
            CheckpointUnreadableError: If the folder cannot be listed now.
        """
        return folder.list_checkpoints(self.directory)

    # --- for stores that keep checkpoints elsewhere; nothing to do for a folder

    def kept(self) -> Listing:
        """(step, folder) of all checkpoints where they are kept, by ascending step."""
        return self.list()

    def bring(self, place: str) -> None:
        """Make a checkpoint that process 0 has found present on this machine."""

    def check_access(self) -> None:
        """Check that checkpoints can be kept; raises a ``CheckpointError`` otherwise."""

    def send(self) -> None:
        """Take what was saved to where it is kept; raises a ``CheckpointError`` otherwise."""

    def bring_files(self) -> None:
        """Bring the logs that will be continued from there."""

    def send_files(self, once: bool = False) -> None:
        """Take logs and other files there."""

    def temporary_folder(self, step: int) -> AbstractContextManager[Path]:
        """Make a hidden folder, and remove it at the end if it still exists.

        Args:
            step: Step of the checkpoint; if the process dies, ``clean_leftovers`` removes the
                folder.
        """
        return folder.temporary_folder(self.directory, step)


def _protected_step(item: int | str | Path) -> int:
    """Return the step of an item of ``protect``."""
    step = item if isinstance(item, int) else filesystem.parse_checkpoint_name(Path(item).name)
    if step is None:
        raise ConfigurationError(
            f"`protect` takes steps and folders named checkpoint-{{step}}. Received: {item!r}"
        )
    return step
