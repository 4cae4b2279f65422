"""PyTorch: several processes, through ``torch.distributed``.

Inside a step the functional collectives are used, which can be recorded. Gradients travel in
buckets: each is one flat tensor, whose reduction starts as soon as it is complete.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import torch
import torch.distributed as dist

from kbtrain.backends import rows
from kbtrain.backends.rows import LocalRows
from kbtrain.backends.whole_batch import whole_batch
from kbtrain.errors import DistributedError, first_lines
from kbtrain.utils.processes import ProcessGroup

BUCKET_BYTES = 25 << 20
"""Size at which a bucket of gradients is sent."""


def joined_processes() -> tuple[int, int] | None:
    """``(rank, size)`` if the framework's processes have been joined by another program."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    return dist.get_rank(), dist.get_world_size()


def start_processes(group: ProcessGroup, timeout: float) -> None:
    """Join the processes of ``group``: NCCL between GPUs, Gloo between CPUs and for the host."""
    if torch.cuda.is_available():
        torch.cuda.set_device(group.local_rank % torch.cuda.device_count())
    devices = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    # torchrun has opened a store at its own port, which the variables of the environment name.
    method = "env://" if group.launcher == "torchrun" else f"tcp://{group.address}:{group.port}"
    try:
        dist.init_process_group(
            devices,
            init_method=method,
            rank=group.rank,
            world_size=group.size,
            timeout=datetime.timedelta(seconds=timeout),
        )
    except (RuntimeError, ValueError) as error:
        raise DistributedError(
            f"Process {group.rank} of {group.size} could not join the others at {group.address}:"
            f"{group.port} ({group.launcher}): {first_lines(error, 1)}. Check that process 0 runs "
            "on that host, that the port is free there, and that every process was started."
        ) from error


def stop_processes() -> None:
    """Leave the processes; do nothing if none were joined."""
    if joined_processes() is not None:
        dist.destroy_process_group()


def exchange(data: bytes) -> list[bytes]:
    """The ``data`` of every process, in order of rank."""
    if shards() == 1:
        return [data]
    group = _host_group()
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(shards())]
    dist.all_gather(sizes, torch.tensor([len(data)]), group)
    longest = max(1, *(int(size) for size in sizes))
    padded = torch.zeros(longest, dtype=torch.uint8)
    if data:
        padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    received = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(received, padded, group)
    return [bytes(part[: int(size)].numpy()) for part, size in zip(received, sizes, strict=True)]


@functools.cache
def _host_group() -> Any:
    """The group for tensors of the host; None: the default one. All processes ask alike.

    Another program, such as Ray Train, may have joined the processes by NCCL alone.
    """
    if "cpu" in dist.get_backend_config():
        return None
    return dist.new_group(backend="gloo")


def shards() -> int:
    """The number of processes, each of which sees its rows of a batch."""
    joined = joined_processes()
    return 1 if joined is None else joined[1]


def all_sum(tensors: Sequence[Any]) -> list[Any]:
    """The sums over all processes of each tensor, in buckets of one dtype."""
    tensors = list(tensors)
    if shards() == 1 or not tensors:
        return tensors
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return list(_Sum.apply(*tensors))
    return _bucketed_sum(tensors)


class _Sum(torch.autograd.Function):  # type: ignore[misc]
    """A sum over processes; its gradient is the sum of their gradients."""

    @staticmethod
    def forward(ctx: Any, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(_bucketed_sum(list(tensors)))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(_bucketed_sum(list(gradients)))


def _bucketed_sum(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    started: list[tuple[list[int], torch.Tensor]] = []
    for indices in _buckets(tensors):
        flat = torch.cat([tensors[i].detach().reshape(-1) for i in indices])
        started.append((indices, _start_sum(flat)))
    results: list[Any] = [None] * len(tensors)
    for indices, flat in started:
        sizes = [tensors[i].numel() for i in indices]
        for i, part in zip(indices, torch.split(_wait(flat), sizes), strict=True):
            results[i] = part.view(tensors[i].shape)
    return results


def _buckets(tensors: list[torch.Tensor]) -> list[list[int]]:
    """Indices of the tensors that travel together.

    The last come first, as the backward pass computes the gradients of the last layers first.
    """
    buckets: list[list[int]] = []
    open_ones: dict[torch.dtype, tuple[list[int], int]] = {}
    for i in reversed(range(len(tensors))):
        dtype, size = tensors[i].dtype, tensors[i].numel() * tensors[i].element_size()
        indices, held = open_ones.get(dtype, ([], BUCKET_BYTES))
        if held + size > BUCKET_BYTES:
            indices, held = [], 0
            buckets.append(indices)
        indices.append(i)
        open_ones[dtype] = indices, held + size
    return buckets


def _start_sum(flat: torch.Tensor) -> torch.Tensor:
    if flat.dtype in (torch.bool, torch.uint8, torch.int8, torch.int16):
        raise TypeError(f"A sum over processes needs a wider type than {flat.dtype}.")
    result: torch.Tensor = torch.ops._c10d_functional.all_reduce_(flat, "sum", _group_name())
    return result


def _wait(tensor: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = torch.ops._c10d_functional.wait_tensor(tensor)
    return result


def _group_name() -> str:
    name: str = dist.group.WORLD.group_name
    return name


def all_gather(tensors: Sequence[Any]) -> list[Any]:
    """Each tensor of all processes along a new first axis."""
    if shards() == 1:
        return [tensor.unsqueeze(0) for tensor in tensors]
    gather = torch.ops._c10d_functional.all_gather_into_tensor
    started = [
        gather(_sendable(tensor.detach()).contiguous().reshape(-1), shards(), _group_name())
        for tensor in tensors
    ]
    return [
        _wait(flat).view(shards(), *tensor.shape).to(tensor.dtype)
        for flat, tensor in zip(started, tensors, strict=True)
    ]


def _sendable(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor


def copy_from_first(variables: Sequence[keras.Variable]) -> None:
    """Give variables the values that they have in process 0."""
    if shards() > 1:
        with torch.no_grad():
            for variable in variables:
                dist.broadcast(variable.value.detach(), 0)


@contextlib.contextmanager
def local_rows(batch: Any) -> Iterator[LocalRows]:
    """Context in which a step runs on its rows of a batch."""
    joined = joined_processes()
    taken = None if joined is None else rows.taken(batch, *joined)
    if taken is None:
        yield rows.whole(batch, keras.tree.flatten(batch)[0].shape[0])
        return
    with whole_batch(taken, all_sum):
        yield taken


def take_rows(tree: Any) -> Any:
    """This process's rows of the batches in ``tree``, on the host."""
    joined = joined_processes()
    return tree if joined is None else rows.share(tree, *joined)
