"""The machine and its state, and what it can do at best."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Callable
from typing import Any

from on_gpu.rows import Reporter, Settings

PACKAGES = (
    "keras", "numpy", "torch", "triton", "jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin",
    "tensorflow", "optax", "transformers", "lightning",
)  # fmt: skip

STATE = (
    "name", "driver_version", "vbios_version", "memory.total", "memory.used", "clocks.sm",
    "clocks.mem", "clocks.max.sm", "clocks_throttle_reasons.active", "power.draw", "power.limit",
    "temperature.gpu", "utilization.gpu", "ecc.mode.current", "mig.mode.current", "compute_mode",
)  # fmt: skip


def reason_not_to_run(settings: Settings) -> str | None:
    """Why no part can run on this backend; None if it sees the device that is wanted."""
    import keras

    from kbtrain import backends

    names = backends.load().devices()
    if not settings.on_gpu or any(name.startswith("gpu") for name in names):
        return None
    return f"{keras.backend.backend()} sees no GPU, only {', '.join(names)}"


def machine(report: Reporter) -> None:
    """Versions, the state of the GPUs, and the ceilings that other figures are held against."""
    report.row("versions", versions())
    report.attempt("nvidia-smi", gpus)
    report.attempt("copy", lambda: copy(report.settings))
    report.attempt("product in bf16", lambda: product(report.settings))
    report.attempt("launches", lambda: launches(report.settings))
    report.attempt("nvidia-smi, after load", gpus)


def versions() -> dict[str, Any]:
    """Versions of the packages, of Python and of the system."""
    found: dict[str, Any] = {"python": platform.python_version(), "system": platform.platform()}
    found |= {"machine": platform.machine(), "processors": os.cpu_count()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if "torch" in found:
        torch = importlib.import_module("torch")
        found["cuda of torch"] = torch.version.cuda
        found["cudnn of torch"] = torch.backends.cudnn.version()
    return found


def gpus() -> dict[str, Any]:
    """What the driver says about each GPU; a field that it does not know is left out."""
    found: dict[str, Any] = {}
    for name in STATE:
        command = ["nvidia-smi", f"--query-gpu={name}", "--format=csv,noheader"]
        try:
            result = subprocess.run(command, capture_output=True, text=True, timeout=20)
        except OSError:
            return {"nvidia-smi": "is not there"}
        if result.returncode == 0:
            values = result.stdout.strip().splitlines()
            found[name] = values[0] if len(values) == 1 else values
    return found


def timed(run: Callable[[], Any], repeats: int, on_gpu: bool) -> float:
    """Seconds per call, on a GPU by its own clock."""
    import torch

    for _ in range(3):
        run()
    if not on_gpu:
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        return (time.perf_counter() - start) / repeats
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(repeats):
        run()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) / 1e3 / repeats


def copy(settings: Settings) -> dict[str, Any]:
    """Bytes per second of a copy on the device, read and written."""
    import torch

    size = 1 << 30 if settings.on_gpu and not settings.tiny else 1 << 16
    source = torch.randn(size, device="cuda" if settings.on_gpu else "cpu")
    target = torch.empty_like(source)
    seconds = timed(lambda: target.copy_(source), 10, settings.on_gpu)
    return {"TB/s": 2 * source.nbytes / seconds / 1e12}


def product(settings: Settings) -> dict[str, Any]:
    """Operations per second of a large product of matrices."""
    import torch

    size = 8192 if settings.on_gpu and not settings.tiny else 64
    device = "cuda" if settings.on_gpu else "cpu"
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = timed(lambda: a @ b, 10, settings.on_gpu)
    return {"TFLOP/s": 2 * size**3 / seconds / 1e12}


def launches(settings: Settings) -> dict[str, Any]:
    """Microseconds of the smallest kernel, launched one by one and as part of a graph."""
    import torch

    count = 300
    number = torch.zeros(1, device="cuda" if settings.on_gpu else "cpu")
    found = {"us, eager": timed(lambda: number.add_(1), count, settings.on_gpu) * 1e6}
    if settings.on_gpu:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(count):
                number.add_(1)
        found["us, in a graph"] = timed(graph.replay, 20, True) * 1e6 / count
    return found
