"""The gradient noise scale: which batch size is worth its cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kbtrain.callbacks.base import TrainerCallback
from kbtrain.callbacks.library.gradients import GradientProbe, newest_batches, rows_of
from kbtrain.callbacks.library.schedule import check_count, warn_without_logs
from kbtrain.callbacks.state import TrainerControl, TrainerState
from kbtrain.data import map_structure
from kbtrain.errors import ConfigurationError


class GradientNoiseScale(TrainerCallback):
    """Logs ``gradient_noise_scale``, about the largest batch size that still saves updates.

    The simple noise scale of McCandlish et al. (2018, "An Empirical Model of Large-Batch
    Training", arXiv:1812.06162, appendix A.1) is tr(S) / |G|^2, with G the gradient and S the
    covariance of the gradients of single samples. Both are estimated without bias from gradients
    of small batches and of all of them together::

        |G|^2 = (B |g_B|^2 - b |g_b|^2) / (B - b)
        tr(S) = (|g_b|^2 - |g_B|^2) / (1 / b - 1 / B)

    The small batches are the micro-batches of the newest update, or the halves of a single one.
    Both estimates are noisy, so their exponential moving averages are divided. Gradients are
    computed at every ``every``-th log, beside the training, which costs about one update each
    time.

    Args:
        every: Logs from one estimate to the next.
        smoothing: Factor of the moving averages.

    Raises:
        ConfigurationError: An argument is invalid; when training begins, the model or its division
            does not allow it.
    """

    every_step = False
    decides_alike = True

    def __init__(self, every: int = 1, smoothing: float = 0.9) -> None:
        self.every = check_count(every, "every", "GradientNoiseScale", 1)
        if not isinstance(smoothing, int | float) or not 0 <= smoothing < 1:
            raise ConfigurationError(
                f"GradientNoiseScale: smoothing must be in [0, 1). Received: {smoothing!r}."
            )
        self.smoothing = float(smoothing)
        self._probe: GradientProbe | None = None
        self._restart()

    def _restart(self) -> None:
        self._logs, self._noise, self._signal = 0, 0.0, 0.0

    def on_train_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check that gradients can be had."""
        self._probe = GradientProbe(kwargs["trainer"], "GradientNoiseScale")
        warn_without_logs("GradientNoiseScale", args, state)
        if state.global_step == 0:
            self._restart()

    def log_values(self, trainer: Any) -> dict[str, float]:
        """The estimate for a log of the training; empty where none is due or possible."""
        self._logs += 1
        if self._probe is None or (self._logs - 1) % self.every:
            return {}
        batches = newest_batches(trainer)
        if len(batches) == 1:
            batches = _halves(batches[0], rows_of(trainer, batches[0]))
        sizes = [rows_of(trainer, batch) for batch in batches]
        if len(set(sizes)) != 1 or len(batches) < 2:
            return {}
        gradients = [self._probe(batch) for batch in batches]
        signal, noise = estimate(gradients, sizes[0])
        self._signal = self.smoothing * self._signal + (1 - self.smoothing) * signal
        self._noise = self.smoothing * self._noise + (1 - self.smoothing) * noise
        # The estimate of |G|^2 may be negative where noise dominates: no batch is large enough.
        if self._signal <= 0 or self._noise <= 0:
            return {}
        return {"gradient_noise_scale": float(f"{self._noise / self._signal:.6g}")}

    def state(self) -> dict[str, Any]:
        """The moving averages."""
        return {"logs": self._logs, "noise": self._noise, "signal": self._signal}

    def load_state(self, state: dict[str, Any]) -> None:
        """Inverse of ``state``."""
        self._logs = int(state["logs"])
        self._noise, self._signal = float(state["noise"]), float(state["signal"])


def estimate(gradients: Sequence[Mapping[str, Any]], size: int) -> tuple[float, float]:
    """Unbiased estimates of |G|^2 and tr(S) from the mean gradients of batches of equal size.

    Args:
        gradients: For each batch the gradients by name.
        size: Samples of each batch.
    """
    count = len(gradients)
    small = float(np.mean([sum(_square(g) for g in each.values()) for each in gradients]))
    means = (np.mean([np.asarray(g[n], np.float64) for g in gradients], 0) for n in gradients[0])
    large = float(sum(map(_square, means)))
    signal = (count * large - small) / (count - 1)
    noise = (small - large) * size * count / (count - 1)
    return signal, noise


def _square(gradient: Any) -> float:
    return float(np.sum(np.square(np.asarray(gradient, np.float64))))


def _halves(batch: Any, rows: int) -> list[Any]:
    half = rows // 2
    if not half:
        return []

    def cut(start: int) -> Any:
        return map_structure(lambda x: x[start : start + half] if x is not None else None, batch)

    return [cut(0), cut(half)]
