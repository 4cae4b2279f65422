"""Loss and metrics of an epoch as Keras counts them, however often the run logs within it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
from keras import ops

from kbtrain.model.metrics import MetricSet

logger = logging.getLogger("kbtrain")

STATE_LIMIT = 100_000
"""Numbers of metric state that a checkpoint holds at most, as JSON."""


class EpochResults:
    """Adds up the updates of an epoch.

    The loss is the mean over samples, as in Keras. The Trainer resets its metrics at every log;
    what they held is kept here and added again, so that the result covers the epoch.

    Args:
        newest_only: Whether only the newest update counts: a custom ``train_step`` returns means.
    """

    def __init__(self, newest_only: bool = False) -> None:
        self._newest_only = newest_only
        self.reset()

    def reset(self, metrics: MetricSet | None = None) -> None:
        """Begin an epoch.

        Args:
            metrics: The metrics of the training. What they hold from the epoch before, because the
                last log was before its end, will not count.
        """
        self._loss, self._samples, self._updates = 0.0, 0.0, 0
        self._extras: dict[str, float] = {}
        self._kept: list[np.ndarray] | None = None
        self._incomplete = False
        if metrics is not None and metrics.adds_up:
            states = _states(metrics)
            if any(map(np.any, states)):
                self._kept = [-x for x in states]

    def add(self, loss: float, extras: Mapping[str, float], samples: float) -> None:
        """Add an update.

        Args:
            loss: Its loss.
            extras: Further values, such as the losses of the outputs.
            samples: Its number of samples.
        """
        self._updates += 1
        self._samples += samples
        self._loss += loss * samples
        if self._newest_only:
            self._extras = dict(extras)
            return
        for name, value in extras.items():
            if name != "loss_scale":
                self._extras[name] = self._extras.get(name, 0.0) + value * samples

    def keep(self, metrics: MetricSet) -> None:
        """Keep the state of the metrics, which are about to be reset for the next log."""
        if not metrics.adds_up:
            if not self._incomplete and self._updates:
                logger.warning(
                    "A metric whose state is not a sum over samples cannot be continued after a "
                    "log within an epoch: callbacks of Keras get its value since the last log. "
                    "logging_strategy='epoch' gives them that of the epoch."
                )
            self._incomplete = True
            return
        self._kept = self._added(metrics)

    def _added(self, metrics: MetricSet) -> list[np.ndarray]:
        states = _states(metrics)
        if self._kept is None:
            return states
        return [a + b for a, b in zip(self._kept, states, strict=True)]

    def result(self, metrics: MetricSet | None) -> dict[str, Any]:
        """The loss and metrics of the epoch so far; waits for the device.

        Args:
            metrics: The metrics of the training.
        """
        if not self._updates:
            return {}
        if self._newest_only:
            values: dict[str, Any] = dict(self._extras)
        else:
            values = {"loss": self._loss / self._samples}
            values |= {name: total / self._samples for name, total in self._extras.items()}
        if metrics is None:
            return values
        if self._kept is None:
            return values | metrics.result()
        before = _states(metrics)
        _assign(metrics, self._added(metrics))
        try:
            return values | metrics.result()
        finally:
            _assign(metrics, before)

    def state(self) -> dict[str, Any]:
        """The sums of an unfinished epoch, as JSON values."""
        kept = self._kept
        if kept is not None and sum(x.size for x in kept) > STATE_LIMIT:
            kept = None
        return {
            "loss": self._loss,
            "samples": self._samples,
            "updates": self._updates,
            "extras": dict(self._extras),
            "kept": None if kept is None else [x.tolist() for x in kept],
        }

    def load_state(self, state: Mapping[str, Any], metrics: MetricSet | None) -> None:
        """Inverse of ``state``."""
        self._loss, self._samples = float(state["loss"]), float(state["samples"])
        self._updates = int(state["updates"])
        self._extras = {str(name): float(value) for name, value in state["extras"].items()}
        if state["kept"] is not None and metrics is not None:
            self._kept = [np.asarray(x) for x in state["kept"]]


def _states(metrics: MetricSet) -> list[np.ndarray]:
    """Copies of the states, in types in which sums and differences are exact."""
    arrays = [np.asarray(ops.convert_to_numpy(v.value)) for v in metrics.variables]
    whole = [x.dtype.kind in "iub" for x in arrays]
    return [np.array(x, np.int64 if w else np.float64) for x, w in zip(arrays, whole, strict=True)]


def _assign(metrics: MetricSet, values: list[np.ndarray]) -> None:
    for variable, value in zip(metrics.variables, values, strict=True):
        variable.assign(value)
