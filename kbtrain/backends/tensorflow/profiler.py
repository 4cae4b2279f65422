"""TensorFlow: the profiler, and the operations in its traces."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tensorflow as tf

from kbtrain.utils.files import chrome_trace
from kbtrain.utils.files.chrome_trace import Span

CONTAINERS = frozenset(
    ["while", "conditional", "call", "PartitionedCall", "StatefulPartitionedCall", "While"]
    + ["StatelessWhile", "If", "StatelessIf", "Case", "XlaLaunch", "XlaRun", "_XlaRun"]
)
"""Operations that wait for others, whose time is counted by themselves."""


def start_profile(folder: Path) -> Callable[[], tuple[Path, list[Span]]]:
    """Start the profiler; the result stops it and returns its trace and the operations in it."""
    tf.profiler.experimental.start(str(folder))

    def stop() -> tuple[Path, list[Span]]:
        tf.profiler.experimental.stop()
        recorded = max(folder.rglob("*.xplane.pb"))
        spans = _spans(recorded.read_bytes())
        path = recorded.with_name(recorded.name.replace(".xplane.pb", ".trace.json.gz"))
        if not path.exists():  # TensorFlow wrote it up to 2.18
            chrome_trace.write(path, spans)
        return path, operations(spans)

    return stop


def _spans(data: bytes) -> list[Span]:
    """The events of an XSpace, the file that TensorFlow's profiler writes."""
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    space = xplane_pb2.XSpace()
    space.ParseFromString(data)
    spans = []
    for plane in space.planes:
        names = {number: meta.name for number, meta in plane.stat_metadata.items()}
        for line in plane.lines:
            thread = line.display_name or line.name or str(line.id)
            for event in line.events:
                meta = plane.event_metadata[event.metadata_id]
                args = {"op": meta.display_name} if meta.display_name else {}
                for stat in event.stats:
                    if names.get(stat.metadata_id) == "hlo_op":
                        args["hlo_op"] = _text(stat, names)
                start = line.timestamp_ns / 1e3 + event.offset_ps / 1e6
                duration = event.duration_ps / 1e6
                spans.append(Span(meta.name, start, duration, plane.name, thread, "", args))
    return spans


def _text(stat: Any, names: dict[int, str]) -> str:
    return stat.str_value or names.get(stat.ref_value, "")


def operations(spans: list[Span]) -> list[Span]:
    """The operations in a trace: those of a device, if it was not the CPU.

    Under XLA they are named as in the compiled module, without their number; in a graph they have
    the name of their kind.
    """
    if on_device := [s for s in spans if s.process.startswith("/device:")]:
        found = [(span, span.name) for span in on_device if span.thread.startswith("Stream")]
        found = found or [(span, span.name) for span in on_device]
    else:
        found = [(span, name) for span in spans if (name := _operation(span))]
    return [
        Span(name, span.start, span.duration, span.process, span.thread)
        for span, name in found
        if name not in CONTAINERS
    ]


def _operation(span: Span) -> str:
    """The kind of an operation on the CPU; empty if the span is none."""
    if "hlo_op" in span.args:
        return re.sub(r"\.\d+$", "", str(span.args["hlo_op"]))
    kind = str(span.args.get("op", ""))  # the name of the span is "name:kind"
    is_function = kind.startswith("__") or kind not in tf.raw_ops.__dict__ and kind[:1] != "_"
    return "" if not kind or is_function or not span.name.endswith(f":{kind}") else kind
