"""Histograms of weights and gradients, for TensorBoard and the report."""

from __future__ import annotations

import html
import logging
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from kbtrain.callbacks.base import TrainerCallback
from kbtrain.callbacks.library.gradients import GradientProbe, newest_batches
from kbtrain.callbacks.library.report_section import add_section
from kbtrain.callbacks.library.schedule import check_count, warn_without_logs
from kbtrain.callbacks.state import TrainerControl, TrainerState
from kbtrain.errors import ConfigurationError

logger = logging.getLogger("kbtrain")

BINS = 30
SHOWN = 60
"""Variables shown in the report at most."""


class HistogramCallback(TrainerCallback):
    """Histograms of trainable weights, and of gradients of the newest batch, at every N-th log.

    They go to TensorBoard (``report_to="tensorboard"``: the tab "Histograms") and to the report of
    the run, where the newest ones are shown. Values are copied to the host for it, gradients are
    computed beside the training; nothing is read in other updates.

    Args:
        every: Logs from one set of histograms to the next.
        weights: Whether to show weights.
        gradients: Whether to show gradients; not with a ``train_step`` of the model's own.
        pattern: Regular expression that the paths of the variables contain.

    Raises:
        ConfigurationError: An argument is invalid, or no variable has such a path.

    Attributes:
        newest: Name -> (counts, edges) of the newest histograms.
    """

    every_step = False
    decides_alike = True

    def __init__(
        self, every: int = 10, weights: bool = True, gradients: bool = False, pattern: str = ""
    ) -> None:
        self.every = check_count(every, "every", "HistogramCallback", 1)
        try:
            self.pattern = re.compile(pattern)
        except re.error as error:
            raise ConfigurationError(
                f"HistogramCallback: pattern={pattern!r} is not a regular expression ({error})."
            ) from None
        self.weights, self.gradients = weights, gradients
        self.newest: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._probe: GradientProbe | None = None
        self._logs = 0

    def on_train_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check the pattern, and that gradients can be had."""
        trainer = kwargs["trainer"]
        if not any(self.pattern.search(v.path) for v in trainer.model.trainable_variables):
            paths = [v.path for v in trainer.model.trainable_variables]
            raise ConfigurationError(
                f"HistogramCallback: pattern={self.pattern.pattern!r} is in no path of a trainable "
                f"variable: {', '.join(paths[:8])}{', ...' if len(paths) > 8 else ''}."
            )
        self._probe = GradientProbe(trainer, "HistogramCallback") if self.gradients else None
        warn_without_logs("HistogramCallback", args, state)

    def log_values(self, trainer: Any) -> dict[str, float]:
        """Make histograms where they are due; a log gets no value from them."""
        self._logs += 1
        if (self._logs - 1) % self.every:
            return {}
        found: dict[str, np.ndarray] = {}
        batches = newest_batches(trainer)
        if self._probe is not None and batches:  # on every process, as they compute it together
            gradients = self._probe(batches[-1])
            found |= {f"gradients/{n}": g for n, g in gradients.items() if self.pattern.search(n)}
        if not trainer.is_world_process_zero():
            return {}
        if self.weights:
            found |= {
                f"weights/{v.path}": trainer.backend.to_host(v.value)
                for v in trainer.model.trainable_variables
                if self.pattern.search(v.path)
            }
        self.newest = {name: histogram(values) for name, values in found.items()}
        step = trainer.state.global_step
        for callback in trainer.callback_handler.callbacks:
            if write := getattr(callback, "write_histograms", None):
                write(self.newest, step)
        add_section(trainer, "Weights and gradients", _page(self.newest, step))
        return {}


def histogram(values: Any) -> tuple[np.ndarray, np.ndarray]:
    """Counts and edges of the finite values, over their range."""
    flat = np.asarray(values, np.float64).ravel()
    counts, edges = np.histogram(flat[np.isfinite(flat)], BINS)
    return counts, edges


def _page(found: Mapping[str, tuple[np.ndarray, np.ndarray]], step: int) -> str:
    rows = []
    for name, (counts, edges) in list(found.items())[:SHOWN]:
        top = max(int(counts.max()), 1)
        bars = "".join(
            f'<rect x="{4 * i}" width="3.5" y="{30 - height:.1f}" height="{height:.1f}"/>'
            for i, height in enumerate((30 * counts / top).tolist())
        )
        rows.append(
            f"<tr><td>{html.escape(name)}</td><td>{edges[0]:.3g}</td>"
            f'<td><svg viewBox="0 0 {4 * len(counts)} 30" width="{4 * len(counts)}" height="30" '
            f'fill="currentColor" role="img" aria-label="histogram">{bars}</svg></td>'
            f"<td>{edges[-1]:.3g}</td></tr>"
        )
    more = f"<p>{len(found) - SHOWN} more are not shown.</p>" if len(found) > SHOWN else ""
    head = "<tr><th>Variable</th><th>Lowest</th><th></th><th>Highest</th></tr>"
    return f"<p>After update {step}.</p><table>{head}{''.join(rows)}</table>{more}"
