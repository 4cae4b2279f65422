"""The control channel's server, in threads of process 0."""

from __future__ import annotations

import hmac
import ipaddress
import selectors
import socketserver
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any
from xmlrpc.server import SimpleXMLRPCRequestHandler, SimpleXMLRPCServer

from kbtrain.distributed.control.addresses import listen
from kbtrain.distributed.control.client import keep_alive
from kbtrain.distributed.control.mailbox import Mailbox
from kbtrain.distributed.control.members import HEARTBEAT, LOST, Failure, Members
from kbtrain.distributed.control.reports import Report
from kbtrain.utils.machine.processes import ProcessGroup

TELLING = 1.5
"""Seconds that a failing process 0 waits for the others to hear the reason."""
WEIGHING = 1.5
"""Seconds in which the failure of another process may still explain a reported exception."""


class _Handler(SimpleXMLRPCRequestHandler):
    """One connection; a process keeps one for its heartbeats."""

    protocol_version = "HTTP/1.1"  # connections stay open
    timeout = 120
    server: _Server
    _rank: int | None = None
    _cut_off = False
    _news: tuple[bool, bool] | None = None

    def setup(self) -> None:
        super().setup()
        keep_alive(self.connection)
        self._number = self.connection.fileno()
        self.server.numbers.add(self._number)

    def finish(self) -> None:
        self.server.numbers.discard(self._number)
        super().finish()

    def handle(self) -> None:
        try:
            super().handle()
        except ConnectionError:
            pass  # the process has ended
        except OSError:
            self._cut_off = True
        finally:
            if self._rank is not None:
                self.server.control.disconnected(self._rank, self._cut_off)

    def _open(self) -> bool:
        """Whether the client, which waits for an answer, is still there."""
        with selectors.DefaultSelector() as selector:
            selector.register(self.connection, selectors.EVENT_READ)
            return not selector.select(0)  # it sends nothing meanwhile; an end can be read

    def handle_one_request(self) -> None:
        super().handle_one_request()
        if self._news is not None and self._rank is not None:  # it has been sent
            self.server.control.told(self._rank, *self._news)
            self._news = None

    def is_rpc_path_valid(self) -> bool:
        return hmac.compare_digest(self.path.encode(), self.server.path.encode())

    def report_404(self) -> None:
        super().report_404()
        self.close_connection = True  # what else it sent is not read

    def _dispatch(self, method: str, parameters: tuple[Any, ...]) -> dict[str, Any]:
        control = self.server.control
        if method in ("put", "take"):
            return control.deliver(method, *parameters)
        report = Report.from_wire(parameters[0])
        if method in ("hello", "beat") and self._rank is None:
            self._rank = report.rank
            control.connected(report.rank, str(self.client_address[0]))
        if method == "beat":
            answer = control.beat(report, self._open)
            self._news = bool(answer.get("failure")), bool(answer.get("left"))
            return answer
        if method == "fail":
            failure = control.fail(report, str(parameters[1]))
            return {"failure": vars(failure)}
        if method in ("hello", "update"):
            control.update(report)
            return {}
        raise ValueError(method)

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def log_error(self, format: str, *args: Any) -> None:
        # http.server catches a TimeoutError, which is also what keep-alive raises, and logs it.
        if args and isinstance(args[0], TimeoutError):
            self._cut_off = True


class _Server(socketserver.ThreadingMixIn, SimpleXMLRPCServer):
    daemon_threads = True
    block_on_close = False
    control: ControlServer
    path: str

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.numbers: set[int] = set()

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a connection that broke, or a stranger's


