"""The processes of one machine: started together, watched, and ended together.

``kbtrain launch`` is built on it. Nothing here imports a framework.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from kbtrain.distributed.launch.terminal import VARIABLE, SharedTerminal, write_all

GRACE_SECONDS = 10.0
"""How long the others may take to end by themselves, with an error of their own."""

TERMINATION_SECONDS = 5.0
"""How long a process may take after SIGTERM before it gets SIGKILL."""

STOPPING_SECONDS = 600.0
"""How long the processes may take after a SIGTERM for the launcher: they save a checkpoint."""

FORWARDED = tuple(
    getattr(signal, name)
    for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP")
    if hasattr(signal, name)  # importable on Windows, where the launcher refuses to run
)
"""Signals that a launcher hands on to its processes."""

_ORDERLY = tuple(128 + number for number in FORWARDED)
"""The status of a process that saved a checkpoint and stopped because of a signal."""

_CHILD = str(Path(__file__).with_name("child.py"))


@dataclass(frozen=True)
class Outcome:
    """How the processes ended.

    Attributes:
        status: The status of the first that failed, as a shell would give it; 0 if none did.
        may_restart: Whether one failed, rather than was asked to stop.
    """

    status: int
    may_restart: bool


def run_together(
    command: Sequence[str],
    environments: Sequence[Mapping[str, str]],
    log: IO[str] = sys.stderr,
    grace: float = STOPPING_SECONDS,
) -> Outcome:
    """Run a program once per environment, until all have ended.

    The first process has the terminal; the lines of the others are printed with their rank. When
    one fails, the others get ``GRACE_SECONDS`` to end by themselves, and are ended then.
    Signals for this process go to all of them; those that run on for ``grace`` after SIGTERM are
    killed. It must be called in the main thread.

    Args:
        command: The program, by its path, and its arguments.
        environments: All variables of each process, with its ``RANK``.
        log: Where to report processes that failed.
        grace: Seconds that they may take after a SIGTERM for this process.
    """
    with _blocked_signals():
        return _Processes(command, environments, log, grace).wait()


class _Processes:
    """The running processes and what has happened to them."""

    def __init__(
        self,
        command: Sequence[str],
        environments: Sequence[Mapping[str, str]],
        log: IO[str],
        grace: float,
    ) -> None:
        self._log = log
        self._terminal = SharedTerminal.new()
        self._grace = grace
        self._ranks = [environment["RANK"] for environment in environments]
        self._asked: set[int] = set()  # signals that this process got
        self._ended: set[signal.Signals] = set()  # signals sent to end the rest
        self._failures: list[int] = []  # statuses of failed processes, the first one first
        self._orderly: list[int] = []
        self._deadline: float | None = None
        self._why_end = ""
        self._children: list[subprocess.Popen[bytes]] = []
        self._outputs: list[threading.Thread] = []
        try:
            for environment in environments:
                self._start(command, environment)
        except BaseException:
            self._send(signal.SIGKILL)
            raise
        self._running = dict(zip(self._ranks, self._children, strict=True))

    def _start(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        first = not self._children
        shared = self._terminal if first else None
        if shared is not None:
            environment = {**environment, VARIABLE: shared.variable}
        child = subprocess.Popen(
            # -I and -S: nothing of the user's environment can come between.
            [sys.executable, "-I", "-S", _CHILD, str(os.getpid()), *command],
            env=environment,
            stdin=None if first else subprocess.DEVNULL,
            stdout=None if first else subprocess.PIPE,
            stderr=None if first else subprocess.PIPE,
            pass_fds=[] if shared is None else [shared.number],
        )
        self._children.append(child)
        for pipe, target in ((child.stdout, 1), (child.stderr, 2)):
            if pipe is not None:
                prefix = f"[{environment['RANK']}] ".encode()
                arguments = pipe, target, prefix, self._terminal
                thread = threading.Thread(target=_copy_lines, args=arguments, daemon=True)
                thread.start()
                self._outputs.append(thread)

    def wait(self) -> Outcome:
        while self._running:
            number, sender, by_terminal = _next_signal(self._deadline)
            if number in FORWARDED:
                self._asked.add(number)
                if not by_terminal:  # a terminal has sent it to the processes, too
                    self._send(signal.Signals(number))
                if number == signal.SIGTERM and signal.SIGTERM not in self._ended:
                    self._ended.add(signal.SIGTERM)
                    self._end_after(self._grace, f"{self._grace:g} s after SIGTERM")
            self._collect(sender)
            if self._deadline is not None and time.monotonic() >= self._deadline:
                self._end_the_rest()
        for thread in self._outputs:
            thread.join(1.0)  # a process that outlives its parent may hold a pipe open
        if self._terminal is not None and not any(t.is_alive() for t in self._outputs):
            os.close(self._terminal.number)
        statuses = self._failures or self._orderly
        return Outcome(statuses[0] if statuses else 0, bool(self._failures) and not self._asked)

    def _collect(self, first: int) -> None:
        """Note which processes have ended, and how; ``first`` is the one that did so first."""
        for rank, child in sorted(self._running.items(), key=lambda item: item[1].pid != first):
            code = child.poll()
            if code is None:
                continue
            del self._running[rank]
            if code == 0:
                continue
            status = code if code > 0 else 128 - code
            if code in _ORDERLY or -code in self._asked:
                self._orderly.append(status)
                continue
            self._report(rank, child.pid, code)
            self._failures.append(status)
            if len(self._failures) == 1 and self._running:
                self._end_after(GRACE_SECONDS, "after another process failed")
                self._say(f"waiting up to {GRACE_SECONDS:.0f} s for the others to end")

    def _end_after(self, seconds: float, why: str) -> None:
        """End the processes that run on then, or at an earlier time that was set before."""
        deadline = time.monotonic() + seconds
        if self._deadline is None or deadline < self._deadline:
            self._deadline, self._why_end = deadline, why

    def _end_the_rest(self) -> None:
        """Send SIGTERM, or SIGKILL where that did not help."""
        number = signal.SIGKILL if signal.SIGTERM in self._ended else signal.SIGTERM
        ranks = ", ".join(self._running)
        self._say(f"{number.name} for rank {ranks}, still running {self._why_end}")
        self._ended.add(number)
        self._send(number)
        self._deadline = time.monotonic() + TERMINATION_SECONDS

    def _send(self, number: signal.Signals) -> None:
        for child in self._children:
            if child.poll() is None:
                child.send_signal(number)

    def _report(self, rank: str, pid: int, code: int) -> None:
        how = f"exited with status {code}" if code > 0 else f"was killed by {_name(-code)}"
        self._say(f"rank {rank} on {socket.gethostname()} (process {pid}) {how}")

    def _say(self, text: str) -> None:
        line = f"kbtrain launch: {text}."
        if self._terminal is not None and self._log is sys.stderr:
            self._terminal.write(2, f"{line}\n".encode())
        else:
            print(line, file=self._log, flush=True)


@contextmanager
def _blocked_signals() -> Iterator[None]:
    """Context in which signals wait until ``_next_signal`` asks for them.

    Threads started inside block them as well.
    """
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, no status could be read
    blocked = (*FORWARDED, signal.SIGCHLD, signal.SIGALRM)
    former = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)
        signal.signal(signal.SIGCHLD, handler)


def _next_signal(deadline: float | None) -> tuple[int, int, bool]:
    """Wait for a signal, at most until ``deadline``.

    Returns:
        Its number, or 0; the process that sent it (for SIGCHLD the first that ended), or 0; and
        whether a terminal sent it to all processes in the foreground.
    """
    awaited = (*FORWARDED, signal.SIGCHLD)
    seconds = 60.0 if deadline is None else max(deadline - time.monotonic(), 0.0)
    if hasattr(signal, "sigtimedwait"):
        found = signal.sigtimedwait(awaited, seconds)
        return (found.si_signo, found.si_pid, found.si_code > 0) if found else (0, 0, False)
    # macOS: it does not tell who sent a signal.
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    number = signal.sigwait((*awaited, signal.SIGALRM))
    signal.setitimer(signal.ITIMER_REAL, 0)
    return number, 0, number == signal.SIGINT and _in_foreground()


def _in_foreground() -> bool:
    """Whether Ctrl-C goes to this process."""
    try:
        return os.tcgetpgrp(0) == os.getpgrp()
    except OSError:  # standard input is no terminal
        return False


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"


def _copy_lines(
    pipe: IO[bytes], target: int, prefix: bytes, terminal: SharedTerminal | None
) -> None:
    """Copy lines to a file descriptor, each with a prefix, until the pipe ends."""
    write = write_all if terminal is None else terminal.write
    with pipe:
        for line in pipe:
            try:
                write(target, prefix + line if line.endswith(b"\n") else prefix + line + b"\n")
            except OSError:
                return  # nobody reads: closing the pipe tells the process so
