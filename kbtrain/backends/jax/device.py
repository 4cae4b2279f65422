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

from kbtrain.errors import DataError


def ragged(dense: Any, lengths: Sequence[Any]) -> Any:
    """There is none here: data with ragged tensors is refused before a step is made."""
    raise NotImplementedError("JAX has no ragged tensors that Keras could use.")


def to_device(tree: Any, pin: bool = False) -> Any:
    """Start copying a structure of NumPy arrays to the device; returns at once.

    Args:
        tree: The arrays.
        pin: Of no use here.

    Raises:
        DataError: An integer is too large: JAX would go on with another one.
    """
    if not jax.config.jax_enable_x64:
        for leaf in jax.tree.leaves(tree):
            if leaf.dtype.kind in "iu" and leaf.dtype.itemsize > 4:
                _check_range(leaf)
    return jax.device_put(tree)


def _check_range(array: np.ndarray) -> None:
    """Integers of 64 bits become integers of 32 bits on JAX, of which only the last ones stay."""
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
    """Start copying a structure of tensors to the host; the result waits for it and returns it."""
    for leaf in jax.tree.leaves(tree):
        leaf.copy_to_host_async()
    return lambda: jax.device_get(tree)


def host_view(value: Any) -> np.ndarray:
    """A variable's value on the host, in the variable's own memory where that is there."""
    return np.asarray(value)


def synchronize() -> None:
    """Wait until all computations that were started are done."""
    jax.block_until_ready(jnp.zeros(()) + 0)
    for device in jax.local_devices():
        device.synchronize_all_activity()


def rng_state() -> dict[str, np.ndarray]:
    """JAX has no random state of its own: all of it is in Keras' seed generators."""
    return {}


def set_rng_state(state: dict[str, np.ndarray]) -> None:
    """Restore what ``rng_state`` returned (nothing on this backend)."""


def devices() -> list[str]:
    """The devices of this process, as ``device_scope`` takes them."""
    platforms = dict.fromkeys([jax.devices()[0].platform, "cpu"])
    return [f"{p}:{d.id}" for p in platforms for d in jax.local_devices(backend=p)]


def _find(device: str) -> Any:
    platform, _, index = device.partition(":")
    return jax.local_devices(backend=platform)[int(index or 0)]


@contextlib.contextmanager
def device_scope(device: str | None) -> Iterator[None]:
    """New arrays go to ``device`` ("cpu", "gpu:1"), or to the default one."""
    if device is None:
        yield
        return
    with jax.default_device(_find(device)):
        yield


def place(variables: Sequence[keras.Variable], device: str | None) -> None:
    """Move the values of ``variables`` to ``device``; without one leave them.

    They are not bound to it: JAX would compile once for bound values and once more for those that
    are assigned later and are not, such as a metric's after a reset.
    """
    if device is None:
        return
    target = _find(device)
    with jax.default_device(target):
        for variable in variables:
            if variable.value.devices() != {target}:
                variable.assign(jnp.array(jax.device_get(variable.value)))


_options: dict[str, Any] | None = None


def compiler_options() -> dict[str, Any] | None:
    """Options for XLA that the steps compiled now get."""
    return _options


@contextlib.contextmanager
def numerics(tf32: bool | None, deterministic: bool) -> Iterator[None]:
    """Precision of float32 products, and kernels that give the same result each time.

    Args:
        tf32: Whether they may be computed in TensorFloat-32; None leaves JAX's setting.
        deterministic: Compile what is compiled inside without kernels whose results vary (there
            are some on GPUs).
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


def device_info(device: str | None = None) -> str:
    """The device in use, as a person would name it."""
    found = jax.devices()[0] if device is None else _find(device)
    return f"{found.platform}:{found.id} ({found.device_kind})"


def memory_stats() -> dict[str, int]:
    """Bytes in use and at the peak on the default device; empty where the device does not count."""
    stats = jax.devices()[0].memory_stats() or {}
    keys = {"bytes_in_use": "in_use", "peak_bytes_in_use": "peak"}
    return {new: int(stats[old]) for old, new in keys.items() if old in stats}


def is_oom(error: BaseException) -> bool:
    """Whether ``error`` says that the device ran out of memory."""
    named = isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
    return named or isinstance(error, MemoryError)


def free_memory() -> None:
    """Give memory that the C library holds for later back to the system, where it can do that."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)