class ControlServer:
    """Takes in the heartbeats of all processes and tells each of the first failure.

    Args:
        group: The processes; this one has rank 0.
        members: Their first reports.
        token: Part of ``urls``, which keeps strangers out.
        local: Whether all of them see the loopback of this process.

    Attributes:
        members: What is known of them.
        mailbox: Messages between them.
        urls: Where the others may find it.
        addresses: Those of the machines from which the others have connected.
    """

    def __init__(self, group: ProcessGroup, members: Members, token: str, local: bool) -> None:
        self._news = threading.Condition()
        self.members = members
        self.addresses: dict[int, str] = {}
        self.mailbox = Mailbox(group.size, self._obstacle)
        listening, addresses = listen(group.address, local)
        port = listening.getsockname()[1]
        self.urls = [f"http://{address}:{port}/{token}" for address in addresses]
        self._http = _Server(
            ("", 0), _Handler, logRequests=False, allow_none=False, bind_and_activate=False
        )
        self._http.socket.close()
        self._http.socket = listening
        self._http.server_address = listening.getsockname()[:2]
        self._http.path = f"/{token}"
        self._http.control = self
        threading.Thread(
            target=self._http.serve_forever, name="kbtrain control server", daemon=True
        ).start()

    def close(self) -> None:
        """Stop answering; open connections end with the process."""
        self._http.shutdown()
        self._http.server_close()

    @property
    def listens_at(self) -> str:
        """The address of this machine at which it listens; empty for all of them."""
        address = str(self._http.server_address[0])
        return "" if ipaddress.ip_address(address).is_unspecified else address

    def file_numbers(self) -> list[int]:
        """The numbers of the sockets that are open."""
        return [self._http.socket.fileno(), *list(self._http.numbers)]

    def connected(self, rank: int, address: str) -> None:
        """See ``Members.connected``."""
        with self._news:
            self.addresses[rank] = address
            self.members.connected(rank)

    def disconnected(self, rank: int, cut_off: bool) -> None:
        """See ``Members.disconnected``."""
        with self._news:
            self.members.disconnected(rank, cut_off, time.monotonic())

    def update(self, report: Report) -> None:
        """Take in a report."""
        with self._news:
            self.members.update(report, time.monotonic())
            if report.left:
                self._news.notify_all()

    def check(self, own: Report) -> Failure | None:
        """Take in the report of process 0 itself and apply the rules."""
        now = time.monotonic()
        with self._news:
            self.members.update(own, now)
            failure = self.members.check(now)
            if failure is not None:
                self._news.notify_all()
            return failure

    def slow(self) -> Failure | None:
        """See ``Members.slow``."""
        with self._news:
            return self.members.slow(time.monotonic())

    def beat(self, report: Report, waits: Callable[[], bool]) -> dict[str, Any]:
        """Answer a heartbeat: at once where there is news, otherwise after ``HEARTBEAT``.

        Args:
            report: That of the process.
            waits: Whether it still waits for the answer.
        """
        self.update(report)
        with self._news:
            members = self.members
            member = members[report.rank]
            for _ in range(4):
                left = members[0].left is not None
                if members.failure is not None or left != member.left_told:
                    break
                self._news.wait(HEARTBEAT / 4)
                if not waits():
                    break
            shows, member.shows = member.shows, False
            return {
                "shows": shows,
                "host": members[0].report.to_wire(),
                "left": members[0].left is not None,
                "failure": vars(members.failure) if members.failure is not None else {},
            }

    def told(self, rank: int, failure: bool, left: bool) -> None:
        """A process has been told whether there is a failure, and whether process 0 has left."""
        with self._news:
            member = self.members[rank]
            if (failure, left) != (member.told, member.left_told):
                member.told, member.left_told = failure, left
                self._news.notify_all()

    def fail(self, report: Report, cause: str) -> Failure:
        """Take in an exception of a process; the result is the failure that came first.

        It waits a little: if the process only noticed that another one is gone, that is the cause.
        """
        began = time.monotonic()
        self.update(report)
        with self._news:
            members = self.members
            members[report.rank].failing = True
            while (now := time.monotonic()) - began < WEIGHING or (
                members.may_be_lost(report.rank, now) and now - began < LOST + HEARTBEAT
            ):
                if members.blame_other(report.rank, now):
                    break
                self._news.wait(0.1)
            members.fail(report.rank, cause)
            self._news.notify_all()
            assert members.failure is not None
            return members.failure

    def deliver(
        self, method: str, rank: int, received: list[str], key: str, data: Any = None
    ) -> dict[str, Any]:
        """Take in a message to process 0 ("put"), or hand out one of it ("take")."""
        self.mailbox.received(rank, received)
        if method == "put":
            self.mailbox.put(rank, key, data.data)
            return {}
        found = self.mailbox.take(key)
        return {} if found is None else {"data": found}

    def _obstacle(self, ranks: Iterable[int]) -> str | None:
        """Why no message will come from these processes, if so."""
        with self._news:
            if self.members.failure is not None:
                return self.members.failure.text
            for rank in ranks:
                if self.members[rank].left is not None:
                    name = self.members[rank].report.name
                    return f"{name} has ended its program, and this process waits for it."
        return None

    def wait_until_told(self, of_failure: bool = True) -> None:
        """Wait until the processes that listen know of the failure, or that process 0 has left."""
        with self._news:
            self._news.notify_all()
            self._news.wait_for(
                lambda: all(
                    member.told if of_failure else member.left_told
                    for member in self.members.others(0)
                    if member.connections
                ),
                TELLING,
            )
