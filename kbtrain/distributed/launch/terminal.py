"""The terminal that processes of ``kbtrain launch`` share.

The first process redraws its status lines at the bottom, the launcher prints what the others say. A
small file tells both which status lines are on the screen: whoever writes locks it, and removes
them first, so that the lines of others appear above.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence

try:
    import fcntl
except ImportError:  # on Windows, where the launcher refuses to run
    fcntl = None  # type: ignore[assignment]

VARIABLE = "KBTRAIN_TERMINAL"
"""Tells the first process the number of the open file, and which file it is."""


def erasing(lengths: Sequence[int], width: int) -> str:
    """Control characters that remove the lines at the bottom of a terminal.

    Args:
        lengths: Columns of each line.
        width: Columns of the terminal, which may be narrower by now and have wrapped them.
    """
    if not lengths:
        return ""
    rows = sum(max(1, -(-length // width)) for length in lengths)
    return "\r\x1b[2K" + "\x1b[1A\x1b[2K" * (rows - 1)


class SharedTerminal:
    """Which status lines are on the terminal, known to the launcher and the first process.

    Args:
        number: The open file.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        # A signal handler may print while this thread writes.
        self._lock = threading.RLock()
        self._held: list[int] | None = None

    @classmethod
    def new(cls) -> SharedTerminal | None:
        """That of a launcher, if its output is a terminal."""
        if fcntl is None or not (os.isatty(1) or os.isatty(2)):
            return None
        with contextlib.suppress(OSError), tempfile.TemporaryFile() as file:
            return cls(os.dup(file.fileno()))
        return None

    @classmethod
    def inherited(cls, environment: Mapping[str, str]) -> SharedTerminal | None:
        """That of the first process, where a launcher has started it."""
        number, _, which = environment.get(VARIABLE, "").partition(" ")
        with contextlib.suppress(OSError, ValueError):
            if which == _identity(int(number)):  # in a child process it may be another file
                return cls(int(number))
        return None

    @property
    def variable(self) -> str:
        """The value of ``VARIABLE``."""
        return f"{self.number} {_identity(self.number)}"

    @contextlib.contextmanager
    def taken(self) -> Iterator[list[int]]:
        """Context in which the other process does not write.

        It gives the lengths of the status lines on the screen; what the list is at the end counts.
        """
        with self._lock:  # the other one is per process
            if self._held is not None:  # what a signal handler prints in the middle of a write
                yield self._held
                return
            fcntl.lockf(self.number, fcntl.LOCK_EX)
            try:
                before = self._read()
                self._held = list(before)
                yield self._held
                if self._held != before:
                    with contextlib.suppress(OSError):  # a full disk ends no program
                        os.ftruncate(self.number, 0)
                        os.pwrite(self.number, json.dumps(self._held).encode(), 0)
            finally:
                self._held = None
                fcntl.lockf(self.number, fcntl.LOCK_UN)

    def _read(self) -> list[int]:
        text = os.pread(self.number, os.fstat(self.number).st_size, 0)
        try:
            found: list[int] = json.loads(text or b"[]")
        except ValueError:  # written in part, to a full disk
            return []
        return found

    def write(self, target: int, data: bytes) -> None:
        """Write whole lines above the status lines, which the first process draws again."""
        if os.isatty(target):
            with self.taken() as lengths:
                columns = os.get_terminal_size(target).columns or 80
                write_all(target, erasing(lengths, columns).encode() + data)
                lengths.clear()
        else:
            write_all(target, data)


def write_all(target: int, data: bytes) -> None:
    """Write all of the bytes to an open file."""
    while data:
        data = data[os.write(target, data) :]


def _identity(number: int) -> str:
    found = os.fstat(number)
    return f"{found.st_dev}:{found.st_ino}"
