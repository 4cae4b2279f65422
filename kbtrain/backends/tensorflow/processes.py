"""TensorFlow: several processes that train together, in a cluster of ``tf.distribute``.

The cluster is set up by constructing a ``MultiWorkerMirroredStrategy``. The strategy itself is not
used: steps run in graphs of our own, with the operations in ``collectives``.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from kbtrain.backends.collective_check import about_to
from kbtrain.backends.exchange_settings import check_library, refuse_bucket_size
from kbtrain.backends.rendezvous import meet
from kbtrain.backends.rows import LocalRows
from kbtrain.backends.tensorflow import collectives
from kbtrain.backends.tensorflow.collectives import Members, naming_failures
from kbtrain.backends.tensorflow.owners import reduce_to_owners, values_of_owners
from kbtrain.backends.whole_batch import rows_of
from kbtrain.errors import ConfigurationError, DistributedError, first_lines
from kbtrain.utils.fallback import PrivateApi
from kbtrain.utils.machine.processes import ProcessGroup

START_TIMEOUT = 300.0
"""Seconds that a process waits at most for the others to start."""

_TIMEOUT = 1800.0
"""Seconds that an operation may take if another program has joined the processes."""

_HEAD = 1024
"""Bytes of a message that are sent at once; most messages are shorter."""

_members: Members | None = None


def joined_processes() -> tuple[int, int] | None:
    """``(rank, size)`` if the framework's processes have been joined by another program."""
    members = _joined()
    return None if members is None else (members.rank, members.size)


def _joined() -> Members | None:
    global _members
    if _members is None:
        place = _place_in_cluster()
        if place is not None and place[1] > 1:
            rank, size = place
            _members = Members(rank, size, _TIMEOUT, _device())
    return _members


def _place_of_server() -> tuple[int, int] | None:
    from tensorflow.python.eager import context

    server = context.context()._collective_ops_server_def
    if server is None:
        return None
    sizes = {job.name: len(job.tasks) for job in server.cluster.job}
    chiefs, workers = sizes.get("chief", 0), sizes.get("worker", 0)
    first = chiefs if server.job_name == "worker" else 0
    return first + server.task_index, chiefs + workers


_place_in_cluster: Callable[[], tuple[int, int] | None] = PrivateApi(
    "Asking for the cluster of this process",
    "tensorflow",
    _place_of_server,
    lambda: None,
    "A strategy of tf.distribute that the program makes itself is not noticed.",
)


def _device() -> str:
    return "/GPU:0" if tf.config.get_visible_devices("GPU") else "/CPU:0"


def start_processes(group: ProcessGroup, timeout: float) -> None:
    """Join the processes of ``group``; each sees one GPU of its machine."""
    global _members
    _require_no_tensors()
    gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        tf.config.set_visible_devices(gpus[group.local_rank % len(gpus)], "GPU")
    addresses = meet(group, min(timeout, START_TIMEOUT))
    resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
        tf.train.ClusterSpec({"worker": list(addresses)}),
        task_type="worker",
        task_id=group.rank,
        num_accelerators={"GPU": min(len(gpus), 1)},
        rpc_layer="grpc",
    )
    try:
        with _keeping_sigterm():
            tf.distribute.MultiWorkerMirroredStrategy(resolver)
    except (RuntimeError, tf.errors.OpError) as error:
        raise DistributedError(
            f"TensorFlow could not connect process {group.rank} of {group.size} at "
            f"{addresses[group.rank]} with the others at {', '.join(addresses)} "
            f"({group.launcher}): {first_lines(error, 1)}. Check that these ports are free and "
            "that no firewall is between the hosts."
        ) from error
    _members = Members(group.rank, group.size, timeout, _device())


