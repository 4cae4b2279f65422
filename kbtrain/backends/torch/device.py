"""PyTorch: data to the device and back, random state, devices, precision, memory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import torch

from kbtrain.backends.protocol import StateLayout
from kbtrain.backends.torch.processes import take_rows


def ragged(dense: Any, lengths: Sequence[Any]) -> Any:
    """Not available: data with ragged tensors is rejected earlier."""
    raise NotImplementedError("PyTorch has no ragged tensors that Keras could use.")


def to_device(tree: Any, pin: bool = False) -> Any:
    """Copy a structure of NumPy arrays to the device.

    Args:
        tree: The arrays; of batches with rows for several processes this one takes its own.
        pin: Whether to copy to a GPU from page-locked memory, so that the host does not wait.
    """
    device = _device()
    pin = pin and device.type == "cuda"
    return keras.tree.map_structure(lambda x: on_device(x, device, pin), take_rows(tree))


def on_device(x: Any, device: torch.device | None = None, pin: bool = False) -> torch.Tensor:
    """A NumPy array as a tensor on a device, or on the default one."""
    array = np.asarray(x)
    if not array.flags.writeable:  # torch shares the memory but has no read-only tensors
        array = array.copy()
    tensor = torch.from_numpy(array)
    return (tensor.pin_memory() if pin else tensor).to(device or _device(), non_blocking=True)


def _device() -> torch.device:
    return torch.as_tensor(keras.ops.zeros(())).device


def to_host(tree: Any) -> Any:
    """Wait for a structure of tensors and return it as NumPy arrays."""
    return keras.tree.map_structure(keras.ops.convert_to_numpy, tree)


def start_to_host(tree: Any) -> Callable[[], Any]:
    """Start copying tensors to the host; return a function that waits for the result.

    On a GPU the copy is queued before any later work, so that it does not wait for that work.
    """
    leaves = keras.tree.flatten(tree)
    if not any(leaf.is_cuda for leaf in leaves):
        return lambda: to_host(tree)
    copies = [leaf.detach().to("cpu", non_blocking=True) for leaf in leaves]
    done = torch.cuda.Event()
    done.record()

    def wait() -> Any:
        done.synchronize()
        return to_host(keras.tree.pack_sequence_as(tree, copies))

    return wait


def host_view(value: Any) -> np.ndarray:
    """A read-only view of a variable's value on the host, without a copy if possible."""
    result: np.ndarray = keras.ops.convert_to_numpy(value)
    return result


def synchronize() -> None:
    """Wait for all pending computations."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def rng_state() -> dict[str, np.ndarray]:
    """The state of torch's generators, which Keras layers without a seed use."""
    state = {"cpu": torch.get_rng_state().numpy()}
    if torch.cuda.is_available():
        state |= {f"cuda_{i}": s.numpy() for i, s in enumerate(torch.cuda.get_rng_state_all())}
    return state


def set_rng_state(state: dict[str, np.ndarray]) -> None:
    """Restore the result of ``rng_state``; that of another backend is ignored."""
    if "cpu" in state:
        torch.set_rng_state(torch.from_numpy(np.array(state["cpu"])))
    for i in range(torch.cuda.device_count()):
        if f"cuda_{i}" in state:
            torch.cuda.set_rng_state(torch.from_numpy(np.array(state[f"cuda_{i}"])), i)


def devices() -> list[str]:
    """The devices of this process, by the names that ``device_scope`` takes."""
    return [*(f"gpu:{i}" for i in range(torch.cuda.device_count())), "cpu:0"]


def _named(device: str) -> str:
    platform, _, index = device.partition(":")
    return "cpu" if platform == "cpu" else f"cuda:{index or 0}"


@contextlib.contextmanager
def device_scope(device: str | None, layout: StateLayout | None = None) -> Iterator[None]:
    """Context in which new tensors are placed on ``device`` ("cpu", "gpu:1") or the default."""
    if device is None:
        yield
        return
    with keras.device(_named(device)):
        yield


def initializing() -> contextlib.AbstractContextManager[None]:
    """Context in which variables are created: they are whole on this backend."""
    return contextlib.nullcontext()


def place(variables: Sequence[keras.Variable], device: str | None) -> None:
    """Move the values of ``variables`` to ``device``; do nothing if it is None."""
    if device is None:
        return
    target = torch.device(_named(device))
    for variable in variables:
        if variable.value.device != target:
            variable.value.data = variable.value.data.to(target)


@contextlib.contextmanager
def numerics(tf32: bool | None, deterministic: bool) -> Iterator[None]:
    """Context that sets the precision of float32 products, and deterministic kernels.

    Args:
        tf32: Whether products may use TensorFloat-32; None keeps torch's setting.
        deterministic: Whether operations without a deterministic kernel raise an error.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark
    was = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    if tf32 is not None:
        matmul.allow_tf32 = cudnn.allow_tf32 = tf32
    if deterministic:
        # cuBLAS reads it on its first use.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was, warn_only=warned)
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark = before


def device_info(device: str | None = None) -> str:
    """A readable name of the device in use."""
    found = _device() if device is None else torch.device(_named(device))
    if found.type != "cuda":
        return str(found)
    return f"{found} ({torch.cuda.get_device_name(found)})"


def memory_stats() -> dict[str, int]:
    """Bytes in use and at the peak on the GPU; empty on the CPU, which has no counters."""
    if not torch.cuda.is_available():
        return {}
    return {
        "in_use": int(torch.cuda.memory_allocated()),
        "peak": int(torch.cuda.max_memory_allocated()),
    }


def is_oom(error: BaseException) -> bool:
    """Whether ``error`` means that the device ran out of memory."""
    # Keras rewraps errors of layers in another class, keeping the original message.
    texts = ("out of memory", "allocate memory", "you tried to allocate")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
    )


def free_memory() -> None:
    """Release cached memory."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
