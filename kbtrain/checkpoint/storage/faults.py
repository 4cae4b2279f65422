"""Tells damaged checkpoints from ones that cannot be read at the moment.

A missing file, or a link in place of a file, is damage: reading it again will not help, and an
older checkpoint is used. An I/O error, a file of another user, or a lack of memory or file
descriptors says nothing about the checkpoint. If these were treated as damage, a run would start
over although its checkpoints are intact.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kbtrain.errors import (
    CheckpointDamagedError,
    CheckpointError,
    CheckpointUnreadableError,
)
from kbtrain.utils.files import filesystem
from kbtrain.utils.files.filesystem import entries, parse_checkpoint_name

_DAMAGE = {
    None,  # raised by `filesystem.open_regular`: not a regular file
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
}

_ADVICE = {
    errno.EACCES: "Make it readable for this user (chmod, chown), or run as the user who wrote it.",
    errno.EMFILE: "This process has too many files open: raise the limit (ulimit -n).",
    errno.ENFILE: "The system has too many files open: close some programs.",
    errno.ENOMEM: "Free memory, or use a machine with more.",
}
_ADVICE[errno.EPERM] = _ADVICE[errno.EACCES]


def is_damage(error: OSError) -> bool:
    """Whether an error on opening or reading a file means that it is damaged."""
    return error.errno in _DAMAGE


def unreadable(what: Path, error: OSError | MemoryError) -> CheckpointUnreadableError:
    """The error for a file or folder that cannot be read now, with advice.

    Args:
        what: The file or folder.
        error: The error of the operating system.
    """
    if isinstance(error, MemoryError):
        reason, number = os.strerror(errno.ENOMEM), errno.ENOMEM
    else:
        reason, number = error.strerror or str(error), error.errno or 0
    advice = _ADVICE.get(number, "Check the disk, or the connection to it, and mount it again.")
    folders = (p for p in (what, *what.parents) if parse_checkpoint_name(p.name) is not None)
    checkpoint = next(folders, None)
    otherwise = (
        f" If the error persists, move {checkpoint} elsewhere: then the one before it is used."
        if checkpoint is not None
        else ""
    )
    return CheckpointUnreadableError(
        f"{what} cannot be read at the moment: {reason} (errno {number}). This does not mean that "
        f"it is damaged, so nothing was changed and training does not start over. {advice} Then "
        f"start again.{otherwise}"
    )


@contextmanager
def reading(what: Path, name: str) -> Iterator[None]:
    """Convert errors of the operating system inside into errors of kbtrain.

    Args:
        what: The file or folder.
        name: Its name for the message if it is damaged.

    Raises:
        CheckpointDamagedError: It is missing or damaged.
        CheckpointUnreadableError: It cannot be read now.
    """
    try:
        yield
    except OSError as error:
        if not is_damage(error):
            raise unreadable(what, error) from error
        missing = isinstance(error, FileNotFoundError)
        reason = "missing" if missing else error.strerror or str(error)
        raise CheckpointDamagedError(f"{name}: {reason}") from error
    except MemoryError as error:
        raise unreadable(what, error) from error


def is_folder(path: Path) -> bool:
    """Whether a folder exists; unlike ``Path.is_dir``, not False if that is unknown.

    Raises:
        CheckpointUnreadableError: That cannot be determined.
    """
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except OSError as error:
        return _not_there(path, error)


def exists(path: Path) -> bool:
    """Whether a path exists, broken links included; not False if that is unknown.

    Raises:
        CheckpointUnreadableError: That cannot be determined.
    """
    try:
        os.lstat(path)
    except OSError as error:
        return _not_there(path, error)
    return True


def names_in(directory: Path) -> list[str]:
    """The sorted names in a folder; empty if it does not exist or is not a folder.

    Raises:
        CheckpointUnreadableError: It cannot be listed. If that counted as empty, a run would start
            over and overwrite existing checkpoints.
    """
    try:
        return entries(directory)
    except OSError as error:
        raise unreadable(directory, error) from error


def _not_there(path: Path, error: OSError) -> bool:
    if is_damage(error):
        return False
    raise unreadable(path, error) from error


def explain_failure(directory: Path, what: Path, error: OSError) -> CheckpointError:
    """Explain why a folder of a run cannot be written, and what to do about it.

    Args:
        directory: The run's folder.
        what: The checkpoint, or the run's folder.
        error: The error of the operating system.
    """
    reason = error.strerror or str(error)
    text = f"Could not write {what.name} in {what.parent}: {reason} (errno {error.errno})."
    if what != directory:
        text += " The partial checkpoint was removed; earlier checkpoints are untouched."
    if error.errno in filesystem.NO_SPACE:
        space = filesystem.describe_space(what.parent)
        return CheckpointError(f"{text} {space} {_size_of_checkpoints(directory)}")
    return CheckpointError(f"{text} {filesystem.what_to_do(directory, error)}")


def _size_of_checkpoints(directory: Path) -> str:
    with suppress(OSError, CheckpointError):
        names = filesystem.entries(directory)
        steps = [parse_checkpoint_name(name) for name in names]
        present = [filesystem.checkpoint_name(s) for s in sorted(s for s in steps if s is not None)]
        if present:
            size = sum(filesystem.tree_size(directory / name) for name in present)
            there = (
                f"The checkpoint there ({present[0]}) takes"
                if len(present) == 1
                else f"The checkpoints there ({present[0]} to {present[-1]}, {len(present)} in all)"
                " take"
            )
            return (
                f"{there} {size / 1e6:,.0f} MB: free space by deleting old "
                "ones (save_total_limit does so), or choose another output_dir."
            )
    return "Free space or choose another output_dir."
