"""JAX: the profiler, and the operations in its traces."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from kbtrain.utils.files import chrome_trace
from kbtrain.utils.files.chrome_trace import Span

CONTAINERS = frozenset(["while", "conditional", "call", "async-start", "async-done", "copy-done"])
"""Operations of XLA that wait for others, whose time is counted by themselves."""


def start_profile(folder: Path) -> Callable[[], tuple[Path, list[Span]]]:
    """Start the profiler; the result stops it and returns its trace and the operations in it."""
    options: dict[str, Any] = {}
    if hasattr(jax.profiler, "ProfileOptions"):  # since JAX 0.7
        # An event for every Python call would hide the operations, and slow the step.
        options["profiler_options"] = jax.profiler.ProfileOptions()
        options["profiler_options"].python_tracer_level = 0
    jax.profiler.start_trace(str(folder), **options)

    def stop() -> tuple[Path, list[Span]]:
        jax.profiler.stop_trace()
        traces = sorted(folder.rglob("*.trace.json.gz"))
        if not traces:  # its other file is not read: JAX 0.12 aborts the process that asks for it
            raise FileNotFoundError(f"JAX {jax.__version__} has written no trace to {folder}")
        return traces[-1], operations(chrome_trace.read(traces[-1]))

    return stop


def operations(spans: list[Span]) -> list[Span]:
    """The operations of XLA in a trace: those of a device, if it was not the CPU.

    Operations are named as in the compiled module without their number: ``dot.3`` is a ``dot``.
    """
    found = [span for span in spans if "hlo_op" in span.args or "XLA Ops" in span.thread]
    if on_device := [span for span in found if span.process.startswith("/device:")]:
        # A TPU has them on one line; a GPU has what each stream ran, and lines derived from it.
        by_operation = [span for span in on_device if span.thread.startswith("XLA Ops")]
        streams = [span for span in on_device if span.thread.startswith("Stream")]
        found = streams or by_operation or on_device
    named = [
        (span, re.sub(r"\.\d+$", "", str(span.args.get("hlo_op", span.name)))) for span in found
    ]
    return [
        Span(name, span.start, span.duration, span.process, span.thread)
        for span, name in named
        if name not in CONTAINERS
    ]
