"""PyTorch: the profiler, and the operations in its traces."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from kbtrain.utils.files import chrome_trace
from kbtrain.utils.files.chrome_trace import Span

ON_DEVICE = frozenset(["kernel", "gpu_memcpy", "gpu_memset"])
"""Categories of what a GPU runs."""


def start_profile(folder: Path) -> Callable[[], tuple[Path, list[Span]]]:
    """Start the profiler; the result stops it and returns its trace and the operations in it.

    Raises:
        RuntimeError: A profiler is active: PyTorch would start a second one, and end in a crash.
    """
    if is_active():
        raise RuntimeError("another PyTorch profiler is active")
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    profiler = torch.profiler.profile(activities=kinds)
    with _without_notices():
        profiler.start()

    def stop() -> tuple[Path, list[Span]]:
        with _without_notices():
            profiler.stop()
        path = folder / "kbtrain.pt.trace.json.gz"  # TensorBoard's plugin looks for this ending
        profiler.export_chrome_trace(str(path))
        return path, operations(chrome_trace.read(path))

    return stop


def is_active() -> bool:
    """Whether a profiler of PyTorch is recording, in this thread or, if it says so, in another."""
    in_thread = getattr(torch.autograd, "_profiler_enabled", None)
    anywhere = getattr(torch.autograd.profiler, "_is_profiler_enabled", False)
    return bool(anywhere) or (in_thread is not None and bool(in_thread()))


def operations(spans: list[Span]) -> list[Span]:
    """What a GPU ran, in a trace; without one, the operations on the CPU."""
    on_device = [span for span in spans if span.category in ON_DEVICE]
    return on_device or [span for span in spans if span.category == "cpu_op"]


@contextlib.contextmanager
def _without_notices() -> Iterator[None]:
    """Context that drops the lines that PyTorch's profiler itself writes to stderr.

    They come from C++, whatever its log level, and would break a progress bar. Other lines are
    written afterwards.
    """
    try:
        before = os.dup(2)
    except OSError:  # there is no stderr
        yield
        return
    with tempfile.TemporaryFile() as kept:
        os.dup2(kept.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(before, 2)
            os.close(before)
            kept.seek(0)
            lines = [line for line in kept if not line.startswith(b"USDT:")]
            with contextlib.suppress(OSError):
                os.write(2, b"".join(lines))
