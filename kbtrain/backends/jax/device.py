"""JAX: data to the device and back, random state, devices, precision, memory."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from kbtrain.backends.compiled_graphs import refuse_cuda_graphs
from kbtrain.backends.jax import mesh, target
from kbtrain.backends.memory_errors import says_out_of_memory
from kbtrain.backends.protocol import StateLayout
from kbtrain.errors import DataError


def ragged(dense: Any, lengths: Sequence[Any]) -> Any:
    """Not available: data with ragged tensors is rejected earlier."""
    raise NotImplementedError("JAX has no ragged tensors that Keras could use.")


def to_device(tree: Any, pin: bool = False) -> Any:
    """Start copying a structure of NumPy arrays to the device; returns at once.

    Args:
        tree: The arrays.
        pin: Unused here.

    Raises:
        DataError: An integer does not fit into 32 bits: JAX would wrap it silently.
    """
    if not jax.config.jax_enable_x64:
        for leaf in jax.tree.leaves(tree):
            if leaf.dtype.kind in "iu" and leaf.dtype.itemsize > 4:
                _check_range(leaf)
    return mesh.put(tree)


def _check_range(array: np.ndarray) -> None:
    """Check that 64-bit integers fit into 32 bits, to which JAX truncates them."""
    limits = np.iinfo(np.int32 if array.dtype.kind == "i" else np.uint32)
    if array.size and (array.max() > limits.max or array.min() < limits.min):
        raise DataError(
            f"JAX takes integers of 32 bits, {limits.min} to {limits.max}, and would make another "
            "number of what is beyond. Make them smaller (a remainder, say), or set "
            "JAX_ENABLE_X64=1 in the environment. Received: an array of shape "
            f"{array.shape[1:]}, {array.dtype}, with values from {array.min()} to {array.max()}."
        )


def to_host(tree: Any) -> Any:
    """Wait for a structure of tensors and return it as NumPy arrays."""
    return jax.device_get(tree)


def start_to_host(tree: Any) -> Callable[[], Any]:
    """Start copying tensors to the host; return a function that waits for the result."""
    for leaf in jax.tree.leaves(tree):
        leaf.copy_to_host_async()
    return lambda: jax.device_get(tree)


def host_view(value: Any) -> np.ndarray:
    """A read-only view of a variable's value on the host, without a copy if possible."""
    return np.asarray(value)


def synchronize() -> None:
    """Wait for all pending computations."""
    # A run may be on a CPU that is not the default.
    for device in dict.fromkeys([*jax.local_devices(), *jnp.zeros(()).devices()]):
        try:
            device.synchronize_all_activity()
        except AttributeError:  # a CPU has none
            jax.block_until_ready(jax.live_arrays(device.platform))


def rng_state() -> dict[str, np.ndarray]:
    """JAX has no global random state; all of it is in Keras' seed generators."""
    return {}


def set_rng_state(state: dict[str, np.ndarray]) -> None:
    """Restore the result of ``rng_state`` (does nothing on this backend)."""


def devices() -> list[str]:
    """The devices of this process, by the names that ``device_scope`` takes."""
    if (there := target.devices()) is not None:
        return [f"gpu:{i}" for i in range(len(there))]
    platforms = dict.fromkeys([jax.local_devices()[0].platform, "cpu"])
    return [f"{p}:{i}" for p in platforms for i in range(_device_count(p))]


def _device_count(platform: str) -> int:
    try:
        return int(jax.local_device_count(platform))
    except RuntimeError:  # JAX_PLATFORMS names others only
        return 0


@contextlib.contextmanager
def device_scope(device: str | None, layout: StateLayout | None = None) -> Iterator[None]:
    """Context in which new arrays are placed on ``device`` ("cpu", "gpu:1") or the default.

    With several devices ("gpu:0,gpu:1"), or several processes with a device each, batches are
    divided among them, and each device holds the whole state, or its part of it by ``layout``.
    """
    with mesh.on_mesh_of(device, layout), contextlib.ExitStack() as stack:
        if device is not None and target.devices() is None:
            stack.enter_context(jax.default_device(mesh.local_devices(device)[0]))
        yield


def place(variables: Sequence[keras.Variable], device: str | None) -> None:
    """Move the values of ``variables`` to ``device``; do nothing if it is None.

    Those that the run divides are divided among its devices. The others are not committed to the
    device: JAX would compile once for committed values and again for uncommitted ones assigned
    later, such as those of a metric after a reset.
    """
    variables = mesh.divide(variables)
    if device is None or target.devices() is not None:
        return
    if (local := mesh.local_mesh_of(device)) is not None:
        layout = NamedSharding(local, PartitionSpec())
        for variable in variables:
            if variable.value.sharding != layout:
                variable.assign(jax.device_put(variable.value, layout))
        return
    chosen = mesh.local_devices(device)[0]
    with jax.default_device(chosen):
        for variable in variables:
            if variable.value.devices() != {chosen}:
                variable.assign(jnp.array(jax.device_get(variable.value)))


def prepare() -> None:
    """Do nothing: what JAX is told before anything runs are environment variables."""


_options: dict[str, Any] | None = None


def compiler_options() -> dict[str, Any] | None:
    """The XLA options for steps compiled now."""
    return _options


@contextlib.contextmanager
def numerics(tf32: bool | None, deterministic: bool) -> Iterator[None]:
    """Context that sets the precision of float32 products, and deterministic kernels.

    Args:
        tf32: Whether products may use TensorFloat-32; None keeps JAX's setting.
        deterministic: Whether to compile without nondeterministic kernels (GPUs have some).
    """
    global _options
    scope: Any = contextlib.nullcontext()
    if tf32 is not None:
        scope = jax.default_matmul_precision("tensorfloat32" if tf32 else "highest")
    before = _options
    if deterministic:
        _options = {"xla_gpu_deterministic_ops": True}
    try:
        with scope:
            yield
    finally:
        _options = before


def cuda_graphs(wanted: bool | str) -> contextlib.AbstractContextManager[None]:
    """Check that no CUDA graphs are asked for.

    Raises:
        ConfigurationError: They are.
    """
    return refuse_cuda_graphs(wanted, "jax")


def device_info(device: str | None = None) -> str:
    """A readable name of the device or devices in use."""
    found = mesh.local_devices(device)
    names = ", ".join(f"{x.platform}:{x.id}" for x in found)
    return f"{names} ({found[0].device_kind})"


def memory_stats() -> dict[str, int]:
    """Bytes in use and at the peak on the device in use; empty if it has no counters."""
    (device,) = jnp.zeros(()).devices()
    stats = device.memory_stats() or {}
    keys = {"bytes_in_use": "in_use", "peak_bytes_in_use": "peak"}
    return {new: int(stats[old]) for old, new in keys.items() if old in stats}


def is_oom(error: BaseException) -> bool:
    """Whether ``error`` means that the device ran out of memory."""
    named = isinstance(error, RuntimeError) and says_out_of_memory(error)
    return named or isinstance(error, MemoryError)


def free_memory() -> None:
    """Return memory cached by the C library to the system, if possible."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)
