"""What an error of the system says about a checkpoint: that it is damaged, or only out of reach.

A missing file or a link where a file should be is damage: reading it again will not help, and an
older checkpoint is used. A disk that answers with an error, a file of another user's, a process
that has no memory or file descriptors left say nothing about the checkpoint. Taking that for damage
would begin a run anew beside checkpoints that are intact.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kbtrain.errors import CheckpointDamagedError, CheckpointUnreadableError
from kbtrain.utils.filesystem import entries, parse_checkpoint_name

_DAMAGE = {
    None,  # not of the system: `disk.open_regular` found something else than a file
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
    errno.ENOMEM: "Free memory, or take a machine that has more.",
}
_ADVICE[errno.EPERM] = _ADVICE[errno.EACCES]


def is_damage(error: OSError) -> bool:
    """Whether an error at opening or reading a file shows that it is not as it was written."""
    return error.errno in _DAMAGE


def unreadable(what: Path, error: OSError | MemoryError) -> CheckpointUnreadableError:
    """Say what cannot be read now, and what helps.

    Args:
        what: The file or folder.
        error: What the system said.
    """
    if isinstance(error, MemoryError):
        reason, number = os.strerror(errno.ENOMEM), errno.ENOMEM
    else:
        reason, number = error.strerror or str(error), error.errno or 0
    advice = _ADVICE.get(
        number, "Look at the disk, or at the connection to it, and mount it again."
    )
    folders = (p for p in (what, *what.parents) if parse_checkpoint_name(p.name) is not None)
    checkpoint = next(folders, None)
    otherwise = (
        f" If it stays like this, move {checkpoint} elsewhere: the one before it is used then."
        if checkpoint is not None
        else ""
    )
    return CheckpointUnreadableError(
        f"{what} cannot be read at the moment: {reason} (errno {number}). That is no sign of "
        f"damage, so nothing was changed and nothing is begun anew. {advice} Then start again."
        f"{otherwise}"
    )


@contextmanager
def reading(what: Path, name: str) -> Iterator[None]:
    """Turn errors of the system inside into one of kbtrain's.

    Args:
        what: The file or folder.
        name: What to call it where it is damaged.

    Raises:
        CheckpointDamagedError: It is not what it was written as.
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
    """Whether a folder is there; unlike ``Path.is_dir``, never False for want of an answer.

    Raises:
        CheckpointUnreadableError: The system does not say.
    """
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except OSError as error:
        return _not_there(path, error)


def exists(path: Path) -> bool:
    """Whether something has that name, a link that leads nowhere included; as ``is_folder``.

    Raises:
        CheckpointUnreadableError: The system does not say.
    """
    try:
        os.lstat(path)
    except OSError as error:
        return _not_there(path, error)
    return True


def names_in(directory: Path) -> list[str]:
    """The sorted names in a folder, none if it is not there or no folder.

    Raises:
        CheckpointUnreadableError: It cannot be listed. Taking it for empty would begin a run anew
            over checkpoints that are there.
    """
    try:
        return entries(directory)
    except OSError as error:
        raise unreadable(directory, error) from error


def _not_there(path: Path, error: OSError) -> bool:
    if is_damage(error):
        return False
    raise unreadable(path, error) from error
