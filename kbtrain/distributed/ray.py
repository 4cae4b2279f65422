"""Ray Train: the place of this process among the workers that Ray has started.

Ray's trainers differ in what they prepare: ``TorchTrainer`` has joined the processes when the
training function begins, ``TensorflowTrainer`` sets ``TF_CONFIG``, and ``JaxTrainer`` joins them
only on GPUs and TPUs. So the workers ask Ray itself, and agree on a port through it. Then every
trainer suits every backend.
"""

from __future__ import annotations

import random
import socket
import sys

from kbtrain.errors import DistributedError
from kbtrain.utils.processes import ProcessGroup

# Below the ports that Linux gives to outgoing connections, which could take one before it is used.
_PORTS = range(16384, 32000)


def detect() -> ProcessGroup | None:
    """Ask Ray Train for the workers of this training function; all of them do this together.

    Returns:
        The group; None outside of a training function, or if there is one worker.

    Raises:
        DistributedError: The machine of worker 0 has no free port.
    """
    if "ray.train" not in sys.modules:
        return None
    from ray import train, util

    try:
        from ray.train.collective import broadcast_from_rank_zero

        context = train.get_context()
        size = context.get_world_size()
    # An older Ray, whose workers have variables in their environment; not in a training function;
    # the same, in a function of Ray Tune.
    except (ImportError, RuntimeError, DeprecationWarning):
        return None
    if size == 1:
        return None
    rank = context.get_world_rank()
    own = [util.get_node_ip_address(), _free_port()] if rank == 0 else None
    address, port = broadcast_from_rank_zero(own)
    return ProcessGroup(
        rank,
        size,
        context.get_local_rank(),
        context.get_local_world_size(),
        address,
        port,
        launcher="Ray Train",
    )


def _free_port() -> int:
    for port in random.SystemRandom().sample(_PORTS, 100):
        try:
            with socket.socket() as probe:
                probe.bind(("", port))
        except OSError:
            continue
        return port
    raise DistributedError(
        f"Found no free port from {_PORTS.start} to {_PORTS.stop} on the machine of worker 0 of "
        "Ray Train. Are too many programs running?"
    )
