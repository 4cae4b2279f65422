"""Messages between the processes over the control channel: ``Peers`` for any thread.

Process 0 keeps the messages until those they are for have them.
"""

from __future__ import annotations

import struct
import threading
import time
import xmlrpc.client
from collections.abc import Callable, Iterable
from contextlib import closing
from typing import Any

from kbtrain.distributed.control.client import PROBLEMS, RETRY, Connection
from kbtrain.distributed.control.peers import Peers
from kbtrain.errors import DistributedError

HOLD = 1.0
"""Seconds that a request for a message waits for it in process 0."""


class Mailbox:
    """The messages in process 0.

    Args:
        size: Number of processes.
        obstacle: Says why processes of given ranks will never send or ask, if so.
    """

    def __init__(self, size: int, obstacle: Callable[[Iterable[int]], str | None]) -> None:
        self._size = size
        self._obstacle = obstacle
        self._news = threading.Condition()
        self._sent: dict[str, dict[int, bytes]] = {}
        self._announced: dict[str, tuple[bytes, set[int]]] = {}

    def put(self, rank: int, key: str, data: bytes) -> None:
        """Take in a message to process 0; it may come twice."""
        with self._news:
            self._sent.setdefault(key, {})[rank] = data
            self._news.notify_all()

    def gathered(self, key: str) -> list[bytes]:
        """Wait for the messages of all processes.

        Raises:
            DistributedError: One of them will not come.
        """
        with self._news:
            while len(found := self._sent.get(key, {})) < self._size:
                if not self._news.wait(HOLD / 4):
                    obstacle = self._obstacle(set(range(self._size)) - set(found))
                    if obstacle is not None:
                        raise DistributedError(obstacle)
            del self._sent[key]
            return [found[rank] for rank in range(self._size)]

    def announce(self, key: str, data: bytes) -> None:
        """Keep a message of process 0 for all others."""
        with self._news:
            self._announced[key] = data, set(range(1, self._size))
            self._news.notify_all()

    def take(self, key: str) -> bytes | None:
        """The message of process 0, for which it waits a little; None if there is none yet."""
        with self._news:
            self._news.wait_for(lambda: key in self._announced, HOLD)
            return self._announced[key][0] if key in self._announced else None

    def received(self, rank: int, keys: Iterable[str]) -> None:
        """A process has the messages of process 0 with these keys."""
        with self._news:
            for key in keys:
                if key in self._announced:
                    waiting = self._announced[key][1]
                    waiting.discard(rank)
                    if not waiting:
                        del self._announced[key]


class ChannelPeers(Peers):
    """The processes of a run. Thread-safe: each call is a connection of its own."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size
        self._rounds = 0

    @property
    def rank(self) -> int:
        """Index of this process."""
        return self._rank

    @property
    def size(self) -> int:
        """Number of processes."""
        return self._size

    def exchange(self, data: bytes) -> list[bytes]:
        """The ``data`` of every process, in order of rank. All processes call it alike."""
        self._rounds += 1
        key = f"exchange {self._rounds}"
        parts = self.gather(key, data)
        packed = b"".join(struct.pack("!Q", len(part)) + part for part in parts)
        packed = self.announce(key, packed)
        found = []
        while packed:
            end = 8 + struct.unpack("!Q", packed[:8])[0]
            found.append(packed[8:end])
            packed = packed[end:]
        return found


class FirstProcess(ChannelPeers):
    """``ChannelPeers`` in process 0.

    Args:
        size: Number of processes.
        mailbox: The messages.
    """

    def __init__(self, size: int, mailbox: Mailbox) -> None:
        super().__init__(0, size)
        self._mailbox = mailbox

    def gather(self, key: str, data: bytes) -> list[bytes]:
        """See ``Peers.gather``."""
        self._mailbox.put(0, key, data)
        return self._mailbox.gathered(key)

    def announce(self, key: str, data: bytes = b"") -> bytes:
        """See ``Peers.announce``."""
        self._mailbox.announce(key, data)
        return data


class OtherProcess(ChannelPeers):
    """``ChannelPeers`` in a process other than 0.

    Args:
        rank: Index of this process.
        size: Number of processes.
        url: Where process 0 has its server.
        obstacle: Says why process 0 will never answer, if so.
    """

    def __init__(self, rank: int, size: int, url: str, obstacle: Callable[[], str | None]) -> None:
        super().__init__(rank, size)
        self._url = url
        self._obstacle = obstacle
        self._received: list[str] = []

    def gather(self, key: str, data: bytes) -> list[bytes]:
        """See ``Peers.gather``."""
        self._call("put", key, xmlrpc.client.Binary(data))
        return []

    def announce(self, key: str, data: bytes = b"") -> bytes:
        """See ``Peers.announce``."""
        while True:
            answer = self._call("take", key)
            if "data" in answer:
                self._received.append(key)
                return bytes(answer["data"].data)
            self._check()

    def _call(self, method: str, *arguments: Any) -> dict[str, Any]:
        """Call process 0 until it answers. If it has failed, the channel ends this process."""
        received = tuple(self._received)
        while True:
            try:
                with closing(Connection(self._url)) as connection:
                    answer = connection.call(method, self._rank, received, *arguments)
            except PROBLEMS:
                self._check()
                time.sleep(RETRY)
                continue
            self._received = [each for each in self._received if each not in received]
            return answer

    def _check(self) -> None:
        obstacle = self._obstacle()
        if obstacle is not None:
            raise DistributedError(obstacle)
