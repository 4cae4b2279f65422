"""PyTorch: several processes, through ``torch.distributed``."""

from __future__ import annotations

import contextlib
import datetime
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import torch
import torch.distributed as dist

from kbtrain.backends.collective_check import about_to
from kbtrain.backends.exchange_settings import check_library
from kbtrain.backends.rendezvous import meet
from kbtrain.backends.rows import LocalRows
from kbtrain.backends.torch.collectives import all_sum, bucket_size, shards
from kbtrain.backends.whole_batch import rows_of
from kbtrain.errors import ConfigurationError, DistributedError, first_lines
from kbtrain.utils.fallback import PrivateApi
from kbtrain.utils.machine.processes import ProcessGroup, current


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
    if group.launcher != "torchrun":  # which waits for all of its processes itself
        meet(group, timeout)
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
    about_to("exchange of messages")
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


@contextlib.contextmanager
def exchange_settings(
    library: str | None, timeout: float, bucket_megabytes: float | None
) -> Iterator[None]:
    """Context that applies the settings.

    Raises:
        ConfigurationError: The device has no library for exchanges between processes, or is that
            of another process.
    """
    _check_place(torch.as_tensor(keras.ops.zeros(())).device, current())
    check_library(library, "nccl" if torch.cuda.is_available() else "gloo", "torch")
    if joined_processes() is not None:
        _set_timeout(datetime.timedelta(seconds=timeout))
    with bucket_size(bucket_megabytes):
        yield


def _check_place(device: torch.device, group: ProcessGroup) -> None:
    """Check that the tensors of a device can be exchanged.

    Args:
        device: The device of this process.
        group: The processes.
    """
    if device.type == "cpu":
        return
    if device.type != "cuda":
        raise ConfigurationError(
            "On PyTorch several processes exchange tensors of GPUs of NVIDIA's and AMD's (by NCCL) "
            f"or of CPUs (by Gloo). Received: {group.size} processes that train on "
            f"{device.type!r}. Start one process, or write use_cpu=True."
        )
    count = torch.cuda.device_count()
    own = group.local_rank % count
    # A launcher may show each process a GPU of its own, and who joins the processes may choose.
    others_choose = group.launcher in ("Ray Train", "this program")
    chosen_here = count > 1 and group.local_size > 1 and not others_choose
    if chosen_here and (group.local_size > count or device.index != own):
        raise ConfigurationError(
            f"Each of the {group.local_size} processes on this machine needs a GPU of its own, as "
            f"NCCL refuses to share one. Received: process {group.local_rank} of them on GPU "
            f"{device.index}, of {count}. Leave out devices, so that each takes the GPU of its own "
            "number, and start no more processes than there are GPUs."
        )


def _set_group_timeout(timeout: datetime.timedelta) -> None:
    dist.distributed_c10d._set_pg_timeout(timeout)


_set_timeout = PrivateApi(
    "Setting the time-out of a process group",
    "torch",
    _set_group_timeout,
    lambda timeout: None,
    "Collective operations fail after half an hour.",
)


def copy_from_first(variables: Sequence[keras.Variable]) -> None:
    """Give variables the values that they have in process 0."""
    if shards() > 1:
        with torch.no_grad():
            for variable in variables:
                about_to("broadcast from 0", variable.shape, variable.dtype)
                dist.broadcast(variable.value.detach(), 0)


@contextlib.contextmanager
def local_rows(batch: Any) -> Iterator[LocalRows]:
    """Context in which a step runs on its rows of a batch."""
    with rows_of(batch, joined_processes(), all_sum) as found:
        yield found
