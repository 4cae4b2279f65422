"""A control channel between the processes of a run, beside the collective operations.

If one process fails, the others wait for it inside a collective operation, where no Python code
runs any more: some frameworks for half an hour, and none says why. So a thread in each process
tells process 0 once a second what its process does, and learns from the answer whether another one
has failed. It then prints which one, where and why, and ends its process.

    hooks = ExitHooks()
    hooks.channel = channel = Channel.start(group, backend.exchange, timeout=1800)
    channel.at("update 17")

Messages are XML-RPC, plain numbers and text. A random token in the URL keeps strangers out.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import socket
import threading
import time
import urllib.parse
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from kbtrain.distributed.control.client import ATTEMPT, PROBLEMS, RETRY, Connection
from kbtrain.distributed.control.ending import end_process, main_stack
from kbtrain.distributed.control.mailbox import ChannelPeers, FirstProcess, OtherProcess
from kbtrain.distributed.control.members import (
    ENDED,
    HEARTBEAT,
    LOST,
    STALLED,
    Failure,
    Members,
)
from kbtrain.distributed.control.reports import Report, machine, needs, network
from kbtrain.distributed.control.server import ControlServer
from kbtrain.distributed.control.states import States, Watcher
from kbtrain.errors import DistributedError, first_lines
from kbtrain.utils.machine.processes import ProcessGroup

logger = logging.getLogger("kbtrain")

GREETING = 6.0
"""Seconds for the first answer of process 0."""
PRINTING = 3.0
"""Seconds that the main thread has to print its own exception when another process has failed."""


class Channel:
    """This process's end of the control channel; see ``start``."""

    def __init__(
        self,
        report: Report,
        size: int,
        url: str,
        host: Report,
        server: ControlServer | None,
        timeout: float,
        states: States,
    ) -> None:
        self._states = states
        self._report = report
        self._size = size
        self._url = url
        self._host = host
        self._server = server
        self._timeout = timeout
        self._closed = threading.Event()
        self._failing: float | None = None
        self._staying: threading.Thread | None = None
        self._connection = Connection(url)
        self._watcher: Watcher | None = None
        self._thread = threading.Thread(
            target=self._beat if server is None else self._watch,
            name="kbtrain control",
            daemon=True,
        )
        _after_fork(self)

    @classmethod
    def start(
        cls, group: ProcessGroup, exchange: Callable[[bytes], list[bytes]], timeout: float
    ) -> Channel:
        """Connect the processes of ``group``. All of them call it.

        Args:
            group: The processes, at least 2.
            exchange: Gives the messages of all processes in order of rank; all call it alike.
            timeout: Seconds that processes may wait for one that stays at the same place.

        Raises:
            DistributedError: A process cannot reach process 0; it is raised in all processes.
        """
        report = Report(group.rank, socket.gethostname(), os.getpid(), machine())

        def gather(message: Any) -> list[Any]:
            return [json.loads(data) for data in exchange(json.dumps(message).encode())]

        messages = gather({"report": report.to_wire(), "network": network()})
        reports = [Report.from_wire(message["report"]) for message in messages]
        token = gather(secrets.token_urlsafe(24))[0]
        states = States(token)
        server = None
        if group.rank == 0:
            members = Members(reports, timeout, time.monotonic(), states)
            local = len({message["network"] for message in messages}) == 1
            server = ControlServer(group, members, token, local)
        urls = gather(server.urls if server is not None else [])[0]
        channel = cls(report, group.size, urls[0], reports[0], server, timeout, states)
        problem = channel._greet(urls) if server is None else ""
        asked_by = reports if group.rank == 0 else reports[:1]
        if report.machine and any(each.machine != report.machine for each in asked_by):
            channel._watcher = Watcher(token, channel._own_address())
        watcher = 0 if channel._watcher is None else channel._watcher.port
        answers = gather({"problem": problem, "watcher": watcher})
        problems = [answer["problem"] for answer in answers]
        if any(problems):
            channel.close()
            raise DistributedError(
                f"{' '.join(filter(None, problems))[:2000]} The processes of a run connect to "
                "ports of each other: see to the address that the launcher gives, and to firewalls."
            )
        for rank, answer in enumerate(answers):
            channel._watched(rank, answer["watcher"])
        channel._thread.start()
        return channel

    def _watched(self, rank: int, port: int) -> None:
        """The watcher of a process answers at the address over which the channel reaches it."""
        if self._server is not None:
            self._states.watched(rank, self._server.addresses.get(rank, ""), port)
        elif rank == 0:
            self._states.watched(rank, urllib.parse.urlsplit(self._url).hostname or "", port)

    def _own_address(self) -> str:
        """The address of this machine over which the channel runs; empty if it may be any."""
        if self._server is not None:
            return self._server.listens_at
        return self._connection.own_address

    def at(self, place: str) -> None:
        """Record what this process does now. It costs next to nothing and sends nothing.

        All processes pass through the same places in the same order: who has fallen behind is
        known from their number.

        Args:
            place: For example "update 17", "batch 3 of an evaluation", "saving checkpoint-20".
        """
        self._report = self._report.at(place)

    @property
    def place(self) -> str:
        """What this process does now; empty outside ``fit``, ``evaluate`` and so on."""
        return self._report.place

    @property
    def progress(self) -> tuple[int, int]:
        """How many places this process has come through, which is the same on all processes."""
        return self._report.progress

    def done(self, error: BaseException | None = None) -> None:
        """Record that this process is outside ``fit``, ``evaluate`` and so on.

        Args:
            error: The exception that ended it, if any, which the user's program may catch.
        """
        self._report = self._report.done("" if error is None else _cause(error))

    def set_timeout(self, seconds: float) -> None:
        """Change the ``timeout`` of ``start``; what process 0 says counts."""
        self._timeout = seconds
        if self._server is not None:
            self._server.members.timeout = seconds

    def fail(self, error: BaseException) -> str | None:
        """Tell the other processes that this one fails; they end at once.

        Returns:
            The failure of another process that came first and may explain ``error``, as text.
        """
        report = self._report
        if report.pid != os.getpid():
            return None  # a child process
        self.failing()
        if self._server is not None:
            failure = self._server.fail(report, _cause(error))
            self._server.wait_until_told()
        else:
            try:
                with contextlib.closing(Connection(self._url)) as connection:
                    answer = connection.call("fail", report.to_wire(), _cause(error))
                failure = Failure(**answer["failure"])
            except PROBLEMS as problem:
                if self._host.left:
                    if not needs(report, self._host, failing=True):
                        return None
                    failure = Members.ended(self._host, report)
                elif isinstance(problem, TimeoutError):
                    return None
                else:
                    failure = Members.gone(self._host)
        return None if failure.rank == report.rank else self._text(failure)

    def failing(self) -> None:
        """Record that the main thread reports an exception itself and ends this process."""
        if self._failing is None:
            self._failing = time.monotonic()

    def leave(self) -> None:
        """Tell the other processes that the program of this one ends.

        The channel works on until the process has ended: a framework's functions at exit may wait
        for the others.
        """
        if self._report.pid != os.getpid():
            return  # a child process
        self._report = replace(self._report, left=True)
        if self._server is not None:
            self._server.update(self._report)
            self._server.wait_until_told(of_failure=False)
        else:
            connection = contextlib.closing(Connection(self._url))
            with contextlib.suppress(*PROBLEMS), connection as server:  # the thread tries, too
                server.call("update", self._report.to_wire())

    def peers(self) -> ChannelPeers:
        """Messages between the processes from any thread, beside the collective operations."""
        if self._server is not None:
            return FirstProcess(self._size, self._server.mailbox)
        return OtherProcess(self._report.rank, self._size, self._url, self._obstacle)

    def _obstacle(self) -> str | None:
        if self._host.left or self._closed.is_set():
            return f"{self._host.name} has ended its program, and this process waits for it."
        return None

    def close(self) -> None:
        """Stop the threads and close the connections of this process."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join(2 * ATTEMPT)
        self._connection.close()
        if self._watcher is not None:
            self._watcher.close()
        if self._server is not None:
            self._server.close()

    def file_numbers(self) -> list[int]:
        """The numbers of the open files that belong to this channel."""
        numbers = [self._connection.fileno]
        if self._watcher is not None:
            numbers.append(self._watcher.pipe)
        if self._server is not None:
            numbers += self._server.file_numbers()
        return [number for number in numbers if number >= 0]

    # --- the thread of process 0 ----------------------------------------------------------------

    def _watch(self) -> None:
        assert self._server is not None
        while not self._closed.wait(0.25):
            failure = self._server.check(self._report)
            if failure is not None:
                self._server.wait_until_told()
                self._end(failure)
            if (slow := self._server.slow()) is not None:
                logger.warning("%s", slow.text)
                if slow.rank == self._report.rank:
                    self._show()

    # --- the thread of the others ---------------------------------------------------------------

    def _greet(self, urls: list[str]) -> str:
        """Reach process 0 for the first time; the result says why that failed, if it did."""
        end = time.monotonic() + GREETING
        while True:
            problems, again = [], False
            for url in urls:
                self._url, self._connection = url, Connection(url)
                try:
                    self._connection.call("hello", self._report.to_wire())
                    return ""
                except PROBLEMS as error:
                    # Not the whole URL: it has the token.
                    problems.append(f"{urllib.parse.urlsplit(url).netloc} ({error})")
                    again = again or isinstance(error, TimeoutError)  # its host may be busy
            if not again or time.monotonic() > end:
                return (
                    f"{self._report.name} cannot reach {self._host.name} at {', '.join(problems)}."
                )

    def _beat(self) -> None:
        answered = reached = time.monotonic()
        refused = attempts = 0
        while not self._closed.is_set():
            started = time.monotonic()
            try:
                answer = self._connection.call("beat", self._report.to_wire())
            except PROBLEMS as error:
                self._connection.close()
                now = time.monotonic()
                if now - started > 2 * ATTEMPT + 1:  # this process itself stood still
                    answered = reached = now
                attempts += 1
                if self._connection.opened > started:
                    reached, attempts = now, 0
                refused = refused + 1 if isinstance(error, ConnectionRefusedError) else 0
                if self._host.left:
                    return None  # it has ended, which ``_stay`` knows
                # The first time-out is that of an open connection, which says nothing of the host.
                unreachable = now - reached if attempts > 1 else 0.0
                failure = self._lost(now - answered, unreachable, refused)
                if failure is not None:
                    return self._end(failure)
                self._closed.wait(RETRY)
                continue
            answered = reached = time.monotonic()
            refused = attempts = 0
            self._host = Report.from_wire(answer["host"])
            if answer["shows"]:
                self._show()
            if answer["failure"]:
                return self._end(Failure(**answer["failure"]))
            if self._host.left and self._staying is None:
                # Process 0 may take long to end, and its threads may not run any more.
                self._staying = threading.Thread(target=self._stay, daemon=True)
                self._staying.start()

    def _lost(self, silent: float, unreachable: float, refused: int) -> Failure | None:
        """Why process 0 does not answer, once that is clear."""
        state = self._states(self._host)
        if refused >= 3:
            return Members.gone(self._host)
        if state in ENDED:  # one that is cut off notices it as soon as this process, and ends
            lost = unreachable > LOST - HEARTBEAT
            return Members.cut_off(self._host) if lost else Members.gone(self._host)
        if (failure := Members.standing(self._host, state, silent)) is not None:
            return failure
        if unreachable > LOST:
            return Members.cut_off(self._host)
        return Members.stalled(self._host) if silent > STALLED else None

    def _stay(self) -> None:
        """Process 0 has ended normally: see that this process does not wait for it."""
        now = time.monotonic()
        members = Members([self._host, self._report], self._timeout, now)
        members.update(self._host, now)
        members.connected(self._report.rank)
        while not self._closed.wait(0.25):
            members.update(self._report, time.monotonic())
            failure = members.check(time.monotonic())
            if failure is not None:
                self._end(failure)

    def _show(self) -> None:
        """Print what this process does, which others wait for."""
        report = self._report
        logger.warning(
            "Others wait for %s, which is %s. Its main thread:\n%s",
            report.name,
            report.where,
            main_stack().rstrip(),
        )

    def _end(self, failure: Failure) -> None:
        if self._failing is not None:
            time.sleep(max(0.0, self._failing + PRINTING - time.monotonic()))
        end_process(self._text(failure))

    def _text(self, failure: Failure) -> str:
        report = self._report
        if failure.rank == report.rank:
            stack = f"Its main thread:\n{main_stack()}" if self._failing is None else ""
            return f"kbtrain: {failure.text} This process ends. {stack}".rstrip()
        return (
            f"kbtrain: {failure.text}\nkbtrain: process {report.rank} (host {report.host}, pid "
            f"{report.pid}), {report.where}, cannot go on without it and ends."
        )


def _cause(error: BaseException) -> str:
    """The type and the first lines of an exception, as text that XML can carry."""
    text = f"{type(error).__name__}: {first_lines(error)}".removesuffix(": ")[:2000]
    return "".join(c if c.isprintable() else "?" for c in text)


def _after_fork(channel: Channel) -> None:
    """Let go of the connections in child processes, or they stay open after this process ends."""
    if not hasattr(os, "register_at_fork"):
        return
    reference = weakref.ref(channel)

    def let_go() -> None:
        if (parent := reference()) is not None:
            null = os.open(os.devnull, os.O_RDWR)
            for number in parent.file_numbers():
                os.dup2(null, number)  # not close: the objects of the sockets live on
            os.close(null)

    os.register_at_fork(after_in_child=let_go)
