"""Ports for processes that are about to listen."""

from __future__ import annotations

import random
import socket

from kbtrain.errors import DistributedError

# Below the ports that Linux and macOS give to outgoing connections: while the processes import
# their framework, none of those can take a port that was found to be free.
PORTS = range(16384, 32000)


def free_ports(count: int = 1) -> int:
    """The first of ``count`` consecutive ports that are free now, chosen at random.

    Args:
        count: The number of ports.

    Raises:
        DistributedError: There are none.
    """
    for base in random.SystemRandom().sample(PORTS, min(1000, len(PORTS))):
        try:
            for port in range(base, base + count):
                with socket.socket() as probe:
                    probe.bind(("", port))
        except OSError:
            continue
        return base
    raise DistributedError(
        f"Found no {count} consecutive free ports from {PORTS.start} to {PORTS.stop} on this "
        "machine. Are too many programs running?"
    )
