"""Sees signals at once, also while the main thread computes outside of Python.

Python calls a signal handler only when the main thread gets back to Python, which takes as long as
a framework compiles. What is said about a signal must not wait for that.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
from collections.abc import Callable


class SignalWatch:
    """Calls a function in a thread for each signal that Python handles.

    Args:
        seen: Called with the number of the signal.
    """

    def __init__(self, seen: Callable[[int], None]) -> None:
        self._seen = seen
        self._ends: tuple[socket.socket, socket.socket] | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> bool:
        """Begin to watch; must be called in the main thread.

        Returns:
            False if the program watches signals itself, as asyncio does; it then goes on to.
        """
        reading, writing = socket.socketpair()
        writing.setblocking(False)
        former = signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
        if former != -1:
            signal.set_wakeup_fd(former)
            reading.close()
            writing.close()
            return False
        self._ends = reading, writing
        self._thread = threading.Thread(
            target=self._watch, args=(reading,), name="kbtrain-signals", daemon=True
        )
        self._thread.start()
        return True

    def stop(self) -> None:
        """Watch no more."""
        if self._ends is None or self._thread is None:
            return
        reading, writing = self._ends
        with contextlib.suppress(ValueError):  # not in the main thread
            signal.set_wakeup_fd(-1)
        with contextlib.suppress(OSError):
            writing.send(b"\0")
        self._thread.join(timeout=1.0)
        writing.close()
        reading.close()
        self._ends = self._thread = None

    def _watch(self, reading: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                for number in reading.recv(64):
                    if number == 0:
                        return
                    self._seen(number)
