"""TensorBoard event files, written without TensorFlow or PyTorch."""

from __future__ import annotations

import contextlib
import json
import platform
import struct
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kbtrain.trackers.base import Tracker
from kbtrain.utils.best_effort import best_effort
from kbtrain.utils.packages.optional_imports import require

if TYPE_CHECKING:
    from kbtrain.config.training_args import TrainingArguments


class TensorBoardCallback(Tracker):
    """Write event files to ``{output_dir}/runs/{run_name or time_host}`` (extra ``tensorboard``).

    A resumed run continues in its folder; TensorBoard shows the last value of each step.
    """

    stays_open = False

    def __init__(self) -> None:
        super().__init__()
        self._library = require("tensorboardX", "tensorboard", "report_to='tensorboard'")
        # Not SummaryWriter: it passes events to a thread through a queue, and its flush() does not
        # wait for them, so the last logs are lost when the process ends.
        self._events = require("tensorboardX.proto.event_pb2", "tensorboard", "TensorBoard")
        self._summary = require("tensorboardX.summary", "tensorboard", "TensorBoard")
        self._protocol = require("tensorboardX.proto.summary_pb2", "tensorboard", "TensorBoard")
        self._writer: Any = None

    def open(self, args: TrainingArguments, trainer: Any) -> None:
        """Start an event file; the first one of a run also has the settings as text."""
        now, host, fresh = time.time(), platform.node(), self.run is None
        if fresh:
            self.run = args.run_name or f"{time.strftime('%b%d_%H-%M-%S')}_{host}"
        folder = args.output_folder / "runs" / self.run
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(now)}.{host}.{time.time_ns()}"
        self._writer = self._library.RecordWriter(str(folder / name))
        self._add(file_version="brain.Event:2")
        if fresh:
            settings = json.dumps(args.to_dict(), indent=2)
            self._add(summary=self._summary.text("args", f"```json\n{settings}\n```"))

    def write(self, values: dict[str, float], step: int) -> None:
        """Write one scalar for each value."""
        for name, value in values.items():
            self._add(summary=self._summary.scalar(name, value), step=step)

    @best_effort
    def write_histograms(self, histograms: Mapping[str, tuple[Any, Any]], step: int) -> None:
        """Write histograms.

        Args:
            histograms: Name -> counts and edges, NumPy arrays.
            step: Updates done.
        """
        if not self._is_open:
            return
        for name, (counts, edges) in histograms.items():
            middle = (edges[:-1] + edges[1:]) / 2
            self._add(
                summary=self._summary.histogram_raw(
                    name,
                    float(edges[0]),
                    float(edges[-1]),
                    int(counts.sum()),
                    float((counts * middle).sum()),
                    float((counts * middle**2).sum()),
                    edges[1:].tolist(),
                    counts.tolist(),
                ),
                step=step,
            )

    @best_effort
    def write_text(self, name: str, text: str, step: int) -> None:
        """Write a text, in Markdown."""
        if self._is_open:
            self._add(summary=self._summary.text(name, text), step=step)

    @best_effort
    def write_pictures(self, name: str, pictures: Sequence[tuple[str, bytes]], step: int) -> None:
        """Write pictures.

        Args:
            name: Their group.
            pictures: Pairs of a caption and a PNG file, in order.
            step: Updates done.
        """
        if not self._is_open:
            return
        values = []
        for i, (caption, file) in enumerate(pictures):
            width, height = struct.unpack(">II", file[16:24])
            image = self._protocol.Summary.Image(
                height=height, width=width, colorspace=3, encoded_image_string=file
            )
            metadata = self._protocol.SummaryMetadata(summary_description=caption)
            values.append(
                self._protocol.Summary.Value(tag=f"{name}/{i}", image=image, metadata=metadata)
            )
        self._add(summary=self._protocol.Summary(value=values), step=step)

    def finish(self, completed: bool) -> None:
        """Close the event file."""
        self._writer.close()

    def _add(self, **content: Any) -> None:
        event = self._events.Event(wall_time=time.time(), **content)
        try:
            self._writer.write(event.SerializeToString())
            self._writer.flush()
        except OSError:
            # Readers stop at an incomplete record, so the next log starts a new file.
            self._is_open = False
            with contextlib.suppress(OSError):
                self._writer.close()
            raise
