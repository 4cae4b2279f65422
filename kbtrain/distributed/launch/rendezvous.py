"""Where the launchers of several machines meet before they start their processes.

The launcher of machine 0 listens; the others report to it and learn who else takes part. It is
XML-RPC of the standard library: a few short messages before each start, none while training.
"""

from __future__ import annotations

import http.client
import signal
import socket
import sys
import threading
import time
import uuid
import xmlrpc.client
import xmlrpc.server
from dataclasses import asdict, dataclass
from socketserver import ThreadingMixIn
from typing import Any

from kbtrain.distributed.environment import endpoint
from kbtrain.errors import ConfigurationError, DistributedError

FIRST_SECONDS, RESTART_SECONDS = 600.0, 60.0
"""How long to wait for other machines: to come up, and to start their processes again."""

POLL_SECONDS = 0.2
NOTICE_SECONDS = 10.0


@dataclass(frozen=True)
class Node:
    """A machine that takes part.

    Attributes:
        host: Its name or address, for the others.
        processes: Number of processes on it.
    """

    host: str
    processes: int


@dataclass(frozen=True)
class _Report:
    """What the launcher of one machine says about it."""

    attempt: int
    rank: int
    nodes: int
    host: str
    processes: int
    max_restarts: int
    token: str


class Rendezvous:
    """The meeting point of the launchers, as one of them sees it.

    Args:
        host: The name or address of machine 0.
        port: A free port there.
        rank: Index of this machine.
        nodes: Number of machines.

    Raises:
        ConfigurationError: This is machine 0 and cannot listen at the port.
    """

    def __init__(self, host: str, port: int, rank: int, nodes: int) -> None:
        self._host, self._port, self._rank, self._nodes = host, port, rank, nodes
        self._token = uuid.uuid4().hex
        self._server = _Server(host, port, nodes) if rank == 0 else None

    def meet(self, attempt: int, processes: int, max_restarts: int) -> list[Node]:
        """Wait until all machines are ready to start their processes.

        Args:
            attempt: How often the processes have been started before.
            processes: Number of processes on this machine.
            max_restarts: How often they may be started again; the same on all machines.

        Returns:
            The machines, in order.

        Raises:
            ConfigurationError: The launchers were started with arguments that do not fit.
            DistributedError: A machine did not come in time.
        """
        start = time.monotonic()
        limit = RESTART_SECONDS if attempt else FIRST_SECONDS
        noticed, problem = False, ""
        while True:
            try:
                reply = self._report(attempt, processes, max_restarts)
                problem = reply.get("waiting", "")
            except (OSError, http.client.HTTPException) as error:
                problem = f"{self._host}:{self._port} cannot be reached: {error}"
                reply = {}
            if reply.get("error"):
                raise ConfigurationError(reply["error"])
            if reply.get("nodes"):
                return [Node(str(host), int(count)) for host, count in reply["nodes"]]
            waited = time.monotonic() - start
            if waited > limit:
                raise DistributedError(
                    f"Not all of the {self._nodes} machines were ready within {limit:.0f} s: "
                    f"{problem}. Start `kbtrain launch` on each, with its own --node-rank and the "
                    "same --nodes and --address."
                )
            if waited > NOTICE_SECONDS and not noticed:
                noticed = True
                print(f"kbtrain launch: still waiting: {problem}.", file=sys.stderr, flush=True)
            time.sleep(POLL_SECONDS)

    def _report(self, attempt: int, processes: int, max_restarts: int) -> dict[str, Any]:
        """Tell machine 0 about this one, and hear about all."""
        host = self._host if self._server is not None else self._own_host()
        own = _Report(attempt, self._rank, self._nodes, host, processes, max_restarts, self._token)
        if self._server is not None:
            return dict(self._server.report(asdict(own)))
        address = f"http://{endpoint(self._host, self._port)}"
        with xmlrpc.client.ServerProxy(address, transport=_Transport()) as server:
            reply: Any = server.report(asdict(own))
        return dict(reply)

    def _own_host(self) -> str:
        """The address of this machine in the network that leads to machine 0."""
        with socket.create_connection((self._host, self._port), timeout=NOTICE_SECONDS) as probe:
            return str(probe.getsockname()[0])

    def close(self) -> None:
        """Stop listening."""
        if self._server is not None:
            self._server.close(self._token)


class _Transport(xmlrpc.client.Transport):
    """HTTP with a time limit."""

    def make_connection(self, host: Any) -> http.client.HTTPConnection:
        connection = super().make_connection(host)
        connection.timeout = NOTICE_SECONDS
        return connection


class _Listener(ThreadingMixIn, xmlrpc.server.SimpleXMLRPCServer):
    """A server that a silent client cannot hold up."""

    daemon_threads = True


class _ListenerV6(_Listener):
    address_family = socket.AF_INET6


class _Server:
    """What the launchers have reported to machine 0."""

    def __init__(self, host: str, port: int, nodes: int) -> None:
        self._nodes = nodes
        self._changed = threading.Condition()
        self._waiting: set[str] = set()  # tokens of launchers that will ask again
        self._reports: dict[tuple[int, int], _Report] = {}  # by attempt and rank
        self._error = ""
        kind = _ListenerV6 if ":" in host else _Listener
        try:
            self._listener = kind(("", port), logRequests=False)
        except OSError as error:
            raise ConfigurationError(
                f"Cannot listen at port {port} of this machine, which --address names: {error}. "
                "Another program may use it: choose a free one, the same on all machines."
            ) from error
        self._listener.register_function(self.report, "report")
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        # A signal must not be handled by this thread: the main one may have blocked it.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        self._listener.serve_forever()

    def report(self, message: Any) -> Any:
        """Note a machine; reply with all machines, an error, or what is being waited for.

        Args:
            message: A ``_Report`` as a dict.
        """
        new = _Report(**message)
        with self._changed:
            reply = self._reply(new, self._reports.setdefault((new.attempt, new.rank), new))
            if "waiting" in reply:
                self._waiting.add(new.token)
            else:
                self._waiting.discard(new.token)
                self._changed.notify_all()
            return reply

    def _reply(self, new: _Report, known: _Report) -> dict[str, Any]:
        self._error = self._error or self._conflict(new, known)
        if self._error:
            return {"error": self._error}
        missing = [r for r in range(self._nodes) if (new.attempt, r) not in self._reports]
        if missing:
            names = ", ".join(map(str, missing))
            return {"waiting": f"machine {names} (its --node-rank) has not reported"}
        found = [self._reports[new.attempt, rank] for rank in range(self._nodes)]
        return {"nodes": [[each.host, each.processes] for each in found]}

    def _conflict(self, new: _Report, known: _Report) -> str:
        """What the launchers disagree about, or an empty string."""
        zero = self._reports.get((new.attempt, 0), new)
        for option, own, other in (
            ("--nodes", new.nodes, self._nodes),
            ("--max-restarts", new.max_restarts, zero.max_restarts),
        ):
            if own != other:
                return (
                    f"{option} must be the same on all machines. Received: {other} on machine 0, "
                    f"{own} on machine {new.rank}"
                )
        if known.token != new.token:
            return (
                f"Two machines, {known.host} and {new.host}, were both started with --node-rank "
                f"{new.rank}. Each must have its own, from 0 to {self._nodes - 1}."
            )
        return ""

    def close(self, own: str) -> None:
        """Stop listening, once the others that have reported know the result."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting - {own}, timeout=POLL_SECONDS * 10)
        self._listener.shutdown()
        self._listener.server_close()
