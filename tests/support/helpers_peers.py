"""Several processes that save together, as threads or forks of one process, with sockets between.

Nothing here needs a framework: state is NumPy arrays, cut into blocks by ``cut``.
"""

import itertools
import socket
import struct
import threading

import numpy as np

from kbtrain.errors import DistributedError
from kbtrain.utils.array_blocks import Block, OwnedBlocks

LONG = 60  # seconds


class SocketPeers:
    """``kbtrain.distributed.control.peers.Peers``; both ends must come to the same key."""

    def __init__(self, rank, size, sockets):
        self.rank, self.size, self.sockets = rank, size, sockets

    def gather(self, key, data):
        if self.rank:
            self._send(self.sockets[0], key, data)
            return []
        return [data, *(self._receive(one, key) for one in self.sockets)]

    def announce(self, key, data=b""):
        if self.rank:
            return self._receive(self.sockets[0], key)
        for one in self.sockets:
            self._send(one, key, data)
        return data

    def close(self):
        for one in self.sockets:
            one.close()

    def _send(self, to, key, data):
        try:
            to.sendall(struct.pack("!II", len(key), len(data)) + key.encode() + data)
        except OSError as error:
            raise DistributedError(f"a process has failed ({error})") from error

    def _receive(self, source, key):
        sizes = struct.unpack("!II", self._read(source, 8))
        found, data = (self._read(source, size) for size in sizes)
        assert found.decode() == key
        return data

    def _read(self, source, size):
        data = b""
        while len(data) < size:
            try:
                part = source.recv(size - len(data))
            except OSError as error:
                raise DistributedError(f"a process has failed ({error})") from error
            if not part:
                raise DistributedError("a process has failed")
            data += part
        return data


def connected(size):
    """One end for each of several processes."""
    pairs = [socket.socketpair() for _ in range(size - 1)]
    for end in itertools.chain(*pairs):
        end.settimeout(LONG)
    others = [SocketPeers(rank, size, [end]) for rank, (_, end) in enumerate(pairs, 1)]
    return [SocketPeers(0, size, [end for end, _ in pairs]), *others]


def together(size, function):
    """Call ``function(peers)`` in a thread for each process.

    Returns:
        Their results, or the errors that they raised, in order of rank.
    """
    results = [None] * size
    everyone = connected(size)

    def call(peers):
        try:
            results[peers.rank] = function(peers)
        except Exception as error:
            results[peers.rank] = error
        finally:
            peers.close()

    threads = [threading.Thread(target=call, args=[peers]) for peers in everyone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
        assert not thread.is_alive()
    return results


def cut(array, grid, rank, size):
    """The blocks of an array, cut into a grid, that fall to a process in turn.

    Args:
        array: The array.
        grid: Number of pieces along each axis.
        rank: Index of the process.
        size: Number of processes.
    """
    borders = [
        np.linspace(0, n, pieces + 1).astype(int)
        for n, pieces in zip(array.shape, grid, strict=True)
    ]
    cells = itertools.product(*(itertools.pairwise(edges.tolist()) for edges in borders))
    blocks = [
        Block(
            tuple(first for first, _ in cell),
            np.array(array[tuple(slice(first, last) for first, last in cell)]),
        )
        for number, cell in enumerate(cells)
        if number % size == rank
    ]
    return OwnedBlocks(array.shape, array.dtype, blocks)
