"""The learning-rate range test: ``trainer.find_learning_rate()``."""

from __future__ import annotations

import contextlib
import html
import importlib
import itertools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
from keras import ops

from kbtrain import distributed
from kbtrain.checkpoint import run_state
from kbtrain.distributed import placement
from kbtrain.errors import ConfigurationError
from kbtrain.plan import request as planning
from kbtrain.plan.rehearsal import rehearsing
from kbtrain.training.fit import prepare, wrapped_calls

if TYPE_CHECKING:
    from kbtrain.training.run import Run
    from kbtrain.training.trainer_base import TrainerBase

logger = logging.getLogger("kbtrain")


@dataclass(frozen=True)
class LearningRateTest:
    """The result of a learning-rate range test.

    Attributes:
        learning_rates: The rate of each update, rising exponentially.
        losses: The loss of each update, before it is applied.
        smoothed: The moving averages of the losses.
        suggestion: The rate at which the smoothed loss falls most steeply over the logarithm of the
            rate; None if it falls nowhere.
        at_minimum: The rate with the lowest smoothed loss: an upper bound for a schedule.
        diverged: Whether the loss became many times its minimum or was not finite, which ended the
            test early.
        advice: Which limit to change, if the lowest loss or the suggestion is at an edge of the
            range; empty otherwise.
    """

    learning_rates: Sequence[float]
    losses: Sequence[float]
    smoothed: Sequence[float]
    suggestion: float | None
    at_minimum: float
    diverged: bool
    advice: str = ""

    def plot(self, ax: Any = None) -> Any:
        """Plot the losses over the learning rates (requires matplotlib).

        Args:
            ax: The axes to draw into; by default those of a new figure.

        Returns:
            The axes.
        """
        if ax is None:
            ax = _pyplot().subplots()[1]
        ax.plot(self.learning_rates, self.losses, alpha=0.3, label="loss")
        ax.plot(self.learning_rates, self.smoothed, label="smoothed")
        if self.suggestion is not None:
            ax.axvline(self.suggestion, linestyle="--", label=f"suggestion {self.suggestion:.3g}")
        ax.set(xscale="log", xlabel="learning rate", ylabel="loss")
        ax.legend()
        return ax

    def __str__(self) -> str:
        found = "none: the loss falls nowhere" if self.suggestion is None else None
        suggestion = found or f"{self.suggestion:.3g}"
        end = ", where it diverged" if self.diverged else ""
        return (
            f"Learning rate {suggestion} (lowest loss at {self.at_minimum:.3g}; tested from "
            f"{self.learning_rates[0]:.3g} to {self.learning_rates[-1]:.3g}{end})"
            f"{'. ' if self.advice else ''}{self.advice}"
        )

    def _repr_html_(self) -> str:
        """The result as a line of text and a chart, for notebooks."""
        x = np.log10(self.learning_rates)
        y = np.asarray(self.smoothed)
        x = (x - x[0]) / max(float(np.ptp(x)), 1e-12) * 400
        y = 110 - (y - y.min()) / max(float(np.ptp(y)), 1e-12) * 100
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
        mark = ""
        if self.suggestion is not None:
            at = float(x[list(self.learning_rates).index(self.suggestion)])
            mark = (
                f'<line x1="{at:.1f}" x2="{at:.1f}" y1="0" y2="120" stroke="currentColor" '
                'stroke-dasharray="4"/>'
            )
        return (
            f"<p>{html.escape(str(self))}</p>"
            '<svg viewBox="0 0 400 120" width="400" role="img" aria-label="smoothed loss over the '
            'logarithm of the learning rate"><polyline fill="none" stroke="currentColor" '
            f'stroke-width="1.5" points="{points}"/>{mark}</svg>'
        )


class _Exponential(keras.optimizers.schedules.LearningRateSchedule):  # type: ignore[misc]
    """Rises exponentially from the first to the last rate."""

    def __init__(self, low: float, high: float, steps: int) -> None:
        self._low, self._growth = low, math.log(high / low) / (steps - 1)

    def __call__(self, step: Any) -> Any:
        return self._low * ops.exp(self._growth * ops.cast(step, "float32"))

    def get_config(self) -> dict[str, Any]:
        return {}


def find_learning_rate(
    trainer: TrainerBase,
    min_lr: float,
    max_lr: float,
    num_steps: int,
    smoothing: float,
    divergence: float,
) -> LearningRateTest:
    """Test learning rates; see ``Trainer.find_learning_rate``."""
    _check(trainer, min_lr, max_lr, num_steps, smoothing, divergence)
    if planning.pending():
        planning.answer(trainer, "find_learning_rate")
    losses: list[float] = []
    with _restored(trainer):
        optimizer, _ = trainer.given_optimizers
        trainer.given_optimizers = optimizer, _Exponential(min_lr, max_lr, num_steps)
        trainer.args = trainer.args.replace(
            max_steps=num_steps,
            eval_strategy="no",
            save_strategy="no",
            load_best_model_at_end=False,
            on_nonfinite="raise",  # the weights stay finite, and the loss is read here
        )
        run = prepare(trainer, None)
        run.limit = lambda: 1
        with contextlib.closing(run.batches), wrapped_calls(trainer):
            for loss in itertools.islice(_losses(run), num_steps):
                losses.append(loss)
                if _has_diverged(losses, divergence):
                    break
            run.backend.synchronize()
    if len(losses) < num_steps and not _has_diverged(losses, divergence):
        logger.warning(
            "The data ended after %d of the %d updates of find_learning_rate, so the rates above "
            "%.3g were not tested. Lower num_steps, or give more data.",
            len(losses),
            num_steps,
            _rates(min_lr, max_lr, num_steps)[max(len(losses) - 1, 0)],
        )
    return analyse(losses, min_lr, max_lr, num_steps, smoothing, divergence)


