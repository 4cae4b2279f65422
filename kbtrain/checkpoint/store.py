"""The checkpoints of one run: written beside and renamed, verified when read, rotated.

``save`` takes host arrays only, so it can run in a thread; its ``CheckpointError`` has the
``OSError`` as ``__cause__``. Who saves when, what a failure means and one run per folder are
matters of ``kbtrain/saving.py``.
"""

import errno
import logging
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from kbtrain.checkpoint import disk
from kbtrain.checkpoint.contents import SHARD_BYTES, Places, write_contents
from kbtrain.checkpoint.manifest import MANIFEST_NAME, check_other_files, check_stems
from kbtrain.checkpoint.reading import Checkpoint, find_problems, read_checkpoint
from kbtrain.errors import (
    CheckpointDamagedError,
    CheckpointError,
    CheckpointNotFoundError,
    ConfigurationError,
)

Log = Callable[[str], None]
Listing = list[tuple[int, Path]]
Paths = list[Path]
Problems = list[str]
HiddenFolders = list[disk.Hidden]

# Folders this process is writing at this moment: `clean_leftovers` must not take them for its own
# leftovers, whichever store or thread they belong to.
_IN_PROGRESS: set[Path] = set()


class CheckpointStore:
    """The folder of a run with its ``checkpoint-{step}`` folders.

    A checkpoint is complete or absent: it is written into a hidden folder beside the others, every
    file is flushed, the manifest comes last, and one rename makes it visible. Reading verifies
    every byte. Building a store touches nothing on the disk. One process writes into a folder at a
    time.

    Args:
        directory: The run's folder; made by the first ``save``.
        shard_bytes: A group of arrays that takes more is spread over several files.

    Example:
        >>> import tempfile
        >>> store = CheckpointStore(tempfile.mkdtemp())
        >>> path = store.save(
        ...     10, arrays={"model": {"w": np.ones(2)}}, documents={"trainer_state": {"epoch": 0.5}}
        ... )
        >>> path.name, store.resolve("auto").arrays["model"]["w"]
        ('checkpoint-10', array([1., 1.]))
    """

    def __init__(self, directory: str | os.PathLike[str], shard_bytes: int = SHARD_BYTES) -> None:
        self.directory = Path(directory).absolute()  # a program may go elsewhere meanwhile
        self.shard_bytes = shard_bytes
        # Both only steer `rotate`: what this store wrote last is never deleted by it, and what it
        # found damaged does not count as a checkpoint to keep.
        self._last_saved: Path | None = None
        self._damaged: set[Path] = set()

    def save(
        self,
        step: int,
        arrays: Mapping[str, Mapping[str, np.ndarray]],
        documents: Mapping[str, Any] | None = None,
        info: Mapping[str, Any] | None = None,
        places: Mapping[str, Places] | None = None,
        other_files: Mapping[str, bytes] | None = None,
    ) -> Path:
        """Write ``checkpoint-{step}``, replacing a folder of that name, but no file.

        When this returns, the checkpoint is on the disk and would outlive a power cut. When it
        raises, nothing has changed: no partial folder is left, and a checkpoint of the same step
        that was there before still is. Killed in between, the hidden folder stays for
        ``clean_leftovers``; a replaced checkpoint is found by ``list`` at every moment.

        Args:
            step: Optimizer updates done, 0 or more.
            arrays: Group -> variable name -> array in host memory; each group becomes
                ``{group}.h5``.
            documents: Name -> JSON value; each becomes ``{name}.json``.
            info: Noted in the manifest: backend, package versions, ...
            places: Group -> where other readers look for its arrays (see ``Places``).
            other_files: Path in the folder, with ``/`` -> content: what others keep there.

        Returns:
            The checkpoint's folder.

        Raises:
            ConfigurationError: If ``step`` is not a whole number of 0 or more.
            CheckpointError: If it could not be written; ``__cause__`` is the ``OSError``, if one
                was the reason.
        """
        whole = isinstance(step, int | np.integer) and not isinstance(step, bool)
        if not whole or not 0 <= step <= disk.MAX_STEP:
            raise ConfigurationError(
                f"`step` must be a whole number from 0 to {disk.MAX_STEP}. Received: step={step!r}"
            )
        step, documents, others = int(step), documents or {}, other_files or {}
        check_stems(arrays, documents)
        check_other_files(others, documents)
        final = self.directory / disk.checkpoint_name(step)
        if os.path.lexists(final) and not final.is_dir():
            raise CheckpointError(
                f"Could not write {final.name} in {self.directory}: a file has that name. It was "
                "left as it is; move it elsewhere, or choose another output_dir."
            ) from FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(final))
        try:
            with self.temporary_folder(step) as folder:
                contents = (arrays, documents, info or {}, places or {}, self.shard_bytes, others)
                write_contents(folder, step, *contents)
                _read_back(folder, final)
                self._publish(folder, final, step)
        except OSError as error:
            raise self.explain_failure(final, error) from error
        self._last_saved = final
        self._damaged.discard(final)
        return final

    def explain_failure(self, what: Path, error: OSError) -> CheckpointError:
        """Say in the user's words why a folder of the run cannot be written, and what helps.

        Args:
            what: The checkpoint, or the run's folder.
            error: What the system said.
        """
        reason = error.strerror or str(error)
        text = f"Could not write {what.name} in {what.parent}: {reason} (errno {error.errno})."
        text += " Nothing of it was kept, earlier checkpoints are untouched."
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            room = disk.describe_space(what.parent)
            return CheckpointError(f"{text} {room} {self._describe_checkpoints()}")
        return CheckpointError(
            f"{text} {disk.describe_space(what.parent)} Make {self.directory} a folder that this "
            "process can write to, or choose another output_dir."
        )

    def _describe_checkpoints(self) -> str:
        with suppress(OSError, CheckpointError):
            if present := self.list():
                size = sum(disk.tree_size(path) for _, path in present)
                return (
                    f"The checkpoints there ({present[0][1].name} to {present[-1][1].name}, "
                    f"{len(present)} in all) take {size / 1e6:,.0f} MB: free space by deleting old "
                    "ones (save_total_limit does so), or choose another output_dir."
                )
        return "Free space or choose another output_dir."

    def path(self, step: int) -> Path:
        """Where the checkpoint of ``step`` is, or would be."""
        return self.directory / disk.checkpoint_name(step)

    def load(self, path: str | os.PathLike[str]) -> Checkpoint:
        """Read a checkpoint, verifying sizes and checksums of all its files on the way.

        Raises:
            CheckpointNotFoundError: If there is no such folder.
            CheckpointDamagedError: If a file is missing, truncated or altered.
            CheckpointError: If it has a newer format, or is another program's.
        """
        return read_checkpoint(Path(path))

    def verify(self, path: str | os.PathLike[str]) -> Problems:
        """Return what is wrong with a checkpoint, in words; an empty list says it is intact.

        All files are read and compared with the manifest; extra files are nobody's business.
        """
        return find_problems(Path(path))

    def latest_intact(self, log: Log | None = None) -> Checkpoint | None:
        """Load the newest checkpoint that is intact.

        Args:
            log: Told about every damaged one that was passed over, by name; by default a warning of
                the logger ``"kbtrain"``.

        Returns:
            The checkpoint, None if there is none or all are damaged.
        """
        checkpoint, _ = self._newest_intact(log)
        return checkpoint

    def resolve(
        self, resume: bool | str | os.PathLike[str] | None, log: Log | None = None
    ) -> Checkpoint | None:
        """Find the checkpoint that ``resume_from_checkpoint`` asks for.

        Args:
            resume: None or False: none. True: the newest intact one. ``"auto"``: the newest intact
                one, or none. A path: that checkpoint, or the newest intact one of that run folder.
            log: Told about damaged checkpoints; by default a warning of the logger ``"kbtrain"``.

        Returns:
            The checkpoint, None for a fresh start.

        Raises:
            CheckpointNotFoundError: If True, or a run folder, has no intact checkpoint, or the path
                does not exist.
            CheckpointDamagedError: If the path is a damaged checkpoint.
            CheckpointError: If the path is something else than a checkpoint.
            ConfigurationError: If ``resume`` is none of these.
        """
        if resume is None or resume is False:
            return None
        if resume is True:
            return self._require_newest(log)
        if resume == "auto":
            checkpoint, reports = self._newest_intact(log)
            if checkpoint is None and reports:
                _tell(
                    log,
                    f"FRESH START: all {len(reports)} checkpoints in {self.directory} are damaged; "
                    "training begins again at step 0.",
                )
            return checkpoint
        if not isinstance(resume, str | os.PathLike) or not os.fspath(resume):
            raise ConfigurationError(
                "`resume_from_checkpoint` must be None, True, False, 'auto' or the path of a "
                f"checkpoint. Received: resume_from_checkpoint={resume!r}"
            )
        return self._resolve_path(Path(resume), log)

    def rotate(self, limit: int | None, protect: Collection[int | str | Path] = ()) -> Paths:
        """Delete the oldest checkpoints beyond a number.

        Protected ones count within the limit but are never deleted; neither is the newest, nor the
        one this store wrote last. So more than ``limit`` may remain. Checkpoints this store has
        found damaged do not count and go first. A folder that cannot be deleted is reported and
        left.

        Args:
            limit: How many to keep, 1 or more; None keeps all.
            protect: Steps or folders to keep, such as the best one. Of a folder only the name
                counts, so that the best one is still known after the run's folder was moved.

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
        present = self.list()
        sound = [path for _, path in present if path not in self._damaged]
        protected = {_protected_step(item) for item in protect}
        keep = {path for step, path in present if step in protected}
        keep.update(sound[-1:])
        if self._last_saved in sound:
            keep.add(self._last_saved)
        for path in reversed(sound):
            if len(keep) >= limit:
                break
            keep.add(path)
        return self.delete([(step, path) for step, path in present if path not in keep])

    def delete(self, doomed: Listing) -> Paths:
        """Delete checkpoints so that a crash leaves each of them whole or out of sight.

        Args:
            doomed: (step, folder) as ``list`` returns them.

        Returns:
            The folders that are gone; one that cannot be deleted is reported and left.
        """
        trash: Paths = []
        deleted: Paths = []
        for step, path in doomed:
            hidden = disk.hidden_path(self.directory, "trash", step)
            try:
                os.rename(path, hidden)
            except OSError as error:
                _tell(None, f"Could not delete the old checkpoint {path}: {error}")
                continue
            trash.append(hidden)
            deleted.append(path)
            self._damaged.discard(path)
        if trash:
            with suppress(OSError):  # deleting is no reason to stop a run
                disk.fsync_directory(self.directory)  # all out of sight before any loses a file
        for hidden in trash:
            self._remove_quietly(hidden)
        return deleted

    def clean_leftovers(self, alone: bool = False) -> Paths:
        """Remove what dead processes left half done; call it before a run begins to write.

        Unfinished and half-deleted folders of processes that no longer run, and of this process
        unless it is writing them now, are removed; files for people (logs, results) likewise. A
        checkpoint that was set aside to be replaced is put back if its successor never arrived.

        Args:
            alone: No other process can be writing here, so that a process which runs under the
                number of a former one (in containers it is always 1) does not protect its leftover.

        Returns:
            The hidden folders and files that are gone.
        """
        gone = []
        for hidden in self._hidden():
            if hidden.path in _IN_PROGRESS:
                continue
            ours = alone or hidden.pid == os.getpid()
            if not ours and disk.process_is_alive(hidden.pid):
                continue
            try:
                final = self.directory / disk.checkpoint_name(hidden.step)
                if hidden.role == "replaced" and not os.path.lexists(final):
                    os.rename(hidden.path, final)
                    disk.fsync_directory(self.directory)
                else:
                    disk.remove_tree(hidden.path)
                gone.append(hidden.path)
            except OSError as error:
                _tell(None, f"Could not remove the leftover {hidden.path}: {error}")
        with suppress(OSError):  # small, and in nobody's way
            for path in disk.abandoned_files(self.directory):
                path.unlink()
                gone.append(path)
        return gone

    def list(self) -> Listing:
        """Return (step, folder) of all checkpoints, intact or not, by ascending step.

        A checkpoint that a killed process had set aside to replace it, without getting to put the
        new one in its place, is listed under its hidden name.
        """
        found = {
            hidden.step: hidden.path
            for hidden in self._hidden()
            if hidden.role == "replaced" and hidden.path.is_dir()
        }
        for name in _names_in(self.directory):
            step = disk.parse_checkpoint_name(name)
            if step is not None and (self.directory / name).is_dir():
                found[step] = self.directory / name
        return sorted(found.items())

    def _hidden(self) -> HiddenFolders:
        parsed = (disk.parse_hidden(self.directory / name) for name in _names_in(self.directory))
        return [hidden for hidden in parsed if hidden is not None]

    @contextmanager
    def temporary_folder(self, step: int) -> Iterator[Path]:
        """Make a hidden folder and remove it, whatever happens, if it is still there at the end.

        Args:
            step: The checkpoint it is for: if the process dies, ``clean_leftovers`` removes it.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        folder = disk.hidden_path(self.directory, "tmp", step)
        _IN_PROGRESS.add(folder)
        try:
            folder.mkdir()
            yield folder
        finally:
            try:
                if os.path.lexists(folder):
                    disk.remove_tree(folder)
            except OSError as error:
                _tell(None, f"Could not remove the unfinished checkpoint {folder}: {error}")
            finally:
                _IN_PROGRESS.discard(folder)

    def _publish(self, folder: Path, final: Path, step: int) -> None:
        """Give a finished folder its name, setting aside (not deleting) what has that name."""
        aside = disk.hidden_path(self.directory, "replaced", step)
        _IN_PROGRESS.add(aside)
        try:
            replacing = os.path.lexists(final)
            if replacing:
                os.rename(final, aside)
            try:
                os.rename(folder, final)
                disk.fsync_directory(self.directory)
            except BaseException:
                # Not known to be on the disk: then it must not be there at all.
                if not os.path.lexists(folder):
                    os.rename(final, folder)
                if replacing:
                    os.rename(aside, final)
                raise
            if replacing:
                self.delete([(step, aside)])
        finally:
            _IN_PROGRESS.discard(aside)

    def _newest_intact(self, log: Log | None) -> tuple[Checkpoint | None, Problems]:
        reports: Problems = []
        for _, path in reversed(self.list()):
            try:
                checkpoint = self.load(path)
            except CheckpointError as error:
                reports.append(str(error))
                self._damaged.add(path)
                _tell(log, f"{error} Trying the next older one.")
            else:
                self._damaged.discard(path)
                return checkpoint, reports
        return None, reports

    def _require_newest(self, log: Log | None) -> Checkpoint:
        checkpoint, reports = self._newest_intact(log)
        if checkpoint is not None:
            return checkpoint
        if reports:
            raise CheckpointNotFoundError(
                f"No intact checkpoint to resume from: all {len(reports)} in {self.directory} are "
                "damaged.\n" + "\n".join(f"- {report}" for report in reports)
            )
        state = "holds no checkpoint" if self.directory.is_dir() else "does not exist"
        raise CheckpointNotFoundError(
            f"No checkpoint to resume from: the folder {self.directory} {state}. Expected folders "
            "named checkpoint-{step}. Start without resuming, with resume_from_checkpoint='auto', "
            "or give the path of a checkpoint."
        )

    def _resolve_path(self, path: Path, log: Log | None) -> Checkpoint:
        if not os.path.lexists(path):
            here = ", ".join(found.name for _, found in self.list()) or "none"
            raise CheckpointNotFoundError(
                f"There is no {path}. Checkpoints in {self.directory}: {here}."
            )
        names = _names_in(path)
        run = self if path == self.directory else CheckpointStore(path)
        if MANIFEST_NAME not in names and run.list():
            return run._require_newest(log)
        if MANIFEST_NAME in names or disk.parse_checkpoint_name(path.name) is not None:
            return self.load(path)
        if path.is_dir() and not names:
            return run._require_newest(log)
        found = f"a folder with {', '.join(names[:8])}" if path.is_dir() else "a file"
        raise CheckpointError(
            f"{path} is not a checkpoint. Expected a checkpoint folder (with a {MANIFEST_NAME}) or "
            f"a run folder that holds folders named checkpoint-{{step}}. Received: {found}"
        )

    def _remove_quietly(self, hidden: Path) -> None:
        """Remove a hidden folder; if that fails it costs space only, so it is no error."""
        try:
            disk.remove_tree(hidden)
        except OSError as error:
            _tell(None, f"Could not remove all of {hidden}: {error}")


def _read_back(folder: Path, final: Path) -> None:
    """Compare what is on the disk with what was meant to be, before it counts as a checkpoint."""
    if problems := find_problems(folder):
        raise CheckpointDamagedError(
            f"{final} was written and reads back differently: {'; '.join(problems)}. It was not "
            "kept, earlier checkpoints are untouched. The disk or the memory of this machine may "
            "be failing: choose another output_dir."
        )


def _names_in(directory: Path) -> list[str]:
    try:
        return disk.entries(directory)
    except OSError as error:
        # Taking it for empty would start a run afresh over checkpoints that are there.
        raise CheckpointError(
            f"Could not look for checkpoints in {directory}: {error.strerror} (errno "
            f"{error.errno}). Make the folder readable or choose another one."
        ) from error


def _protected_step(item: int | str | Path) -> int:
    """Return the step that an item of `protect` means."""
    step = item if isinstance(item, int) else disk.parse_checkpoint_name(Path(item).name)
    if step is None:
        raise ConfigurationError(
            f"`protect` takes steps and folders named checkpoint-{{step}}. Received: {item!r}"
        )
    return step


def _tell(log: Log | None, message: str) -> None:
    (log or logging.getLogger("kbtrain").warning)(message)
