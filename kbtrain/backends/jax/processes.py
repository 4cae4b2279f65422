"""JAX: several processes that train together, joined by ``jax.distributed``."""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import keras
import numpy as np
from jax.experimental import multihost_utils

from kbtrain.backends.collective_check import about_to
from kbtrain.backends.exchange_settings import check_library, refuse_bucket_size
from kbtrain.backends.rendezvous import REMINDER_SECONDS, check_port, meet
from kbtrain.backends.rows import LocalRows, whole
from kbtrain.errors import ConfigurationError, DistributedError, first_lines
from kbtrain.utils.machine.processes import ProcessGroup

logger = logging.getLogger("kbtrain")

HEARTBEAT_SECONDS = 20
"""JAX ends all processes this long after the last sign of life of one of them."""

PIECE_BYTES = 1 << 26
"""Bytes that ``copy_from_first`` sends at a time."""


def joined_processes() -> tuple[int, int] | None:
    """``(rank, size)`` if the framework's processes have been joined by another program."""
    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        return None
    return jax.process_index(), jax.process_count()


def start_processes(group: ProcessGroup, timeout: float) -> None:
    """Join the processes of ``group`` by ``jax.distributed.initialize``.

    Args:
        group: The processes.
        timeout: Seconds to wait until all have joined, and for each other at the end.

    Raises:
        ConfigurationError: JAX has been used already.
        DistributedError: The port is taken, or not all processes joined in time.
    """
    where = f"{group.address}:{group.port}"
    deadline = time.monotonic() + timeout
    meet(group, timeout)
    if group.rank == 0:
        check_port(group)
    # The pre-emption service takes SIGTERM for itself, which stops a run after a saved step.
    if "jax_enable_preemption_service" in jax.config.values:  # JAX 0.6 has no such switch
        jax.config.update("jax_enable_preemption_service", False)
    if jax.config.jax_cpu_collectives_implementation is None:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    local = _is_local(group.address)
    # JAX ends the process when its own time is over; here an error says what happened.
    settings: dict[str, Any] = {
        "coordinator_address": where,
        "num_processes": group.size,
        "process_id": group.rank,
        "local_device_ids": _own_device(group),
        "cluster_detection_method": "deactivate",
        "initialization_timeout": int(timeout) + 60,
        "heartbeat_timeout_seconds": HEARTBEAT_SECONDS,
        "shutdown_timeout_seconds": max(1, int(timeout)),
        "coordinator_bind_address": where if local and group.rank == 0 else None,
    }
    # JAX 0.6 takes no times here. The control channel finds a lost process in any case.
    known = inspect.signature(jax.distributed.initialize).parameters
    settings = {name: value for name, value in settings.items() if name in known}
    errors: list[BaseException] = []

    def join() -> None:
        try:
            jax.distributed.initialize(**settings)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=join, name="kbtrain-join", daemon=True)
    thread.start()
    while thread.is_alive():
        left = deadline - time.monotonic()
        if left <= 0:
            raise DistributedError(
                f"Process {group.rank} of {group.size} waited {timeout:.0f} s at {where} and not "
                "all others have joined. One of them may have failed before, or not have been "
                "started: see the output of each, and check that all got the same address, port "
                "and number of processes."
            )
        thread.join(min(left, REMINDER_SECONDS))
        if thread.is_alive():
            logger.warning(
                "Process %d of %d is waiting at %s for the others to join.",
                group.rank, group.size, where,
            )  # fmt: skip
    if errors:
        _explain(errors[0], where)


def _explain(error: BaseException, where: str) -> None:
    """Raise the error of ``jax.distributed.initialize`` in words."""
    if isinstance(error, RuntimeError) and "must be called before" in str(error):
        raise ConfigurationError(
            "JAX has been used before the processes were joined, and then they cannot be. Import "
            "kbtrain (which joins them) before the first tensor, model or call of jax.devices()."
        ) from None
    raise DistributedError(
        f"JAX could not join the processes at {where}: {first_lines(error)}."
    ) from error


def _is_local(address: str) -> bool:
    return address == "localhost" or address.startswith("127.")


def _own_device(group: ProcessGroup) -> int | None:
    """The GPU of this process where a machine has several processes; None for all of them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    already_one = visible is not None and len(visible.split(",")) == 1
    return group.local_rank if group.local_size > 1 and not already_one else None


def stop_processes() -> None:
    """Leave the processes; do nothing if none were joined."""
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()


def exchange(data: bytes) -> list[bytes]:
    """The ``data`` of every process, in order of rank."""
    if jax.process_count() == 1:
        return [data]
    about_to("exchange of messages")
    gather = multihost_utils.process_allgather
    lengths = gather(np.array([len(data)], np.int32)).ravel().tolist()
    # Lengths that are powers of two: the collective is compiled once for each.
    padded = np.zeros(1 << max(lengths).bit_length(), np.uint8)
    padded[: len(data)] = np.frombuffer(data, np.uint8)
    rows = np.asarray(gather(padded))
    return [row[:length].tobytes() for row, length in zip(rows, lengths, strict=True)]


def shards() -> int:
    """The number of processes whose rows of a batch a step sees separately."""
    return 1


def all_sum(tensors: Sequence[Any]) -> list[Any]:
    """The sums over all shards of each tensor."""
    return list(tensors)


def all_gather(tensors: Sequence[Any]) -> list[Any]:
    """Each tensor of all shards along a new first axis."""
    return [keras.ops.expand_dims(tensor, 0) for tensor in tensors]


def sum_to_owners(tensors: Sequence[Any], owners: Sequence[int]) -> list[Any]:
    """The sums over all shards of the tensors, of which a step sees all."""
    return list(tensors)


def gather_from_owners(tensors: Sequence[Any], owners: Sequence[int]) -> list[Any]:
    """Each tensor as its owner has it, which is the same everywhere."""
    return list(tensors)


@contextlib.contextmanager
def exchange_settings(
    library: str | None, timeout: float, bucket_megabytes: float | None
) -> Iterator[None]:
    """Context that checks the settings; JAX itself waits as long as it takes."""
    refuse_bucket_size(bucket_megabytes, "jax")
    platform = jax.default_backend()
    check_library(library, {"cpu": "gloo", "gpu": "nccl"}.get(platform, platform), "jax")
    yield


def copy_from_first(variables: Sequence[keras.Variable]) -> None:
    """Give variables the values that they have in process 0.

    Bytes are sent, so that each value is the same bit for bit, in pieces of one length, so that
    few collectives are compiled. Values that are divided among the processes stay as they are.
    """
    if jax.process_count() == 1:
        return
    own = [v for v in variables if v.value.is_fully_addressable]
    if not own:
        return
    values = [np.asarray(v.value, order="C") for v in own]
    sent = np.concatenate([value.reshape(-1).view(np.uint8) for value in values])
    about_to("broadcast from 0", sent.shape, sent.dtype)
    pieces = [
        multihost_utils.broadcast_one_to_all(sent[start : start + PIECE_BYTES])
        for start in range(0, len(sent), PIECE_BYTES)
    ]
    if jax.process_index() == 0:
        return
    received, start = np.concatenate(pieces), 0
    for variable, value in zip(own, values, strict=True):
        part = received[start : start + value.nbytes]
        variable.assign(part.view(value.dtype).reshape(value.shape))
        start += value.nbytes


@contextlib.contextmanager
def local_rows(batch: Any) -> Iterator[LocalRows]:
    """Context in which a step runs on its rows of a batch."""
    yield whole(batch, keras.tree.flatten(batch)[0].shape[0])