def _has_diverged(losses: Sequence[float], divergence: float) -> bool:
    """Whether the newest loss is not finite or many times the lowest one."""
    if not losses or not math.isfinite(losses[-1]):
        return bool(losses)
    return losses[-1] > divergence * max(min(losses), 1e-12)


def _rates(low: float, high: float, steps: int) -> np.ndarray:
    """The rate of each update."""
    rates: np.ndarray = low * (high / low) ** (np.arange(steps) / (steps - 1))
    return rates


def _losses(run: Run) -> Iterator[float]:
    """The loss of each update; runs the updates."""
    while True:
        before = run.state.global_step
        with contextlib.closing(run.blocks()) as blocks:
            for block in blocks:
                run.update(block)
                yield float(run.newest(None)["loss"])
        if run.state.global_step == before:
            return
        run.end_epoch(stopped=False)


def analyse(
    losses: Sequence[float],
    min_lr: float,
    max_lr: float,
    num_steps: int,
    smoothing: float,
    divergence: float,
) -> LearningRateTest:
    """Smooth the losses of a test and find the rates.

    Args:
        losses: The losses; the last may be infinite.
        min_lr: The first rate.
        max_lr: The rate after ``num_steps`` updates.
        num_steps: Updates planned.
        smoothing: Factor of the moving average, which is corrected for its start.
        divergence: As for ``Trainer.find_learning_rate``.

    Raises:
        ConfigurationError: There are too few losses.
    """
    finite = [x for x in losses if math.isfinite(x)]
    if len(finite) < 3:
        raise ConfigurationError(
            f"find_learning_rate: the loss was finite in only {len(finite)} updates, from the "
            f"learning rate {min_lr:.3g} on. Lower min_lr, or check the data. "
            f"Received: {[float(x) for x in losses]}"
        )
    diverged = len(finite) < len(losses) or _has_diverged(losses, divergence)
    rates = _rates(min_lr, max_lr, num_steps)[: len(finite)]
    average, smoothed = 0.0, []
    for i, loss in enumerate(finite, 1):
        average = smoothing * average + (1 - smoothing) * loss
        smoothed.append(average / (1 - smoothing**i))
    slopes = np.gradient(np.asarray(smoothed), np.log(rates))
    lowest = int(np.argmin(smoothed))
    steepest = int(np.argmin(slopes[: lowest + 1]))
    advice = ""
    if lowest == num_steps - 1:
        advice = f"The loss still falls at max_lr={max_lr:.3g}: raise max_lr"
    elif lowest == 0 or steepest == 0:
        advice = f"The best rate may be below min_lr={min_lr:.3g}: lower min_lr"
    return LearningRateTest(
        [float(x) for x in rates],
        [float(x) for x in finite],
        smoothed,
        float(rates[steepest]) if slopes[steepest] < 0 else None,
        float(rates[lowest]),
        diverged,
        advice,
    )


@contextlib.contextmanager
def _restored(trainer: TrainerBase) -> Iterator[None]:
    """Context after which everything that training changes is as it was before.

    Raises:
        ConfigurationError: The data can be read only once, or weights are divided among devices or
            processes.
    """
    backend = trainer.backend

    def keep(variables: list[keras.Variable]) -> Callable[[], None]:
        if any(backend.owned_blocks(v) is not None for v in variables):
            raise ConfigurationError(
                "find_learning_rate keeps a copy of all weights, and here they are divided among "
                "several devices or processes. Test on one device, or with a smaller model: the "
                "best rate depends on the batch size more than on the number of devices."
            )
        values = run_state.host_copies(variables)
        return lambda: run_state.restore_values(variables, values)

    with (
        rehearsing(trainer, "find_learning_rate", keep),
        distributed.working("find_learning_rate"),
        placement.settings(backend, trainer.args, trainer.model),
    ):
        yield


def _pyplot() -> Any:
    try:
        return importlib.import_module("matplotlib.pyplot")
    except ImportError as error:
        raise ConfigurationError(
            f"plot() needs matplotlib, which cannot be imported ({error}). Install it with: pip "
            "install matplotlib."
        ) from None


def _check(
    trainer: TrainerBase, low: Any, high: Any, steps: Any, smoothing: Any, divergence: Any
) -> None:
    numbers = all(isinstance(x, int | float) for x in (low, high, smoothing, divergence))
    valid = numbers and 0 < low < high < math.inf and 0 <= smoothing < 1 and divergence > 1
    if not valid or not isinstance(steps, int) or steps < 5:
        raise ConfigurationError(
            "find_learning_rate needs 0 < min_lr < max_lr, num_steps of at least 5, 0 <= smoothing "
            f"< 1 and divergence > 1. Received: min_lr={low!r}, max_lr={high!r}, "
            f"num_steps={steps!r}, smoothing={smoothing!r}, divergence={divergence!r}."
        )
    if trainer.is_in_train:
        raise ConfigurationError("find_learning_rate cannot be called by a callback during fit().")
    if trainer.bound.overridden.train_step:
        raise ConfigurationError(
            f"find_learning_rate sets the learning rate of the Trainer's step, and "
            f"{type(trainer.model).__name__} has its own train_step."
        )
