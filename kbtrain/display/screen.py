"""The lower lines of a terminal, redrawn in place, with everything else printed above them."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.text import Text

from kbtrain.distributed.launch.terminal import SharedTerminal, erasing

INTERVAL = 0.1
"""Seconds between two redraws."""

MOST_COLUMNS = 200

MARGIN = 4
"""Columns left free at the end of a status line."""


class Screen:
    """Draws status lines at the bottom of a terminal ten times a second, in a thread of its own.

    While it is open, what the program writes to stdout and stderr, if those are this terminal,
    appears above the status lines. An error of the terminal closes the screen for good, and the
    program goes on without it.

    Args:
        status: Returns the status lines for a width in columns; called in the thread.
        stream: The terminal; stderr by default.
    """

    def __init__(self, status: Callable[[int], list[Text]], stream: Any = None) -> None:
        self._status = status
        self._stream = sys.stderr if stream is None else stream
        self._lock = threading.RLock()
        self._process = os.getpid()
        self._drawn: list[int] = []  # lengths of the status lines on the screen
        self._shared = SharedTerminal.inherited(os.environ)
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._replaced: list[tuple[Any, str, Any, Any]] = []  # owner, name, before, now
        self.failed = False

    # --- opening and closing ----------------------------------------------------------------------

    @property
    def is_open(self) -> bool:
        """Whether the status lines are being drawn."""
        return self._thread is not None

    def open(self) -> None:
        """Begin to draw; no effect if it is open or has failed."""
        if self.is_open or self.failed:
            return
        self._stop = threading.Event()
        self._redirect()
        self._thread = threading.Thread(
            target=self._run, args=(self._stop,), name="kbtrain-display", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Remove the status lines, and give the program its streams back."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._stop.set()
        self._restore()
        # Not for ever: a terminal that was stopped (Ctrl-S) may hold it in a write.
        thread.join(timeout=1.0)
        with self._locked() as free:
            if free:
                self._replace("")

    def _run(self, stop: threading.Event) -> None:
        while not stop.wait(INTERVAL):
            self.redraw()

    # --- drawing ----------------------------------------------------------------------------------

    def redraw(self) -> None:
        """Draw the status lines anew."""
        with self._locked() as free:
            if free and self.is_open:
                self._replace("")

    def print(self, *lines: Text) -> None:
        """Print lines above the status lines."""
        width = self.width()
        self.write_above("".join(self._rendered(line, width, True) for line in lines))

    def write_above(self, output: str) -> None:
        """Write complete lines above the status lines, as they are."""
        with self._locked() as free:
            if free:
                self._replace(output)

    def _replace(self, above: str) -> None:
        """Write something in the place of the status lines, and draw them below it."""
        drawing, lengths = self._drawing() if self.is_open else ("", [])
        with self._on_screen() as drawn:
            removed = erasing(drawn, self.width())
            drawn[:] = lengths
            self._write(removed + above + drawing)

    def width(self) -> int:
        """Columns of the terminal."""
        try:
            columns = os.get_terminal_size(self._stream.fileno()).columns
        except (OSError, ValueError, AttributeError):
            columns = 80
        return max(1, min(columns or 80, MOST_COLUMNS))

    @contextlib.contextmanager
    def _on_screen(self) -> Iterator[list[int]]:
        """The lengths of the status lines on the screen, to be changed to what is drawn."""
        if self._shared is None:
            yield self._drawn
        else:
            with self._shared.taken() as drawn:
                yield drawn

    def _drawing(self) -> tuple[str, list[int]]:
        """The status lines, and their lengths."""
        # A full line would leave the cursor on the next one, as would "^C" after a nearly full one.
        width = self.width() - MARGIN
        if width < 1:
            return "", []
        try:
            lines = [line for line in self._status(width) if line.cell_len]
        except Exception:  # what the program prints must not fail for it
            return "", []
        for line in lines:
            line.truncate(width, overflow="crop")
        drawing = "\n".join(self._rendered(line, width + MARGIN, False) for line in lines)
        return drawing, [line.cell_len for line in lines]

    def _rendered(self, line: Text, width: int, wraps: bool) -> str:
        buffer = io.StringIO()
        console = Console(
            file=buffer,
            force_terminal=True,
            width=width,
            color_system=None if os.environ.get("NO_COLOR") else "standard",
            highlight=False,
            legacy_windows=False,
        )
        # The terminal wraps what is too long, and does so anew when it is resized.
        console.print(line, end="\n" if wraps else "", soft_wrap=True)
        return buffer.getvalue()

    def _write(self, output: str) -> None:
        if not output or self.failed:
            return
        try:
            try:
                self._stream.write(output)
            except UnicodeEncodeError:
                encoding = self._stream.encoding or "ascii"
                self._stream.write(output.encode(encoding, "replace").decode(encoding))
            self._stream.flush()
        except (OSError, ValueError):  # the terminal is gone
            self.failed = True
            self._stop.set()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[bool]:
        """The lock, unless this is the child of a fork, where it may never be released."""
        if os.getpid() != self._process:
            yield False
            return
        with self._lock:
            yield not self.failed

    # --- the streams of the program ---------------------------------------------------------------

    def _redirect(self) -> None:
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if stream is not None and _is_same_terminal(stream, self._stream):
                above = _Above(self, stream)
                self._replace_attribute(sys, name, above)
                for handler in _handlers_of(stream):
                    self._replace_attribute(handler, "stream", above)
        self._replace_attribute(sys, "breakpointhook", self._debug)

    def _replace_attribute(self, owner: Any, name: str, value: Any) -> None:
        self._replaced.append((owner, name, getattr(owner, name), value))
        setattr(owner, name, value)

    def _restore(self) -> None:
        replaced, self._replaced = self._replaced, []
        for owner, name, before, now in reversed(replaced):
            if getattr(owner, name, None) == now:  # else the program has put another one there
                if isinstance(now, _Above):
                    now.finish()
                setattr(owner, name, before)

    def _debug(self, *args: Any, **kwargs: Any) -> Any:
        """``breakpoint()``: leave the terminal to the debugger."""
        self.close()
        chosen = os.environ.get("PYTHONBREAKPOINT") or "pdb.set_trace"
        if sys.breakpointhook is sys.__breakpointhook__ and chosen == "pdb.set_trace":
            import pdb

            return pdb.Pdb(*args, **kwargs).set_trace(sys._getframe(1))  # the caller's frame
        return sys.breakpointhook(*args, **kwargs)


class _Above:
    """Stands for stdout or stderr while a screen is open: complete lines go above the status.

    Args:
        screen: The screen.
        stream: The stream it stands for, which has everything else.
    """

    def __init__(self, screen: Screen, stream: Any) -> None:
        self._screen, self._of = screen, stream
        self._begun = ""  # of a line that is not complete

    def write(self, output: str) -> int:
        """Write; an incomplete line waits for its end."""
        if not isinstance(output, str):
            raise TypeError(f"write() argument must be str, not {type(output).__name__}")
        if os.getpid() != self._screen._process or not self._screen.is_open:
            return int(self._of.write(output))
        with self._screen._lock:
            complete, newline, self._begun = (self._begun + output).rpartition("\n")
            # A bar of another package rewrites its line: only what it leaves is shown.
            self._begun = self._begun.rpartition("\r")[2] if "\r" in self._begun else self._begun
            if newline:
                self._screen.write_above(_last_of_rewritten(complete) + "\n")
        return len(output)

    def writelines(self, lines: Any) -> None:
        """Write each of them."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush what has been written; an incomplete line waits for its end."""
        with contextlib.suppress(OSError, ValueError):
            self._of.flush()

    def finish(self) -> None:
        """Write the line that was begun."""
        with self._screen._lock:
            begun, self._begun = self._begun, ""
            if begun.strip():
                self._screen.write_above(begun + "\n")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._of, name)


def _last_of_rewritten(output: str) -> str:
    """The lines, each without what a carriage return in it has overwritten."""
    if "\r" not in output:
        return output
    lines = (line.rstrip("\r") for line in output.split("\n"))
    return "\n".join(line.rpartition("\r")[2] for line in lines)


def _is_same_terminal(stream: Any, terminal: Any) -> bool:
    if stream is terminal:
        return True
    try:
        return stream.isatty() and os.path.sameopenfile(stream.fileno(), terminal.fileno())
    except (OSError, ValueError, AttributeError):
        return False


def _handlers_of(stream: Any) -> list[Any]:
    """The handlers of all loggers that write to the stream."""
    loggers = [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]
    found = []
    for each in loggers:
        for handler in getattr(each, "handlers", ()):
            # Some look up sys.stderr each time, and have no stream of their own.
            if isinstance(handler, logging.StreamHandler) and (
                vars(handler).get("stream") is stream
            ):
                found.append(handler)
    return found
