"""PyTorch: data to the device and back, random state, devices, precision, memory."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import torch

from kbtrain.backends.memory_errors import says_out_of_memory
from kbtrain.backends.protocol import StateLayout
from kbtrain.backends.rows import own_share
from kbtrain.backends.torch import float32_precision
from kbtrain.errors import ConfigurationError

logger = logging.getLogger("kbtrain")

_NOT_DETERMINISTIC = re.compile(r"(\S+) does not have a deterministic implementation")

CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
"""The variable of the environment without which cuBLAS is not deterministic."""


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
    with _current(device) if pin else contextlib.nullcontext():  # pins for the current device
        return keras.tree.map_structure(lambda x: on_device(x, device, pin), own_share(tree))


def on_device(x: Any, device: torch.device | None = None, pin: bool = False) -> torch.Tensor:
    """A NumPy array as a tensor on a device, or on the default one."""
    array, target = np.asarray(x), device or _device()
    if target.type == "mps" and array.dtype == np.float64:  # which Apple's GPUs do not have
        array = array.astype(np.float32)
    if not array.flags.writeable:  # torch shares the memory but has no read-only tensors
        array = array.copy()
    tensor = torch.from_numpy(array)
    return (tensor.pin_memory() if pin else tensor).to(target, non_blocking=True)


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
    devices = dict.fromkeys(leaf.device for leaf in leaves if leaf.is_cuda)
    if not devices:
        return lambda: to_host(tree)
    copies = [leaf.detach().to("cpu", non_blocking=True) for leaf in leaves]
    events = []
    for device in devices:
        # An event belongs to the device that is current when it is recorded; Keras' device scope
        # does not change which one that is.
        with torch.cuda.device(device):
            done = torch.cuda.Event()
            done.record(torch.cuda.current_stream(device))
        events.append(done)

    def wait() -> Any:
        for event in events:
            event.synchronize()
        return to_host(keras.tree.pack_sequence_as(tree, copies))

    return wait


def host_view(value: Any) -> np.ndarray:
    """A read-only view of a variable's value on the host, without a copy if possible."""
    result: np.ndarray = keras.ops.convert_to_numpy(value)
    return result


def synchronize() -> None:
    """Wait for all pending computations on the device in use."""
    if (device := accelerator()) is not None:
        module = torch.get_device_module(device)
        module.synchronize() if device.type == "mps" else module.synchronize(device)


def accelerator() -> torch.device | None:
    """The device in use, unless it is the CPU."""
    device = _device()
    return None if device.type in ("cpu", "meta") else device


def rng_state() -> dict[str, np.ndarray]:
    """The state of torch's generators, which Keras layers without a seed use."""
    state = {"cpu": torch.get_rng_state().numpy()}
    if torch.cuda.is_initialized():  # or a run on the CPU would take memory of a GPU
        state |= {f"cuda_{i}": s.numpy() for i, s in enumerate(torch.cuda.get_rng_state_all())}
    if (device := accelerator()) is not None:
        state["device"] = accelerator_rng_state(device).numpy()
    return state


def set_rng_state(state: dict[str, np.ndarray]) -> None:
    """Restore the result of ``rng_state``; that of another backend is ignored."""
    if "cpu" in state:
        torch.set_rng_state(torch.from_numpy(np.array(state["cpu"])))
    for i in range(torch.cuda.device_count()):
        if f"cuda_{i}" in state:
            torch.cuda.set_rng_state(torch.from_numpy(np.array(state[f"cuda_{i}"])), i)
    # Last, as a run may continue on another GPU than it began on. Generators of different kinds of
    # devices have states of different sizes.
    device = accelerator()
    if device is not None and "device" in state:
        saved = torch.from_numpy(np.array(state["device"]))
        if saved.shape == accelerator_rng_state(device).shape:
            set_accelerator_rng_state(saved, device)


def accelerator_rng_state(device: torch.device) -> torch.Tensor:
    """The state of the generator of a device that is not the CPU."""
    module = torch.get_device_module(device)
    result: torch.Tensor = (
        module.get_rng_state() if device.type == "mps" else module.get_rng_state(device)
    )
    return result


def set_accelerator_rng_state(state: torch.Tensor, device: torch.device) -> None:
    """Restore the result of ``accelerator_rng_state``."""
    module = torch.get_device_module(device)
    if device.type == "mps":
        module.set_rng_state(state)
    else:
        module.set_rng_state(state, device)


def _kind() -> str | None:
    """What PyTorch calls this machine's accelerators: "cuda", "mps", "xpu"; None without any."""
    if torch.cuda.is_available():
        return "cuda"
    found = torch.accelerator.current_accelerator(check_available=True)
    return None if found is None else str(found.type)


