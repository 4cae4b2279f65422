"""Ending a process of a run at once, with the reason, whatever its threads are waiting for.

The shutdown of a framework waits for all processes (JAX for five minutes), and the exit of Python
for the threads of this one. After a failure they would wait in vain, so ``os._exit`` ends the
process.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
import traceback
from types import TracebackType
from typing import Protocol

WRITING = 1.0
"""Seconds for the last output; a full pipe that nobody reads may block it."""

_ending = threading.Lock()


class Fails(Protocol):
    """What the hooks need of a channel."""

    def failing(self) -> None:
        """The main thread has an exception and is about to report it."""

    def fail(self, error: BaseException) -> str | None:
        """Report an exception; the result is the earlier failure of another process, if any."""

    def leave(self) -> None:
        """The program of this process ends."""


def end_process(text: str, status: int = 1) -> None:
    """Print ``text`` to the standard error, end child processes, and end this process.

    It does not return. Only the first call counts.
    """
    if not _ending.acquire(blocking=False):
        threading.Event().wait()  # another thread ends this process
    last = threading.Thread(target=_write, args=(text,), daemon=True)
    last.start()
    last.join(WRITING)
    if last.is_alive() and text:
        os.set_blocking(2, False)
        with contextlib.suppress(OSError):
            os.write(2, f"{text}\n".encode())
    _end_children()
    os._exit(status)


def _write(text: str) -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is sys.stderr and text:
                stream.write(f"{text}\n")
            stream.flush()
        except (OSError, ValueError, AttributeError):
            pass  # closed, or None


def _end_children() -> None:
    """End the processes that ``multiprocessing`` started, which it does at a normal exit."""
    multiprocessing = sys.modules.get("multiprocessing")
    if multiprocessing is None:
        return
    for child in multiprocessing.active_children():
        with contextlib.suppress(OSError, ValueError):  # it may have ended meanwhile
            child.kill()


def main_stack() -> str:
    """The stack of the main thread, as in a traceback."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return "".join(traceback.format_stack(frame)) if frame is not None else ""


class ExitHooks:
    """Let a channel know how the program of this process ends.

    An uncaught exception is printed by the hook that is there already, and reported; then the
    process ends at once. At a normal exit the channel learns that this process leaves. Install this
    after the frameworks were started, so that it comes before their own functions at exit.

    Attributes:
        channel: The channel; None until there is one.
    """

    def __init__(self) -> None:
        self.channel: Fails | None = None
        self._pid = os.getpid()
        self._previous = sys.excepthook
        sys.excepthook = self._hook
        atexit.register(self._at_exit)

    def _hook(
        self, kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        ends = self._ends_by_exception()
        agreed = getattr(error, "of_all_processes", False)
        if ends and self.channel is not None and not agreed:
            self.channel.failing()
        self._previous(kind, error, trace)
        if ends:
            self._end(error)

    def _at_exit(self) -> None:
        # Python sets it for an uncaught exception; another program may have replaced the hook.
        error = getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)
        if error is not None and self._ends_by_exception():
            self._end(error)
        if self.channel is not None:
            self.channel.leave()

    def _ends_by_exception(self) -> bool:
        interactive = sys.flags.interactive or hasattr(sys, "ps1")
        return not interactive and os.getpid() == self._pid

    def _end(self, error: BaseException) -> None:
        text = None
        interrupted = isinstance(error, KeyboardInterrupt)
        if self.channel is not None and getattr(error, "of_all_processes", False):
            self.channel.leave()  # they have agreed to stop, and each ends in this way
        elif self.channel is not None:
            self.channel.failing()
            text = self.channel.fail(error)
        end_process(text or "", 128 + signal.SIGINT if interrupted else 1)
