"""One run per folder: a lock that the operating system releases when its process dies."""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from kbtrain.errors import FolderInUseError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK_NAME = ".kbtrain.lock"

logger = logging.getLogger("kbtrain")

_NOT_SUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
_held: set[int] = set()  # descriptors of this process


def _forget_after_fork() -> None:
    """Close inherited locks: a forked worker must not keep the lock of a killed run alive."""
    for descriptor in _held:
        with suppress(OSError):
            os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_after_fork)


class RunLock:
    """An exclusive lock (``flock``) on the file ``.kbtrain.lock`` of a folder.

    The operating system releases it when the process ends, however it ends; a file that a killed
    process left behind does not block. A clean exit removes the file. Where the system has no such
    locks (Windows, some network disks), a debug message or warning is logged, and the user has to
    avoid two runs in one folder.

    Args:
        directory: The folder; created by ``acquire`` if it does not exist.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.path = Path(directory) / LOCK_NAME
        self._descriptor: int | None = None
        self._made_folder = False

    @property
    def is_held(self) -> bool:
        """Whether the lock keeps other processes out."""
        return self._descriptor is not None

    def acquire(self) -> None:
        """Take the lock, or keep it; if its file was deleted, take it again.

        Raises:
            FolderInUseError: If another run has it; the message says which.
            OSError: If the folder or the file cannot be created or opened.
        """
        if fcntl is None:
            logger.debug("No lock on %s: this system has none.", self.path.parent)
            return
        if self._descriptor is not None:
            with suppress(OSError):  # unknown: keep the lock that is held
                if not _is_file_of(self._descriptor, self.path):
                    self._close()
            if self._descriptor is not None:
                return
        self._made_folder = self._made_folder or not self.path.parent.exists()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor: int | None = None
        while descriptor is None:
            descriptor = self._attempt()
        if descriptor >= 0:
            self._descriptor = descriptor
            _held.add(descriptor)
            _write_holder(descriptor)

    def release(self) -> None:
        """Release the lock and remove its file, and the folder if the lock created it."""
        if self._descriptor is None:
            return
        with suppress(OSError):
            if _is_file_of(self._descriptor, self.path):
                self.path.unlink()
        self._close()
        if self._made_folder:
            with suppress(OSError):  # usually not empty
                self.path.parent.rmdir()

    def _close(self) -> None:
        if self._descriptor is not None:
            _held.discard(self._descriptor)
            descriptor, self._descriptor = self._descriptor, None
            with suppress(OSError):  # it is closed even so
                os.close(descriptor)

    def _attempt(self) -> int | None:
        """Return the locked descriptor; None to try again; -1 where locks are not supported."""
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        descriptor = os.open(self.path, flags, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = _read_holder(descriptor)
            with suppress(OSError):
                os.close(descriptor)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise FolderInUseError(
                    f"Another run is writing to {self.path.parent}: {holder}. Two runs in one "
                    "folder would delete each other's checkpoints. Wait for it, stop it, or choose "
                    "another output_dir."
                ) from None
            if error.errno in _NOT_SUPPORTED:
                logger.warning(
                    "The disk of %s has no locks (%s): nothing keeps a second run out of it.",
                    self.path.parent,
                    error.strerror,
                )
                return -1
            raise
        try:
            if _is_file_of(descriptor, self.path):
                return descriptor
        except OSError:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its last owner removed the file between our open and our lock
        return None


def _is_file_of(descriptor: int, path: Path) -> bool:
    """Whether ``path`` is still the file of this descriptor.

    Raises:
        OSError: That could not be determined.
    """
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except (FileNotFoundError, NotADirectoryError):
        return False


def _write_holder(descriptor: int) -> None:
    holder = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.now().astimezone().isoformat(timespec="seconds"),
    }
    with suppress(OSError):  # the lock also works on a full disk
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)


def _read_holder(descriptor: int) -> str:
    try:
        holder: dict[str, Any] = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "an unknown process"
