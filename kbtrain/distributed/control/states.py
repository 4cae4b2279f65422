"""The states of the processes of a run, also of those on other machines, whose watchers tell."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time

from kbtrain.distributed.control import watcher
from kbtrain.distributed.control.addresses import listen_at
from kbtrain.distributed.control.members import LOST, UNANSWERED
from kbtrain.distributed.control.reports import Report, state_here

ANSWER = 1.5
"""Seconds for the answer of a watcher, and until it is asked again."""
UNHEARD = 4.0
"""Seconds without an answer after which a watcher counts as suspended: one may come late."""
STARTING = 10.0
"""Seconds for the start of a watcher."""


class Watcher:
    """The watcher of this process, started.

    Args:
        token: What a question consists of.
        address: That of this machine at which others ask; see ``listen_at``.

    Attributes:
        port: Where it answers; 0 if it could not be started. Then other machines cannot tell why
            this process is silent.
        pipe: The file number at whose end the watcher ends; -1 after ``close``.
    """

    def __init__(self, token: str, address: str) -> None:
        self.port, self.pipe = 0, -1
        # Without one the run goes on: the other processes are about to hear of the port.
        with (
            contextlib.suppress(OSError, TypeError, subprocess.SubprocessError),
            listen_at(address) as listening,
        ):
            reading, self.pipe = os.pipe()
            try:
                started = subprocess.Popen(
                    [sys.executable, "-I", "-S", watcher.__file__, str(listening.fileno())],
                    stdin=reading,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    pass_fds=[listening.fileno()],
                )
            finally:
                os.close(reading)
            os.write(self.pipe, token.encode())
            if started.wait(STARTING) == 0:  # the watcher is a child of that one
                self.port = listening.getsockname()[1]

    def close(self) -> None:
        """End the watcher."""
        if self.pipe >= 0:
            os.close(self.pipe)
        self.pipe = -1


class States:
    """What state the processes of a run are in.

    Args:
        token: What a question to a watcher consists of.
    """

    def __init__(self, token: str) -> None:
        self._token = token.encode()
        self._places: dict[int, tuple[str, int]] = {}
        self._answers: dict[int, tuple[float, str]] = {}
        self._asked: dict[int, float] = {}
        self._heard: dict[int, float] = {}

    def watched(self, rank: int, address: str, port: int) -> None:
        """Record where the watcher of a process answers; nowhere if the port is 0."""
        if port and address:
            self._places[rank] = address, port

    def __call__(self, report: Report) -> str:
        """The state of a process, at once.

        Returns:
            The letter of ``process_state``; ``UNANSWERED`` if its machine can be reached and its
            watcher does not answer; "?" if nothing is known yet.
        """
        state, now = state_here(report), time.monotonic()
        if state != "?" or report.rank not in self._places:
            return state
        if now - self._asked.get(report.rank, -ANSWER) > ANSWER:
            if now - self._asked.get(report.rank, -LOST) > LOST:
                self._heard[report.rank] = now  # the first question of this silence
            self._asked[report.rank] = now
            threading.Thread(target=self._ask, args=(report.rank,), daemon=True).start()
        when, answer = self._answers.get(report.rank, (now, "?"))
        return answer if now - when < LOST else "?"

    def _ask(self, rank: int) -> None:
        state = "?"
        with (
            contextlib.suppress(OSError),
            socket.create_connection(self._places[rank], ANSWER) as connection,
        ):
            state = self._answer(connection)
        now = time.monotonic()
        if state != UNANSWERED:
            self._heard[rank] = now
        elif now - self._heard[rank] < UNHEARD:
            return
        self._answers[rank] = now, state

    def _answer(self, connection: socket.socket) -> str:
        try:
            connection.sendall(self._token)
            return connection.recv(1).decode() or "?"
        except TimeoutError:
            return UNANSWERED
