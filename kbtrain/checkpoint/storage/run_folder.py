"""The folder of a run: what is in it, how a checkpoint gets in, and how it is taken out again.

Every change is one rename, so that a crash at any moment leaves a checkpoint whole or out of sight.
Which ones to take out is decided elsewhere (``ownership.py``).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kbtrain.checkpoint.storage.faults import is_folder, names_in
from kbtrain.utils import filesystem

logger = logging.getLogger("kbtrain")

Listing = list[tuple[int, Path]]

# Folders this process is writing at this moment: `clean_leftovers` must not take them for its own
# leftovers, whichever store or thread they belong to.
_IN_PROGRESS: set[Path] = set()


def list_checkpoints(directory: Path) -> Listing:
    """Return (step, folder) of all that have a checkpoint's name, by ascending step.

    A checkpoint that a killed process had set aside to replace it, without getting to put the new
    one in its place, is listed under its hidden name.

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
    """Make a hidden folder and remove it, whatever happens, if it is still there at the end.

    Args:
        directory: The run's folder; made if it is not there.
        step: The checkpoint it is for: if the process dies, ``clean_leftovers`` removes it.
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
    """Give a finished folder its name, setting aside (not deleting) what has that name.

    Raises:
        OSError: The system refuses; then everything is as it was, or complete under a hidden name.
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
            # Not known to be on the disk: then it must not be there at all.
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
    """Delete checkpoints so that a crash leaves each of them whole or out of sight.

    Args:
        doomed: (step, folder) as ``list_checkpoints`` returns them.

    Returns:
        The folders that are gone; one that cannot be deleted is reported and left.
    """
    trash: list[Path] = []
    deleted: list[Path] = []
    for step, path in doomed:
        hidden = filesystem.hidden_path(path.parent, "trash", step)
        try:
            os.rename(path, hidden)
        except FileNotFoundError:
            continue  # somebody else was quicker
        except OSError as error:
            logger.warning("Could not delete the old checkpoint %s: %s", path, error)
            continue
        trash.append(hidden)
        deleted.append(path)
    for parent in {path.parent for path in trash}:
        with suppress(OSError):  # deleting is no reason to stop a run
            filesystem.fsync_directory(parent)  # all out of sight before any loses a file
    for hidden in trash:
        try:
            filesystem.remove_tree(hidden)
        except OSError as error:  # it costs space only, so it is no error
            logger.warning("Could not remove all of %s: %s", hidden, error)
    return deleted


def clean_leftovers(directory: Path, alone: bool = False) -> list[Path]:
    """Remove what dead processes left half done; see ``CheckpointStore.clean_leftovers``.

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
