"""The folder of a run: lists, publishes and deletes its checkpoints.

Every change is a single rename, so that after a crash a checkpoint is either complete or hidden.
``ownership.py`` decides which ones may be deleted.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kbtrain.checkpoint.storage.faults import is_folder, names_in
from kbtrain.utils.files import filesystem

logger = logging.getLogger("kbtrain")

Listing = list[tuple[int, Path]]

# Folders that this process is writing now: `clean_leftovers` must not remove them, whichever store
# or thread they belong to.
_IN_PROGRESS: set[Path] = set()


def list_checkpoints(directory: Path) -> Listing:
    """Return (step, folder) of all folders with a checkpoint's name, by ascending step.

    If a process was killed while it replaced a checkpoint, after setting the old one aside, the
    old one is listed under its hidden name.

    Raises:
        CheckpointUnreadableError: The folder cannot be listed now.
    """
    names = names_in(directory)
    found = {
        hidden.step: hidden.path
        for hidden in _hidden(directory, names)
        if hidden.role == "replaced" and is_folder(hidden.path)
    }
    for name in names:
        step = filesystem.parse_checkpoint_name(name)
        if step is not None and is_folder(directory / name):
            found[step] = directory / name
    return sorted(found.items())


def _hidden(directory: Path, names: list[str]) -> list[filesystem.HiddenFolder]:
    parsed = (filesystem.parse_hidden(directory / name) for name in names)
    return [hidden for hidden in parsed if hidden is not None]


@contextmanager
def temporary_folder(directory: Path, step: int) -> Iterator[Path]:
    """Make a hidden folder, and remove it at the end if it still exists.

    Args:
        directory: The run's folder; created if it does not exist.
        step: Step of the checkpoint; if the process dies, ``clean_leftovers`` removes the folder.
    """
    directory.mkdir(parents=True, exist_ok=True)
    folder = filesystem.hidden_path(directory, "tmp", step)
    _IN_PROGRESS.add(folder)
    try:
        folder.mkdir()
        yield folder
    finally:
        try:
            if os.path.lexists(folder):
                filesystem.remove_tree(folder)
        except OSError as error:
            logger.warning("Could not remove the unfinished checkpoint %s: %s", folder, error)
        finally:
            _IN_PROGRESS.discard(folder)


def publish(folder: Path, final: Path, step: int) -> None:
    """Rename a finished folder to its final name, setting aside an existing one until then.

    Raises:
        OSError: Renaming failed; everything is as before, or complete under a hidden name.
    """
    aside = filesystem.hidden_path(final.parent, "replaced", step)
    _IN_PROGRESS.add(aside)
    try:
        replacing = os.path.lexists(final)
        if replacing:
            os.rename(final, aside)
        try:
            os.rename(folder, final)
            filesystem.fsync_directory(final.parent)
        except BaseException:
            # The rename may not be on the disk yet, so undo it.
            if not os.path.lexists(folder):
                os.rename(final, folder)
            if replacing:
                os.rename(aside, final)
            raise
        if replacing:
            delete([(step, aside)])
    finally:
        _IN_PROGRESS.discard(aside)


def delete(doomed: Listing) -> list[Path]:
    """Delete checkpoints so that after a crash each is either complete or hidden.

    Args:
        doomed: (step, folder) as ``list_checkpoints`` returns them.

    Returns:
        The deleted folders; one that cannot be deleted is reported and left.
    """
    trash: list[Path] = []
    deleted: list[Path] = []
    for step, path in doomed:
        hidden = filesystem.hidden_path(path.parent, "trash", step)
        try:
            os.rename(path, hidden)
        except FileNotFoundError:
            continue  # another process has deleted it
        except OSError as error:
            logger.warning("Could not delete the old checkpoint %s: %s", path, error)
            continue
        trash.append(hidden)
        deleted.append(path)
    for parent in {path.parent for path in trash}:
        with suppress(OSError):  # a failed deletion must not stop a run
            filesystem.fsync_directory(parent)  # hide all of them before removing any file
    for hidden in trash:
        try:
            filesystem.remove_tree(hidden)
        except OSError as error:  # it only costs disk space
            logger.warning("Could not remove all of %s: %s", hidden, error)
    return deleted


def clean_leftovers(directory: Path, alone: bool = False) -> list[Path]:
    """Remove what dead processes left unfinished; see ``CheckpointStore.clean_leftovers``.

    Raises:
        CheckpointUnreadableError: The folder cannot be listed now.
    """
    gone = []
    for hidden in _hidden(directory, names_in(directory)):
        if hidden.path in _IN_PROGRESS:
            continue
        ours = alone or hidden.pid == os.getpid()
        if not ours and filesystem.process_is_alive(hidden.pid):
            continue
        try:
            final = directory / filesystem.checkpoint_name(hidden.step)
            if hidden.role == "replaced" and not os.path.lexists(final):
                os.rename(hidden.path, final)
                filesystem.fsync_directory(directory)
            else:
                filesystem.remove_tree(hidden.path)
            gone.append(hidden.path)
        except OSError as error:
            logger.warning("Could not remove the leftover %s: %s", hidden.path, error)
    return gone + filesystem.remove_abandoned_files(directory, any_host=True)
