"""Several processes that train together: start, agreement, failure, placement.

``initialize`` joins the processes that a launcher started. ``from kbtrain import Trainer`` calls
it, as JAX and TensorFlow must know all processes before the first tensor.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from kbtrain.utils.machine import processes
from kbtrain.utils.machine.processes import ProcessGroup

if TYPE_CHECKING:
    from kbtrain.distributed.control.channel import Channel
    from kbtrain.distributed.control.mailbox import ChannelPeers

TIMEOUT = 1800.0
"""Seconds that a collective operation may take, as in Transformers."""

_JOINED = "KBTRAIN_JOINED_PID"

_channel: Channel | None = None
_peers: ChannelPeers | None = None


def initialize(launched_only: bool = False) -> ProcessGroup:
    """Join the processes that a launcher started, once. A program may be alone: a group of one.

    Args:
        launched_only: Whether to leave aside processes that the program itself has joined by its
            framework, which is then not imported.

    Returns:
        The processes, and the place of this one among them.

    Raises:
        ConfigurationError: The launcher's variables contradict each other, or tensors exist already
            and the backend does not allow that.
        DistributedError: A process cannot be reached, or the port is taken.
    """
    if processes.current() is not processes.ALONE or _is_child():
        return processes.current()
    from kbtrain.distributed import environment, ray

    group = ray.detect() or environment.detect(os.environ)
    if group is None and launched_only:
        return processes.ALONE
    from kbtrain import backends

    backend = backends.load()
    joined = backend.joined_processes()
    if joined is not None:
        group = _joined(*joined, group, backend.exchange)
    elif group is not None:
        backend.start_processes(group, TIMEOUT)
    if group is None:
        return processes.ALONE
    # Not above: a program that runs alone need not import XML-RPC.
    from kbtrain.distributed import host
    from kbtrain.distributed.agreement import agree
    from kbtrain.distributed.control.channel import Channel
    from kbtrain.distributed.control.ending import ExitHooks

    global _channel
    os.environ[_JOINED] = str(os.getpid())
    processes.set_current(group, lambda: host.barrier(backend))
    hooks = ExitHooks()  # before the first message, which may fail
    hooks.channel = _channel = Channel.start(group, backend.exchange, TIMEOUT)
    agree(group, backend.exchange, _versions(backend.name))
    return group


def _versions(backend: str) -> dict[str, str]:
    """What must be the same on all processes, whatever the program does."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    names = ("kbtrain", "keras", "numpy", backend)
    versions = {name: str(sys.modules[name].__version__) for name in names}
    return {"backend": backend, "python": python, **versions}


def get_peers() -> ChannelPeers | None:
    """Messages between the processes from any thread; None for a program that is alone."""
    global _peers
    if _peers is None and _channel is not None:
        _peers = _channel.peers()
    return _peers


def set_timeout(seconds: float) -> None:
    """Set how long processes wait for one that does not get on."""
    if _channel is not None:
        _channel.set_timeout(seconds)


def at(place: str) -> None:
    """Record what this process does now, for the message if one of several fails.

    Args:
        place: For example "update 17". All processes pass the same places in the same order.
    """
    if _channel is not None:
        _channel.at(place)


def place() -> str:
    """What this process does now; empty outside ``fit`` and ``evaluate``, or if it is alone."""
    return "" if _channel is None else _channel.place


def progress() -> tuple[int, int]:
    """How many places this process has come through: numbers that are the same on all processes."""
    return (0, 0) if _channel is None else _channel.progress


@contextlib.contextmanager
def working(place: str) -> Iterator[None]:
    """Context of a call that all processes make, such as ``fit``; see ``at``."""
    if _channel is None:
        yield
        return
    _channel.at(place)
    try:
        yield
    except BaseException as error:
        _channel.done(error)
        raise
    _channel.done()


def _is_child() -> bool:
    """Whether this is a worker of a process that has joined, which inherited its environment."""
    return os.environ.get(_JOINED, str(os.getpid())) != str(os.getpid())


def _joined(
    rank: int,
    size: int,
    found: ProcessGroup | None,
    exchange: Callable[[bytes], list[bytes]],
) -> ProcessGroup:
    """The group that another program has joined; the variables of a launcher may say more."""
    hosts = exchange(socket.gethostname().encode())
    if found is not None and (found.rank, found.size) == (rank, size):
        return found
    local, local_size = hosts[:rank].count(hosts[rank]), hosts.count(hosts[rank])
    return ProcessGroup(rank, size, local, local_size, launcher="this program")
