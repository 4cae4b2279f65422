"""PyTorch: data to the device and back, random state, devices, precision, memory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import torch


def ragged(dense: Any, lengths: Sequence[Any]) -> Any:
    """There is none here: data with ragged tensors is refused before a step is made."""
    raise NotImplementedError("PyTorch has no ragged tensors that Keras could use.")


def to_device(tree: Any, pin: bool = False) -> Any:
    """Copy a structure of NumPy arrays to the device.

    Args:
        tree: The arrays.
        pin: For a GPU, copy from page-locked memory: the host does not wait for the copy.
    """
    device = _device()
    pin = pin and device.type == "cuda"

    def to_tensor(x: Any) -> Any:
        array = np.asarray(x)
        if not array.flags.writeable:  # torch shares the memory, and has no read-only tensors
            array = array.copy()
        tensor = torch.from_numpy(array)
        return (tensor.pin_memory() if pin else tensor).to(device, non_blocking=True)

    return keras.tree.map_structure(to_tensor, tree)


def _device() -> torch.device:
    return torch.as_tensor(keras.ops.zeros(())).device


def to_host(tree: Any) -> Any:
    """Wait for a structure of tensors and return it as NumPy arrays."""
    return keras.tree.map_structure(keras.ops.convert_to_numpy, tree)


def start_to_host(tree: Any) -> Callable[[], Any]:
    """Start copying a structure of tensors to the host; the result waits for it and returns it.

    On a GPU the copy is queued before whatever is started next, so that it does not wait for that.
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
    """A variable's value on the host, in the variable's own memory where that is there."""
    result: np.ndarray = keras.ops.convert_to_numpy(value)
    return result


def synchronize() -> None:
    """Wait until all computations that were started are done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def rng_state() -> dict[str, np.ndarray]:
    """The state of torch's generators (a Keras layer without a seed draws from them)."""
    state = {"cpu": torch.get_rng_state().numpy()}
    if torch.cuda.is_available():
        state |= {f"cuda_{i}": s.numpy() for i, s in enumerate(torch.cuda.get_rng_state_all())}
    return state


def set_rng_state(state: dict[str, np.ndarray]) -> None:
    """Restore what ``rng_state`` returned; a checkpoint of another backend has nothing for us."""
    if "cpu" in state:
        torch.set_rng_state(torch.from_numpy(np.array(state["cpu"])))
    for i in range(torch.cuda.device_count()):
        if f"cuda_{i}" in state:
            torch.cuda.set_rng_state(torch.from_numpy(np.array(state[f"cuda_{i}"])), i)


def devices() -> list[str]:
    """The devices of this process, as ``device_scope`` takes them."""
    return [*(f"gpu:{i}" for i in range(torch.cuda.device_count())), "cpu:0"]


def _named(device: str) -> str:
    platform, _, index = device.partition(":")
    return "cpu" if platform == "cpu" else f"cuda:{index or 0}"


@contextlib.contextmanager
def device_scope(device: str | None) -> Iterator[None]:
    """New tensors go to ``device`` ("cpu", "gpu:1"), or to the default one."""
    if device is None:
        yield
        return
    with keras.device(_named(device)):
        yield


def place(variables: Sequence[keras.Variable], device: str | None) -> None:
    """Move the values of ``variables`` to ``device``; without one leave them."""
    if device is None:
        return
    target = torch.device(_named(device))
    for variable in variables:
        if variable.value.device != target:
            variable.value.data = variable.value.data.to(target)


@contextlib.contextmanager
def numerics(tf32: bool | None, deterministic: bool) -> Iterator[None]:
    """Precision of float32 products, and kernels that give the same result each time.

    Args:
        tf32: Whether they may be computed in TensorFloat-32; None leaves torch's setting.
        deterministic: Operations without such a kernel raise an error.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark
    was = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    if tf32 is not None:
        matmul.allow_tf32 = cudnn.allow_tf32 = tf32
    if deterministic:
        # cuBLAS reads it when it is used for the first time.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was, warn_only=warned)
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark = before


def device_info(device: str | None = None) -> str:
    """The device in use, as a person would name it."""
    found = _device() if device is None else torch.device(_named(device))
    if found.type != "cuda":
        return str(found)
    return f"{found} ({torch.cuda.get_device_name(found)})"


def memory_stats() -> dict[str, int]:
    """Bytes in use and at the peak on the GPU; empty on the CPU, which does not count."""
    if not torch.cuda.is_available():
        return {}
    return {
        "in_use": int(torch.cuda.memory_allocated()),
        "peak": int(torch.cuda.max_memory_allocated()),
    }


def is_oom(error: BaseException) -> bool:
    """Whether ``error`` says that the device ran out of memory."""
    # Keras gives errors of layers another class, with the text of the original in it.
    texts = ("out of memory", "allocate memory", "you tried to allocate")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
    )


def free_memory() -> None:
    """Give memory that is held for later back to the device."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