def _require_no_tensors() -> None:
    # There is no function to ask. This setting, too, can only be changed before the first tensor.
    threads = tf.config.threading.get_intra_op_parallelism_threads()
    try:
        tf.config.threading.set_intra_op_parallelism_threads(threads + 1)
        tf.config.threading.set_intra_op_parallelism_threads(threads)
    except RuntimeError as error:
        raise ConfigurationError(
            "TensorFlow cannot join other processes after its first tensor has been created. "
            "Import kbtrain (`from kbtrain import Trainer`) before the model, or anything else "
            "that makes tensors, is built."
        ) from error


@contextlib.contextmanager
def _keeping_sigterm() -> Iterator[None]:
    """Undo that TensorFlow's cluster service takes SIGTERM as a notice, and goes on."""
    if threading.current_thread() is not threading.main_thread():  # Python allows it there only
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if handler is not None:
            signal.signal(signal.SIGTERM, handler)


def stop_processes() -> None:
    """Leave the processes; do nothing if none were joined.

    TensorFlow has no way to leave but to end the process.
    """


def exchange(data: bytes) -> list[bytes]:
    """The ``data`` of every process, in order of rank."""
    members = _joined()
    if members is None:
        return [data]
    about_to("exchange of messages")
    room = _HEAD - 4
    parts = members.gather_bytes(len(data).to_bytes(4, "little") + data[:room], _HEAD)
    sizes = [int.from_bytes(part[:4], "little") for part in parts]
    if max(sizes) <= room:
        return [part[4 : 4 + size] for part, size in zip(parts, sizes, strict=True)]
    parts = members.gather_bytes(data, max(max(sizes), 2 * _HEAD))
    return [part[:size] for part, size in zip(parts, sizes, strict=True)]


def shards() -> int:
    """The number of processes, each of which sees its rows of a batch."""
    members = _joined()
    return 1 if members is None else members.size


def all_sum(tensors: Sequence[Any]) -> list[Any]:
    """The sums over all processes of each tensor, one operation for each dtype."""
    members = _joined()
    return list(tensors) if members is None else collectives.sum_over(members, tensors)


def all_gather(tensors: Sequence[Any]) -> list[Any]:
    """Each tensor of all processes along a new first axis."""
    members = _joined()
    if members is None:
        return [tf.expand_dims(tensor, 0) for tensor in tensors]
    return collectives.gather_from(members, tensors)


def sum_to_owners(tensors: Sequence[Any], owners: Sequence[int]) -> list[Any]:
    """The sums over all processes of the tensors that this one owns; None for the others."""
    members = _joined()
    return list(tensors) if members is None else reduce_to_owners(members, tensors, owners)


def gather_from_owners(tensors: Sequence[Any], owners: Sequence[int]) -> list[Any]:
    """Each tensor as its owner has it."""
    members = _joined()
    if members is None:
        return list(tensors)
    return values_of_owners(members, tensors, owners)


@contextlib.contextmanager
def exchange_settings(
    library: str | None, timeout: float, bucket_megabytes: float | None
) -> Iterator[None]:
    """Context that checks the settings; operations traced in it have this limit of time."""
    refuse_bucket_size(bucket_megabytes, "tensorflow")
    gpu = _device().startswith("/GPU")
    check_library(library, "nccl" if gpu else "TensorFlow's own library", "tensorflow")
    members = _joined()
    if members is not None:
        members.timeout = timeout
    yield


def copy_from_first(variables: Sequence[keras.Variable]) -> None:
    """Give variables the values that they have in process 0."""
    members = _joined()
    if members is not None:
        collectives.broadcast(members, variables)


@contextlib.contextmanager
def local_rows(batch: Any) -> Iterator[LocalRows]:
    """Context in which a step runs on its rows of a batch."""
    with rows_of(batch, joined_processes(), all_sum) as found:
        yield found


def named(fn: Callable[..., Any]) -> Callable[..., Any]:
    """``fn``, with errors in words where another process is lost; as it is for one process."""
    members = _joined()
    if members is None:
        return fn

    def call(*args: Any) -> Any:
        with naming_failures(members):
            return fn(*args)

    return call
