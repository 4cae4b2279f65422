"""File system operations for checkpoints: flushing, hidden folders, safe opening and removal.

Nothing here depends on the contents of a checkpoint. The functions raise ``OSError``; their callers
turn it into an error with advice for the user.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import io
import os
import platform
import re
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

Role = Literal["tmp", "trash", "replaced"]

MAX_STEP = 10**18 - 1  # the largest step that the names below can hold

_CHECKPOINT = re.compile(r"checkpoint-(0|[1-9][0-9]{0,17})", re.ASCII)
_HIDDEN = re.compile(
    r"\.(tmp|trash|replaced)-checkpoint-(0|[1-9][0-9]{0,17})-([0-9]{1,10})-[0-9a-f]+", re.ASCII
)


class FileEntry(NamedTuple):
    """The size and checksum of a file, recorded when it is written.

    Attributes:
        size: Bytes.
        sha256: Hexadecimal digest of the content.
        group: The group its arrays belong to; None for other files.
    """

    size: int
    sha256: str
    group: str | None = None


class HiddenFolder(NamedTuple):
    """A folder beside the checkpoints that is being written, replaced or deleted.

    Attributes:
        path: The folder.
        role: ``"tmp"`` (being written), ``"replaced"`` (the older of two checkpoints of one step,
            still complete) or ``"trash"`` (being deleted).
        step: The step of the checkpoint it is or was.
        pid: The process that created it.
    """

    path: Path
    role: str
    step: int
    pid: int


def checkpoint_name(step: int) -> str:
    """Return the folder name of the checkpoint of ``step``."""
    return f"checkpoint-{step}"


def parse_checkpoint_name(name: str) -> int | None:
    """Return the step in a checkpoint's folder name, None if it is not such a name."""
    match = _CHECKPOINT.fullmatch(name)
    return int(match[1]) if match else None


def hidden_path(directory: Path, role: Role, step: int) -> Path:
    """Return a new hidden path next to the checkpoints."""
    name = f".{role}-{checkpoint_name(step)}-{os.getpid()}-{secrets.token_hex(4)}"
    return directory / name


def parse_hidden(path: Path) -> HiddenFolder | None:
    """Parse the name of a hidden folder; None if it is not a name that kbtrain uses."""
    match = _HIDDEN.fullmatch(path.name)
    return HiddenFolder(path, match[1], int(match[2]), int(match[3])) if match else None


def entries(directory: Path) -> list[str]:
    """Return the sorted names in a folder; empty if it does not exist or is not a folder."""
    try:
        return sorted(os.listdir(directory))
    except (FileNotFoundError, NotADirectoryError):
        return []


def process_is_alive(pid: int) -> bool:
    """Return whether a process with this id runs on this machine.

    Where the system offers no safe way to check (Windows), the answer is True, so that nothing of
    another process is touched there.
    """
    if pid <= 0:
        return False
    if sys.platform == "win32":
        return True
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True


def fsync_directory(path: Path) -> None:
    """Flush a folder's entries, so that a rename or a new file survives a power failure."""
    if sys.platform == "win32":  # folders cannot be opened there, and entries are journaled
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, data: bytes) -> FileEntry:
    """Write a new file, flush it to the disk and return its size and checksum."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return FileEntry(len(data), hashlib.sha256(data).hexdigest())


_REPLACING: set[Path] = set()
_BESIDE = re.compile(r"\.tmp-([0-9]{1,10})-([0-9a-f]{4})([0-9a-f]{4})-.+", re.ASCII | re.DOTALL)
_OLD = 24 * 3600.0


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write to a temporary file that replaces ``path`` at the end, or is removed after an error.

    Its name has the extension of ``path``, for writers that depend on it. Temporary files of dead
    processes in the same folder are removed.
    """
    remove_abandoned_files(path.parent)
    token = secrets.token_hex(2) + _host()
    temporary = path.with_name(f".tmp-{os.getpid()}-{token}-{path.name}")
    _REPLACING.add(temporary.absolute())
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())  # or a power failure could leave an empty file
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):  # it would hide the original error
            temporary.unlink(missing_ok=True)
        _REPLACING.discard(temporary.absolute())


