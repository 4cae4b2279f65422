"""Ray Train: the place of this process among the workers that Ray has started.

Ray's trainers differ in what they prepare: ``TorchTrainer`` has joined the processes when the
training function begins, ``TensorflowTrainer`` sets ``TF_CONFIG``, and ``JaxTrainer`` joins them
only on GPUs and TPUs. So the workers ask Ray itself, and agree on a port through it. Then every
trainer suits every backend.
"""

from __future__ import annotations

import sys

from kbtrain.utils.machine.ports import free_ports
from kbtrain.utils.machine.processes import ProcessGroup


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
    own = [util.get_node_ip_address(), free_ports()] if rank == 0 else None
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
