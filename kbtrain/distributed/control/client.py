"""The control channel's connections to process 0."""

from __future__ import annotations

import http.client
import socket
import time
import xmlrpc.client
from typing import Any
from xml.parsers.expat import ExpatError

from kbtrain.distributed.control.members import LOST

ATTEMPT = 2.5
"""Seconds for a connection or an answer, which the server gives within ``HEARTBEAT``."""
RETRY = 0.3
"""Seconds between two attempts to reach process 0."""

PROBLEMS = (OSError, http.client.HTTPException, xmlrpc.client.Error, ExpatError)
"""What a call raises if it did not reach the server."""


class Connection:
    """A client of the server, whose connection stays open between calls; not thread-safe."""

    def __init__(self, url: str) -> None:
        self._transport = _Transport()
        self._proxy = xmlrpc.client.ServerProxy(url, transport=self._transport)

    @property
    def opened(self) -> float:
        """When the connection was last made; 0 if never."""
        return self._transport.opened

    @property
    def fileno(self) -> int:
        """The number of its open file; -1 if there is none."""
        return self._transport.fileno

    @property
    def own_address(self) -> str:
        """The address of this machine that the connection was last made from; empty if never."""
        return self._transport.own_address

    def call(self, method: str, *arguments: Any) -> dict[str, Any]:
        """Call a method of ``ControlServer``."""
        answer = getattr(self._proxy, method)(*arguments)
        if not isinstance(answer, dict):
            raise xmlrpc.client.ResponseError
        return answer

    def close(self) -> None:
        """Close the connection; the next call makes a new one."""
        self._transport.close()


class _Transport(xmlrpc.client.Transport):
    """XML-RPC's transport with time limits."""

    def __init__(self) -> None:
        super().__init__()
        self.opened = 0.0
        self.fileno = -1
        self.own_address = ""

    def send_request(
        self, host: Any, handler: str, request_body: Any, debug: bool
    ) -> http.client.HTTPConnection:
        connection = self.make_connection(host)
        fresh = connection.sock is None
        if fresh:
            connection.timeout = ATTEMPT
            connection.connect()
            keep_alive(connection.sock)
            self.opened, self.fileno = time.monotonic(), connection.sock.fileno()
            self.own_address = str(connection.sock.getsockname()[0])
        return super().send_request(host, handler, request_body, debug)

    def close(self) -> None:
        self.fileno = -1
        super().close()


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
