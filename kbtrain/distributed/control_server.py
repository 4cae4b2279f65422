"""The control channel's server, in threads of process 0."""

from __future__ import annotations

import hmac
import ipaddress
import selectors
import socket
import socketserver
import threading
import time
from collections.abc import Callable
from typing import Any
from xmlrpc.server import SimpleXMLRPCRequestHandler, SimpleXMLRPCServer

from kbtrain.distributed.members import HEARTBEAT, LOST, Failure, Members, Report
from kbtrain.utils.processes import ProcessGroup

TELLING = 1.5
"""Seconds that a failing process 0 waits for the others to hear the reason."""
WEIGHING = 1.5
"""Seconds in which the failure of another process may still explain a reported exception."""


def keep_alive(connection: socket.socket) -> None:
    """Let the system end a connection when the other host has not been reachable for ``LOST``."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = {
        "TCP_KEEPIDLE": 1,
        "TCP_KEEPALIVE": 1,  # the same on macOS
        "TCP_KEEPINTVL": 1,
        "TCP_KEEPCNT": int(LOST) - 1,
        "TCP_USER_TIMEOUT": int(LOST * 1000),  # for data that is not acknowledged
    }
    for name, value in options.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


class _Handler(SimpleXMLRPCRequestHandler):
    """One connection; a process keeps one for its heartbeats."""

    protocol_version = "HTTP/1.1"  # connections stay open
    timeout = 120
    server: _Server
    _rank: int | None = None
    _cut_off = False

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
            return not selector.select(
                0
            )  # it sends nothing meanwhile: there is only an end to read

    def is_rpc_path_valid(self) -> bool:
        return hmac.compare_digest(self.path.encode(), self.server.path.encode())

    def _dispatch(self, method: str, parameters: tuple[Any, ...]) -> dict[str, Any]:
        control = self.server.control
        report = Report.from_wire(parameters[0])
        if method in ("hello", "beat") and self._rank is None:
            self._rank = report.rank
            control.connected(report.rank)
        if method == "beat":
            return control.beat(report, self._open)
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
        token: What only they know.
    """

    def __init__(self, group: ProcessGroup, token: str) -> None:
        self._news = threading.Condition()
        self._members: Members | None = None
        listening = _listen(group)
        host = "127.0.0.1" if group.local_size == group.size else group.address
        port = listening.getsockname()[1]
        self._http = _Server(
            ("", 0), _Handler, logRequests=False, allow_none=False, bind_and_activate=False
        )
        self._http.socket.close()
        self._http.socket = listening
        self._http.server_address = listening.getsockname()[:2]
        self._http.path = f"/{token}"
        self._http.control = self
        host = f"[{host}]" if ":" in host else host
        self.url = f"http://{host}:{port}/{token}"
        self._thread = threading.Thread(
            target=self._http.serve_forever, name="kbtrain control server", daemon=True
        )

    def serve(self, members: Members) -> None:
        """Begin to answer."""
        self._members = members
        self._thread.start()

    def stop(self) -> None:
        """Stop answering; open connections end with the process."""
        if self._thread.is_alive():
            self._http.shutdown()
        self._http.server_close()

    def file_numbers(self) -> list[int]:
        """The numbers of the sockets that are open."""
        return [self._http.socket.fileno(), *list(self._http.numbers)]

    @property
    def members(self) -> Members:
        """The processes; call it with the lock held."""
        assert self._members is not None
        return self._members

    def connected(self, rank: int) -> None:
        """See ``Members.connected``."""
        with self._news:
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
                    return {}
            told, left = members.failure is not None, members[0].left is not None
            if (told, left) != (member.told, member.left_told):
                member.told, member.left_told = told, left
                self._news.notify_all()
            return {
                "host": members[0].report.to_wire(),
                "failure": vars(members.failure) if members.failure is not None else {},
            }

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


def _listen(group: ProcessGroup) -> socket.socket:
    """A listening socket at a free port, on the narrowest interface that all processes reach."""
    if group.local_size == group.size:
        return socket.create_server(("127.0.0.1", 0), backlog=1024)
    try:
        # A name may stand for another address here than elsewhere, such as that of the loopback.
        address = ipaddress.ip_address(group.address)
        family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
        return socket.create_server((str(address), 0), family=family, backlog=1024)
    except (ValueError, OSError):
        if socket.has_dualstack_ipv6():
            return socket.create_server(
                ("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024
            )
        return socket.create_server(("", 0), backlog=1024)