def devices() -> list[str]:
    """The devices of this process, by the names that ``device_scope`` takes."""
    kind = _kind()
    count = 0 if kind is None else torch.get_device_module(kind).device_count()
    return [*(f"gpu:{i}" for i in range(count)), "cpu:0"]


def _named(device: str) -> str:
    platform, _, index = device.partition(":")
    return "cpu" if platform == "cpu" else f"{_kind() or 'cuda'}:{index or 0}"


@contextlib.contextmanager
def device_scope(device: str | None, layout: StateLayout | None = None) -> Iterator[None]:
    """Context in which new tensors are placed on ``device`` ("cpu", "gpu:1") or the default."""
    if device is None:
        yield
        return
    name = torch.device(_named(device))
    with keras.device(str(name)), _current(name):
        yield


def _current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Context in which ``device`` is the current one, for calls that name none."""
    if device.type in ("cpu", "mps"):
        return contextlib.nullcontext()
    result: contextlib.AbstractContextManager[Any] = torch.get_device_module(device).device(device)
    return result


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

    Raises:
        ConfigurationError: There was such an operation.
    """
    cudnn = torch.backends.cudnn
    with float32_precision.allowing(tf32):
        if not deterministic:
            yield
            return
        flags = cudnn.deterministic, cudnn.benchmark
        was = torch.are_deterministic_algorithms_enabled()
        warned = torch.is_deterministic_algorithms_warn_only_enabled()
        _set_cublas_workspace()
        torch.use_deterministic_algorithms(True)
        cudnn.deterministic, cudnn.benchmark = True, False
        try:
            yield
        except RuntimeError as error:
            if (operation := _NOT_DETERMINISTIC.search(str(error))) is None:
                raise
            raise ConfigurationError(
                f"full_determinism=True, and PyTorch has no deterministic kernel for "
                f"{operation[1]} on this device. Replace the layer that uses it, or write "
                "full_determinism=False: two runs then differ in the last digits."
            ) from error
        finally:
            torch.use_deterministic_algorithms(was, warn_only=warned)
            cudnn.deterministic, cudnn.benchmark = flags


def _set_cublas_workspace() -> None:
    """Ask for a workspace with which cuBLAS is deterministic; it reads the variable once."""
    if CUBLAS_WORKSPACE in os.environ:
        return
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        logger.warning(
            "full_determinism: the GPU was in use before %s was set, and cuBLAS reads it only "
            "once. To be certain of the same numbers in every run, start the program with "
            "%s=:4096:8 in its environment.",
            CUBLAS_WORKSPACE,
            CUBLAS_WORKSPACE,
        )
    os.environ[CUBLAS_WORKSPACE] = ":4096:8"


def device_info(device: str | None = None) -> str:
    """A readable name of the device in use."""
    found = _device() if device is None else torch.device(_named(device))
    if found.type not in ("cuda", "xpu"):
        return str(found)
    return f"{found} ({torch.get_device_module(found).get_device_name(found)})"


def memory_stats() -> dict[str, int]:
    """Bytes in use and at the peak on the GPU in use; empty where there are no counters."""
    device = accelerator()
    if device is None or device.type not in ("cuda", "xpu"):
        return {}
    in_use = int(torch.get_device_module(device).memory_allocated(device))
    return {"in_use": in_use, "peak": max(peak_memory(device), _earlier_peaks.get(device, 0))}


_earlier_peaks: dict[torch.device, int] = {}
"""Peaks before the counter of a device was reset."""


def peak_memory(device: torch.device) -> int:
    """The most bytes in use on a GPU since ``reset_peak_memory``."""
    return int(torch.get_device_module(device).max_memory_allocated(device))


def reset_peak_memory(device: torch.device) -> None:
    """Count from now on; ``memory_stats`` continues with what was counted before."""
    _earlier_peaks[device] = max(peak_memory(device), _earlier_peaks.get(device, 0))
    torch.get_device_module(device).reset_peak_memory_stats(device)


def prepare() -> None:
    """Do nothing: memory grows with its use, and ``torch.compile`` keeps what it has compiled."""


def is_oom(error: BaseException) -> bool:
    """Whether ``error`` means that the device ran out of memory."""
    # Keras rewraps errors of layers in another class, keeping the original message.
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and says_out_of_memory(error)
    )


def free_memory() -> None:
    """Release cached memory."""
    if (device := accelerator()) is not None:
        torch.get_device_module(device).empty_cache()
