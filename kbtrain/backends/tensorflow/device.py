"""TensorFlow: data to the device and back, random state, devices, precision, memory."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from kbtrain.backends.compiled_graphs import refuse_cuda_graphs
from kbtrain.backends.memory_errors import says_out_of_memory
from kbtrain.backends.protocol import StateLayout
from kbtrain.backends.rows import own_share
from kbtrain.errors import ConfigurationError, first_lines
from kbtrain.utils.fallback import PrivateApi
from kbtrain.utils.packages.keras_private import held_values


def to_device(tree: Any, pin: bool = False) -> Any:
    """Copy a structure of NumPy arrays to the device.

    Args:
        tree: The arrays; of batches with rows for several processes this one takes its own.
        pin: Unused here.
    """
    return tf.nest.map_structure(tf.convert_to_tensor, own_share(tree))


def ragged(dense: Any, lengths: Sequence[Any]) -> Any:
    """Create the ragged tensor represented by ``kbtrain.data.ragged.Ragged``.

    Args:
        dense: Its values, padded; symbolic values give a symbolic tensor.
        lengths: The lengths of the rows along each ragged axis, padded.
    """
    if isinstance(dense, keras.KerasTensor):
        shape = [dense.shape[0], *[None] * len(lengths), *dense.shape[len(lengths) + 1 :]]
        return keras.KerasTensor(shape, dense.dtype, ragged=True, ragged_rank=len(lengths))

    def of_rows(values: Any) -> Any:
        return tf.RaggedTensor.from_tensor(
            values, lengths=lengths[0], row_splits_dtype=lengths[0].dtype
        )

    rows = of_rows(dense)
    if len(lengths) == 1:
        return rows
    return rows.with_values(ragged(rows.values, [of_rows(each).values for each in lengths[1:]]))


def to_host(tree: Any) -> Any:
    """Wait for a structure of tensors and return it as NumPy arrays."""
    return tf.nest.map_structure(lambda t: t.numpy() if tf.is_tensor(t) else np.asarray(t), tree)


def start_to_host(tree: Any) -> Callable[[], Any]:
    """Start copying tensors to the host; return a function that waits for the result.

    On a GPU a copy waits for all work that was started before it, so a thread starts it now: one of
    its own, as it may be busy until the work ends.
    """
    if all(_on_host(leaf) for leaf in tf.nest.flatten(tree)):
        return lambda: to_host(tree)
    return _copiers().submit(to_host, tree).result


COPIES = 16
"""Most results that are on their way to the host at a time; more wait for a thread."""


def _on_host(leaf: Any) -> bool:
    return not tf.is_tensor(leaf) or ":CPU:" in leaf.device or not leaf.device


@functools.cache
def _copiers() -> ThreadPoolExecutor:
    """Threads, which are started as they are needed."""
    return ThreadPoolExecutor(COPIES, thread_name_prefix="kbtrain-to-host")


def host_view(value: Any) -> np.ndarray:
    """A read-only view of a variable's value on the host, without a copy if possible."""
    tensor = tf.convert_to_tensor(value)
    try:
        # ``numpy()`` copies; the buffer protocol of a tensor in host memory does not.
        return np.asarray(memoryview(tensor))
    except (TypeError, ValueError, BufferError):  # types that the buffer protocol does not support
        return np.asarray(tensor.numpy())


def synchronize() -> None:
    """Wait for all pending computations."""
    tf.test.experimental.sync_devices()


def rng_state() -> dict[str, np.ndarray]:
    """The state of TensorFlow's global generator; Keras only uses its own seed generators."""
    try:
        return {"generator": tf.random.get_global_generator().state.numpy()}
    except RuntimeError:  # with deterministic operations there is one only if somebody has set it
        return {}


def set_rng_state(state: dict[str, np.ndarray]) -> None:
    """Restore the result of ``rng_state``; that of another backend is ignored."""
    if "generator" not in state:
        return
    try:
        tf.random.get_global_generator().reset(state["generator"])
    except RuntimeError:  # as above
        generator = tf.random.Generator.from_state(state["generator"], "philox")
        tf.random.set_global_generator(generator)


def devices() -> list[str]:
    """The devices of this process, by the names that ``device_scope`` takes."""
    listed = [d.name.rpartition("/device:") for d in tf.config.list_logical_devices()]
    here = listed[0][0]  # those of other processes follow
    own = [name.lower() for host, _, name in listed if host == here]
    return [name for kind in ("gpu", "cpu") for name in own if name.startswith(kind)]


def _named(device: str) -> str:
    platform, _, index = device.partition(":")
    return f"/{platform.upper()}:{index or 0}"


