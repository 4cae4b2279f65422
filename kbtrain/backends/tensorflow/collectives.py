"""TensorFlow: sums and gathers over processes, in a graph or eagerly.

They are the operations under ``tf.distribute``, in graphs of our own. Operations of different
processes belong together by their instance key: a number that each gets when it is traced, so all
processes must trace the same ones in the same order, which they do as they trace for whole batches.
An ordering token, a resource that every operation takes, makes TensorFlow run those of a graph in
the order in which they were traced.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from kbtrain.backends import collective_check
from kbtrain.errors import DataError, DistributedError, first_lines

_STEP_GROUP, _HOST_GROUP = 27490, 27491
"""Keys of the groups of devices: ``tf.distribute`` counts from 1."""

_FIRST_STEP_KEY = 100
"""Instance keys below are those of ``gather_bytes``, which depend on the size of a message."""

_NO_TIMEOUT = 0.0
"""With one, TensorFlow has a thread sleep for that long for each operation, even after its end:
thousands after a minute. The control channel ends a process that waits for one that hangs."""

_NAMES = {
    tf.raw_ops.CollectiveReduceV2: "all_sum",
    tf.raw_ops.CollectiveGatherV2: "all_gather",
    tf.raw_ops.CollectiveAllToAllV2: "sum_to_owners",
}
"""What the operations are for, in messages."""

_OF_COLLECTIVES = re.compile("Collective|collective instance")
"""In errors of these operations, whose names begin so."""


@dataclass
class Members:
    """The processes that a collective operation runs on.

    Attributes:
        rank: Index of this process.
        size: Number of processes.
        timeout: Seconds that an operation may take.
        device: Where operations of a step run.
    """

    rank: int
    size: int
    timeout: float
    device: str
    keys: Iterator[int] = field(default_factory=lambda: itertools.count(_FIRST_STEP_KEY))
    _token: Any = None
    _eager: dict[Any, Callable[..., Any]] = field(default_factory=dict)

    def reduce(self, flat: Any) -> Any:
        """The sum of a flat tensor over the processes."""
        return self._run(tf.raw_ops.CollectiveReduceV2, flat, merge_op="Add", final_op="Id")

    def gather(self, flat: Any) -> Any:
        """The flat tensors of all processes, one after the other."""
        return self._run(tf.raw_ops.CollectiveGatherV2, flat)

    def exchange_rows(self, rows: Any) -> Any:
        """Of each process, in order of rank, the row whose index is the rank of this one."""
        return self._run(tf.raw_ops.CollectiveAllToAllV2, rows)

    def _run(self, operation: Callable[..., Any], flat: Any, **options: Any) -> Any:
        if not tf.executing_eagerly():
            return self._traced(operation, flat, **options)
        # Traced once for a shape, so that it keeps its key: TensorFlow never forgets a key.
        observed = collective_check.is_observed()
        signature = operation.__name__, flat.dtype, tuple(flat.shape), observed
        if signature not in self._eager:
            # TensorFlow warns of many functions with the same code; a partial has none.
            self._eager[signature] = tf.function(
                functools.partial(self._traced, operation, **options), autograph=False
            )
        with naming_failures(self):
            return self._eager[signature](flat)

    def _traced(self, operation: Callable[..., Any], flat: Any, **options: Any) -> Any:
        if self._token is None:
            with tf.init_scope(), tf.device(self.device):
                self._token = tf.Variable(0.0, trainable=False, name="ordering_token")
        if collective_check.is_observed():
            flat = _announced(_NAMES[operation], flat)
        with tf.device(self.device):
            return operation(
                input=flat,
                group_size=self.size,
                group_key=_STEP_GROUP,
                instance_key=next(self.keys),
                ordering_token=[self._token.handle],
                timeout_seconds=_NO_TIMEOUT,
                **options,
            )

    def gather_bytes(self, data: bytes, least: int) -> list[bytes]:
        """The first bytes of the ``data`` of every process, padded; on the host.

        Args:
            data: The bytes.
            least: Their number, at most; it is the same on all processes.
        """
        words = max(least - 1, 1).bit_length()
        padded = np.zeros(1 << words, np.uint8)
        padded[: len(data)] = np.frombuffer(data, np.uint8)
        with naming_failures(self), tf.device("/CPU:0"):
            result = tf.raw_ops.CollectiveGatherV2(
                input=padded.view(np.int32),
                group_size=self.size,
                group_key=_HOST_GROUP,
                instance_key=words,  # one for each size, used again and again
                ordering_token=[],
                timeout_seconds=_NO_TIMEOUT,
            )
        return [part.tobytes() for part in np.split(result.numpy(), self.size)]

    def broadcast(self, value: np.ndarray) -> np.ndarray:
        """The array of process 0, bit for bit."""
        size = -(-value.nbytes // 4)
        if not size:
            return value
        collective_check.about_to("broadcast from 0", value.shape, value.dtype)
        padded = np.zeros(4 * size, np.uint8)
        padded[: value.nbytes] = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
        common = {
            "group_size": self.size,
            "group_key": _HOST_GROUP,
            "instance_key": next(self.keys),
            "timeout_seconds": _NO_TIMEOUT,
        }
        with naming_failures(self), tf.device("/CPU:0"):
            if self.rank == 0:
                tf.raw_ops.CollectiveBcastSendV2(input=padded.view(np.int32), **common)
                return value
            received = tf.raw_ops.CollectiveBcastRecvV2(T=tf.int32, shape=[size], **common)
        flat = received.numpy().view(np.uint8)[: value.nbytes]
        result: np.ndarray = flat.view(value.dtype).reshape(value.shape)
        return result


def _announced(name: str, flat: Any) -> Any:
    """The tensor, once the observer has been told that it is about to be sent."""

    def announce(shape: Any) -> Any:
        collective_check.about_to(name, shape.numpy().tolist(), flat.dtype.name)
        return np.int32(0)

    with tf.device("/CPU:0"):
        told = tf.py_function(announce, [tf.shape(flat)], tf.int32)
    with tf.control_dependencies([told]):
        return tf.identity(flat)


@contextlib.contextmanager
def naming_failures(members: Members) -> Iterator[None]:
    """Raise an error in words where a collective operation in the context fails."""
    try:
        yield
    except tf.errors.OpError as error:
        named = collective_check.take_error() or _named(error, members)
        if named is None:
            raise
        raise named from None  # TensorFlow's own lines say no more


def _named(error: tf.errors.OpError, members: Members) -> DistributedError | None:
    text = str(error)
    if not _OF_COLLECTIVES.search(text) or isinstance(error, tf.errors.ResourceExhaustedError):
        return None
    where = f"Process {members.rank} of {members.size}"
    reason = re.sub(r"\{\{.*?\}\} *", "", first_lines(error, 1))  # the names of nodes
    if "mismatch" in text.lower():
        return DistributedError(
            f"The processes run different steps: {where} adds up tensors of other shapes than "
            "another one. All processes must be started with the same program, arguments and data "
            f"({reason})."
        )
    if "timed out" in text:
        return DistributedError(
            f"{where} waited {members.timeout:g} s in vain for the others in a collective "
            "operation: one of them has ended or hangs, or it runs other steps than this one. The "
            "output of the others says more."
        )
    return DistributedError(
        f"{where} lost another one in a collective operation: that process ended, or the network "
        f"between them failed ({reason}). The output of the others says more."
    )


# --- lists of tensors -----------------------------------------------------------------------------


def sum_over(members: Members, tensors: Sequence[Any]) -> list[Any]:
    """The sums over all processes of each tensor, one operation for each dtype."""
    tensors = [tf.convert_to_tensor(tensor) for tensor in tensors]
    results = list(tensors)
    for indices in _by_type(tensors):
        given = [tensors[i] for i in indices]
        add = _differentiable_sum if given[0].dtype.is_floating else _sum
        for i, total in zip(indices, add(members, given), strict=True):
            results[i] = total
    return results


def _differentiable_sum(members: Members, tensors: list[Any]) -> list[Any]:
    @tf.custom_gradient  # type: ignore[untyped-decorator]
    def add(*inputs: Any) -> tuple[Any, Callable[..., Any]]:
        # Every process has the sum, so each input's gradient is the sum over their gradients.
        return tuple(_sum(members, inputs)), lambda *outer: tuple(sum_over(members, outer))

    return list(add(*tensors))


def _sum(members: Members, tensors: Sequence[Any]) -> list[Any]:
    dtype = tensors[0].dtype
    flat = tf.cast(flat_of(tensors), summed_in(dtype))
    if flat.shape[0] == 0:
        return list(tensors)
    total = members.reduce(flat)
    return split(total > 0 if dtype == tf.bool else tf.cast(total, dtype), tensors)


def summed_in(dtype: Any) -> Any:
    """The dtype that a sum is computed in.

    Sixteen bits would be rounded at each process on the way. TensorFlow adds up no other integers
    than those of 32 and 64 bits, and no truth values: their sum is whether any of them is true.
    """
    if dtype in (tf.bfloat16, tf.float16):
        return tf.float32
    return dtype if dtype.is_floating else _integer(dtype)


def _integer(dtype: Any) -> Any:
    if dtype == tf.bool or dtype.is_integer:
        return tf.int64 if dtype in (tf.int64, tf.uint32, tf.uint64) else tf.int32
    raise DataError(
        f"Tensors of dtype {dtype.name} cannot be sent from one process to the others; numbers and "
        "truth values can. Encode them as numbers, or train in one process."
    )


def gather_from(members: Members, tensors: Sequence[Any]) -> list[Any]:
    """Each tensor of all processes along a new first axis, one operation for each dtype."""
    tensors = [tf.stop_gradient(tf.convert_to_tensor(tensor)) for tensor in tensors]
    results: list[Any] = list(tensors)
    for indices in _by_type(tensors):
        given = [tensors[i] for i in indices]
        flat = flat_of(given)
        if flat.shape[0] == 0:  # TensorFlow would end the process
            for i in indices:
                results[i] = tf.stack([tensors[i]] * members.size)
            continue
        dtype = flat.dtype
        # Of bfloat16 float32 has all values.
        sent = tf.float32 if dtype == tf.bfloat16 else dtype
        sent = sent if sent.is_floating else _integer(dtype)
        rows = tf.split(tf.cast(members.gather(tf.cast(flat, sent)), dtype), members.size)
        parts = [split(row, given) for row in rows]
        for i, parts_of_one in zip(indices, zip(*parts, strict=True), strict=True):
            results[i] = tf.stack(parts_of_one)
    return results


def _by_type(tensors: Sequence[Any]) -> list[list[int]]:
    """The indices of the tensors of each dtype, in the order of the first of them."""
    groups: dict[Any, list[int]] = {}
    for i, tensor in enumerate(tensors):
        groups.setdefault(tensor.dtype, []).append(i)
    return list(groups.values())


def flat_of(tensors: Sequence[Any]) -> Any:
    """The elements of the tensors, one after the other."""
    return tf.concat([tf.reshape(tensor, [-1]) for tensor in tensors], 0)


def split(flat: Any, like: Sequence[Any]) -> list[Any]:
    """The beginning of a flat tensor in the shapes of others."""
    if not like:  # TensorFlow splits nothing into one part
        return []
    if all(tensor.shape.is_fully_defined() for tensor in like):
        sizes = [tensor.shape.num_elements() for tensor in like]
        parts = tf.split(flat, [*sizes, -1])[: len(sizes)]
        return [tf.reshape(part, t.shape) for part, t in zip(parts, like, strict=True)]
    parts = tf.split(flat, [tf.size(tensor) for tensor in like], num=len(like))
    return [tf.reshape(part, tf.shape(t)) for part, t in zip(parts, like, strict=True)]


def broadcast(members: Members, variables: Sequence[keras.Variable]) -> None:
    """Give variables the values that they have in process 0."""
    for variable in variables:
        value = np.asarray(tf.convert_to_tensor(variable.value).numpy())
        received = members.broadcast(value)
        if received is not value:
            variable.assign(tf.constant(received))