@functools.cache
def _host() -> str:
    """Four hexadecimal digits for this machine, to recognize other machines on a shared disk."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:4]


def remove_abandoned_files(directory: Path, any_host: bool = False) -> list[Path]:
    """Remove temporary files that ``replacing`` left in a folder when its process was killed.

    These are files of dead processes on this machine, and files more than a day old, because a
    container may have a new host name at each start. A file that cannot be removed is left.

    Args:
        directory: The folder.
        any_host: Whether no process on another machine writes here.

    Returns:
        The removed files.
    """
    gone = []
    with contextlib.suppress(OSError):
        for path in (directory / name for name in entries(directory) if name.startswith(".tmp-")):
            match = _BESIDE.fullmatch(path.name)
            if match is None or path.absolute() in _REPLACING or not path.is_file():
                continue
            pid = int(match[1])
            dead = pid == os.getpid() or not process_is_alive(pid)
            old = time.time() - path.stat().st_mtime > _OLD
            if old or (dead and (any_host or match[3] == _host())):
                path.unlink()
                gone.append(path)
    return gone


def open_regular(path: Path) -> io.FileIO:
    """Open an existing regular file for reading, unbuffered; never through a symbolic link.

    Raises:
        OSError: If there is no such file, or it is a link, a folder, a pipe or a device.
    """
    # The check before the open is for pipes and devices, whose open may block forever; O_NOFOLLOW
    # and the second check close the race in between.
    _require_regular(path, os.lstat(path).st_mode)
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags)
    file = io.FileIO(descriptor, "rb")
    try:
        _require_regular(path, os.fstat(descriptor).st_mode)
    except BaseException:
        file.close()
        raise
    return file


def _require_regular(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = "a symbolic link" if stat.S_ISLNK(mode) else "not a regular file"
        raise OSError(f"{path.name} is {kind}")


def remove_tree(path: Path) -> None:
    """Remove a folder and its contents; a symbolic link is unlinked, not followed."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
    else:
        shutil.rmtree(path)


def tree_size(path: Path) -> int:
    """Return the total size of the regular files in a folder and below it.

    What another thread or process removes meanwhile counts nothing.

    Raises:
        OSError: A folder cannot be read.
    """

    def unreadable(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    total = 0
    for folder, _, names in os.walk(path, onerror=unreadable):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                found = os.lstat(os.path.join(folder, name))
                total += found.st_size if stat.S_ISREG(found.st_mode) else 0
    return total


NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error numbers of a full disk, of an exceeded quota, and of the limit for the size of a file."""


def what_to_do(folder: Path, error: OSError) -> str:
    """Say what a user can do about an error of writing, other than free space.

    Args:
        folder: The folder that was to be written to.
        error: The error.
    """
    taken = next((p for p in (folder, *folder.parents) if os.path.lexists(p)), None)
    if taken is not None and not taken.is_dir():
        return f"{taken} is not a folder: choose another output_dir, or rename or delete that file."
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"Choose another output_dir, or make {taken or folder} writable for this user."
    if error.errno == errno.EROFS:
        return (
            "That disk can only be read: choose another output_dir, or make this one a folder that "
            "this process can write to."
        )
    if taken != folder:
        return f"No folder can be made in {taken}: choose another output_dir."
    return f"Choose another output_dir, or make {folder} a folder that this process can write to."


def describe_space(directory: Path) -> str:
    """Describe the free space on the disk of a folder; empty if unknown."""
    try:
        free = shutil.disk_usage(directory).free
        system = os.statvfs(directory) if hasattr(os, "statvfs") else None
    except OSError:
        return ""
    text = f"{free / 1e6:,.0f} MB are free on that disk."
    if system is not None and system.f_files and not system.f_favail:
        text += " It cannot hold any more files, of any size (no inodes are left)."
    return text