@contextlib.contextmanager
def device_scope(device: str | None, layout: StateLayout | None = None) -> Iterator[None]:
    """Context in which new tensors are placed on ``device`` ("cpu", "gpu:1") or the default."""
    if device is None:
        yield
        return
    with tf.device(_named(device)):
        yield


def initializing() -> contextlib.AbstractContextManager[None]:
    """Context in which variables are created: they are whole on this backend."""
    return contextlib.nullcontext()


def place(variables: Sequence[keras.Variable], device: str | None) -> None:
    """Move the values of ``variables`` to ``device``; do nothing if it is None."""
    if device is None:
        return
    name = _named(device)
    for variable in variables:
        if not variable.value.device.endswith(name.removeprefix("/")):
            _move(variable, name)


def _put_on(variable: keras.Variable, device: str) -> None:
    held_values([variable])  # checked, as otherwise this would set an unused attribute
    with tf.device(device):
        variable._value = tf.Variable(
            variable.value, trainable=variable.trainable, name=variable.name
        )


_move = PrivateApi(
    "Moving a variable to another device",
    "keras",
    _put_on,
    lambda variable, device: None,
    "Variables stay where they are; TensorFlow copies what a step on another device reads.",
)


@contextlib.contextmanager
def numerics(tf32: bool | None, deterministic: bool) -> Iterator[None]:
    """Context that sets the precision of float32 products, and deterministic kernels.

    Args:
        tf32: Whether products may use TensorFloat-32; None keeps TensorFlow's setting.
        deterministic: Whether operations without a deterministic kernel raise an error.

    Raises:
        ConfigurationError: There was such an operation.
    """
    before = tf.config.experimental.tensor_float_32_execution_enabled()
    was = _is_determinism_on()
    if tf32 is not None:
        tf.config.experimental.enable_tensor_float_32_execution(tf32)
    if deterministic:
        tf.config.experimental.enable_op_determinism()
    try:
        yield
    except tf.errors.UnimplementedError as error:
        if not deterministic or "determinis" not in str(error).lower():
            raise
        raise ConfigurationError(
            "full_determinism=True, and TensorFlow has no deterministic kernel for an operation "
            f"on this device: {first_lines(error, 1)} Replace the layer that uses it, or write "
            "full_determinism=False: two runs then differ in the last digits."
        ) from error
    finally:
        tf.config.experimental.enable_tensor_float_32_execution(before)
        if not was:
            _turn_determinism_off()


# TensorFlow has no public API to query determinism or to turn it off again.
def _asks_for_determinism() -> bool:
    from tensorflow.python.framework import config

    return bool(config.is_op_determinism_enabled())


def _disable_determinism() -> None:
    from tensorflow.python.framework import config

    config.disable_op_determinism()


_STAYS = "After full_determinism it stays switched on for the rest of the process."

_is_determinism_on = PrivateApi(
    "Asking for deterministic operations",
    "tensorflow",
    _asks_for_determinism,
    lambda: True,
    _STAYS,
)
_turn_determinism_off = PrivateApi(
    "Switching deterministic operations off",
    "tensorflow",
    _disable_determinism,
    lambda: None,
    _STAYS,
)


def cuda_graphs(wanted: bool | str) -> contextlib.AbstractContextManager[None]:
    """Check that no CUDA graphs are asked for.

    Raises:
        ConfigurationError: They are.
    """
    return refuse_cuda_graphs(wanted, "tensorflow")


def device_info(device: str | None = None) -> str:
    """A readable name of the device in use."""
    name = devices()[0] if device is None else _named(device).removeprefix("/").lower()
    if name.startswith("cpu"):
        return name
    gpu = tf.config.list_physical_devices("GPU")[int(name.partition(":")[2])]
    details = tf.config.experimental.get_device_details(gpu)
    return f"{name} ({details.get('device_name', 'unknown')})"


def memory_stats() -> dict[str, int]:
    """Bytes in use and at the peak on the GPU in use; empty on the CPU, which has no counters."""
    device = tf.zeros(()).device.rpartition("/device:")[2]
    if not device.startswith("GPU"):
        return {}
    info = tf.config.experimental.get_memory_info(device)
    return {"in_use": int(info["current"]), "peak": int(info["peak"])}


def is_oom(error: BaseException) -> bool:
    """Whether ``error`` means that the device ran out of memory."""
    # Under XLA it may be an internal error that says so.
    named = isinstance(error, MemoryError | tf.errors.ResourceExhaustedError)
    return named or (isinstance(error, tf.errors.OpError) and says_out_of_memory(error))


def free_memory() -> None:
    """Release cached memory (does nothing on this backend)."""
