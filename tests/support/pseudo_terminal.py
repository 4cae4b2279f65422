"""Terminals that are none: what a program or this process shows on one."""

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from dataclasses import dataclass

import pyte
from paths import ROOT, SUPPORT

LINES = 200


@dataclass
class Recording:
    """What a program left on a terminal.

    Attributes:
        screen: Its lines at the end.
        moments: The screens when something that was waited for appeared.
        raw: All that was written.
        status: The exit status; negative for a signal.
        longest_silence: Seconds between two outputs, at most.
        display: The terminal, for pictures.
    """

    screen: list[str]
    moments: list[list[str]]
    raw: str
    status: int
    longest_silence: float
    display: pyte.Screen

    @property
    def text(self):
        return "\n".join(self.screen)

    def line(self, part):
        """The only line that has ``part``."""
        (found,) = [line for line in self.screen if part in line]
        return found


def record(command, columns=80, keys=(), env=None, cwd=None, timeout=120, lines=LINES):
    """Run a command in a terminal of its own.

    Args:
        command: The command.
        columns: Width of the terminal.
        keys: What to wait for on the screen, and what to type then, in order: bytes, or a function
            of the process.
        env: Changes of the environment; None removes a variable.
        cwd: The working directory.
        timeout: Seconds until the program is killed.
        lines: Height of the terminal.
    """
    environ = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{SUPPORT}",
        "TERM": "xterm-256color",
        **(env or {}),
    }
    environ = {name: value for name, value in environ.items() if value is not None}
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    process = subprocess.Popen(
        command, stdin=slave, stdout=slave, stderr=slave, env=environ, cwd=cwd,
        preexec_fn=_own_terminal, close_fds=True,
    )  # fmt: skip
    os.close(slave)
    display = pyte.Screen(columns, lines)
    stream = pyte.ByteStream(display)
    raw, moments, waiting = bytearray(), [], list(keys)
    deadline, last, silence = time.monotonic() + timeout, None, 0.0
    try:
        while time.monotonic() < deadline:
            ready, _, _ = select.select([master], [], [], 0.2)
            if not ready:
                if process.poll() is not None:
                    break
                continue
            try:
                output = os.read(master, 1 << 16)
            except OSError:  # the program has ended
                break
            if not output:
                break
            now = time.monotonic()
            silence = max(silence, 0.0 if last is None else now - last)
            last = now
            raw += output
            stream.feed(output)
            if waiting and any(waiting[0][0] in line for line in display.display):
                _, action = waiting.pop(0)
                moments.append(_lines(display))
                if callable(action):
                    action(process)
                else:
                    os.write(master, action)
        status = process.wait(timeout=max(1.0, deadline - time.monotonic()))
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        os.close(master)
    assert not waiting, f"never seen: {waiting[0][0]!r}\n" + raw.decode(errors="replace")
    return Recording(
        _lines(display), moments, raw.decode(errors="replace"), status, silence, display
    )


class Terminal:
    """A terminal for this process: its stdout and stderr while it is open, and what it shows.

    Args:
        columns: Its width.
        lines: Its height.
    """

    def __init__(self, columns=80, lines=LINES):
        self._master, slave = pty.openpty()
        self._slave = os.fdopen(slave, "w", encoding="utf-8")
        self.display, self.raw = pyte.Screen(columns, lines), bytearray()
        self.resize(columns, lines)
        self._stream = pyte.ByteStream(self.display)
        self._reader = threading.Thread(target=self._read, daemon=True)

    def resize(self, columns, lines=LINES):
        """Change the size, as a user does."""
        size = struct.pack("HHHH", lines, columns, 0, 0)
        fcntl.ioctl(self._slave.fileno(), termios.TIOCSWINSZ, size)
        self.display.resize(lines, columns)

    def __enter__(self):
        self._former = sys.stdout, sys.stderr
        sys.stdout = sys.stderr = self._slave
        self._reader.start()
        return self

    def __exit__(self, *_):
        sys.stdout, sys.stderr = self._former
        self._slave.close()  # the reader gets what is left, and then an error
        self._reader.join(timeout=10)
        os.close(self._master)

    def _read(self):
        while True:
            try:
                output = os.read(self._master, 1 << 16)
            except OSError:
                return
            if not output:
                return
            self.raw += output
            self._stream.feed(output)

    @property
    def lines(self):
        """The lines it shows."""
        return _lines(self.display)

    @property
    def text(self):
        """All it shows."""
        return "\n".join(self.lines)


def _own_terminal():
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def _lines(display):
    lines = [line.rstrip() for line in display.display]
    while lines and not lines[-1]:
        lines.pop()
    return lines


if __name__ == "__main__":
    shown = record(sys.argv[2:], columns=int(sys.argv[1]))
    print(shown.text)
    print(f"status {shown.status}, longest silence {shown.longest_silence:.1f} s")
