"""PyTorch: the profiler, and the operations in its traces."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from kbtrain.utils import chrome_trace
from kbtrain.utils.chrome_trace import Span

ON_DEVICE = frozenset(["kernel", "gpu_memcpy", "gpu_memset"])
"""Categories of what a GPU runs."""


def start_profile(folder: Path) -> Callable[[], tuple[Path, list[Span]]]:
    """Start the profiler; the result stops it and returns its trace and the operations in it."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    profiler = torch.profiler.profile(activities=kinds)
    profiler.start()

    def stop() -> tuple[Path, list[Span]]:
        profiler.stop()
        path = folder / "kbtrain.pt.trace.json.gz"  # TensorBoard's plugin looks for this ending
        profiler.export_chrome_trace(str(path))
        return path, operations(chrome_trace.read(path))

    return stop


def operations(spans: list[Span]) -> list[Span]:
    """What a GPU ran, in a trace; without one, the operations on the CPU."""
    on_device = [span for span in spans if span.category in ON_DEVICE]
    return on_device or [span for span in spans if span.category == "cpu_op"]
