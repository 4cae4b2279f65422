r"""Metric-driven learning rates: `ReduceLROnPlateau` and `GreedyLR`."""

from __future__ import annotations

from typing import Any

import keras

from optim.core.checks import check_count, check_flag, check_range
from optim.schedules.metric_driven import MetricSchedule


@keras.saving.register_keras_serializable(package="optim")
class ReduceLROnPlateau(MetricSchedule):
    r"""Smaller steps when a metric has stopped improving, in the arithmetic of PyTorch.

    After more than ``patience`` evaluations in a row that were not better than the best, the rate
    becomes :math:`\max(\eta \cdot \text{factor}, \eta_{\min})`, and ``cooldown`` evaluations
    pass before any is counted again.

    Args:
        learning_rate: The first learning rate.
        mode: ``"min"`` if a smaller metric is better, ``"max"`` if a larger one is.
        factor: In (0, 1).
        patience: Evaluations without improvement that change nothing yet.
        threshold: How much better counts as better.
        threshold_mode: ``"rel"``: as a share of the best metric; ``"abs"``: in its unit.
        cooldown: Evaluations that are not counted after the rate was made smaller.
        min_lr: The lowest learning rate.
        eps: Changes of at most this size are left out.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> import optim
        >>> schedule = optim.ReduceLROnPlateau(1.0, factor=0.5, patience=1)
        >>> for loss in (3.0, 2.0, 2.0, 2.0):
        ...     schedule.on_metric(loss)
        >>> schedule.rate
        0.5
    """

    def __init__(
        self,
        learning_rate: float,
        mode: str = "min",
        factor: float = 0.1,
        patience: int = 10,
        threshold: float = 1e-4,
        threshold_mode: str = "rel",
        cooldown: int = 0,
        min_lr: float = 0.0,
        eps: float = 1e-8,
    ) -> None:
        super().__init__(
            learning_rate,
            mode,
            factor,
            patience,
            threshold,
            threshold_mode,
            cooldown,
            min_lr,
            eps,
        )

    def react(self, value: float) -> None:
        """Count evaluations that are not better."""
        if self.is_better(value):
            self.best, self.num_bad = value, 0
        else:
            self.num_bad += 1
        if self.cooldown_counter > 0:
            self.cooldown_counter -= 1
            self.num_bad = 0
        if self.num_bad > self.patience:
            self.make_smaller()
            self.cooldown_counter, self.num_bad = self.cooldown, 0


@keras.saving.register_keras_serializable(package="optim")
class GreedyLR(MetricSchedule):
    r"""Larger steps while a metric improves, smaller ones when it does not.

    After more than ``patience`` better evaluations in a row the rate becomes
    :math:`\min(\eta / \text{factor}, \eta_{\max})`, after as many that are not better
    :math:`\max(\eta \cdot \text{factor}, \eta_{\min})`. After ``reset_start`` such reductions at
    the lowest rate it begins anew.

    The defaults of the bounds are those of Transformers: with a learning rate below 0.001 the
    default ``min_lr`` means that it is never made smaller.

    Args:
        learning_rate: The first learning rate.
        mode: ``"min"`` if a smaller metric is better, ``"max"`` if a larger one is.
        factor: In (0, 1).
        patience: Evaluations of one kind that change nothing yet.
        threshold: How much better counts as better.
        threshold_mode: ``"rel"``: as a share of the best metric; ``"abs"``: in its unit.
        cooldown: Evaluations that are not counted after the rate was made smaller.
        warmup: Evaluations that are not counted after the rate was made larger.
        min_lr: The rate is not made smaller than this.
        max_lr: The rate is not made larger than this.
        eps: Changes of at most this size are left out.
        smooth: Judge the mean of the last metrics.
        window_size: Number of metrics in that mean.
        reset_start: Reductions at the lowest rate before the state is reset.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> import optim
        >>> schedule = optim.GreedyLR(0.25, factor=0.5, patience=1)
        >>> for loss in (3.0, 2.0, 1.0):
        ...     schedule.on_metric(loss)
        >>> schedule.rate
        0.5

    Reference:
        - [GreedyLR: A Novel Adaptive Learning Rate Scheduler](https://arxiv.org/abs/2512.14527)
    """

    remembered: tuple[str, ...] = (
        *MetricSchedule.remembered,
        *("num_good", "warmup_counter", "resets_left", "window"),
    )

    def __init__(
        self,
        learning_rate: float,
        mode: str = "min",
        factor: float = 0.95,
        patience: int = 10,
        threshold: float = 1e-6,
        threshold_mode: str = "abs",
        cooldown: int = 0,
        warmup: int = 0,
        min_lr: float = 1e-3,
        max_lr: float = 1.0,
        eps: float = 1e-8,
        smooth: bool = False,
        window_size: int = 50,
        reset_start: int = 500,
    ) -> None:
        self.warmup = check_count("warmup", warmup, 0)
        self.max_lr = check_range("max_lr", max_lr, 0.0)
        self.smooth = check_flag("smooth", smooth)
        self.window_size = check_count("window_size", window_size, 1)
        self.reset_start = check_count("reset_start", reset_start, 1)
        super().__init__(
            learning_rate,
            mode,
            factor,
            patience,
            threshold,
            threshold_mode,
            cooldown,
            min_lr,
            eps,
        )
        if self.max_lr < self.min_lr:
            raise ValueError(
                "`max_lr` must be at least `min_lr`. "
                f"Received: max_lr={max_lr!r}, min_lr={min_lr!r}"
            )

    def reset(self) -> None:
        """Return to the initial state and the first learning rate."""
        super().reset()
        self.num_good = 0
        self.warmup_counter = 0
        self.resets_left = self.reset_start
        self.window: list[float] = []

    def react(self, value: float) -> None:
        """Count better evaluations and others."""
        value = self._smoothed(value)
        if self.cooldown_counter > 0 or self.warmup_counter > 0:
            if self.cooldown_counter > 0:
                self.cooldown_counter -= 1
            else:
                self.warmup_counter -= 1
            self.num_good = self.num_bad = 0
            return
        if self.is_better(value):
            self.best, self.num_good, self.num_bad = value, self.num_good + 1, 0
        else:
            self.num_good, self.num_bad = 0, self.num_bad + 1
        if self.num_good > self.patience:
            self.make_larger()
            self.warmup_counter, self.num_good = self.warmup, 0
        elif self.num_bad > self.patience:
            self.make_smaller()
            self.cooldown_counter, self.num_bad = self.cooldown, 0
            self._count_at_lowest()

    def make_larger(self) -> None:
        """Divide the rate by the factor, up to the largest."""
        larger = min(self.rate / self.factor, self.max_lr)
        if larger - self.rate > self.eps:
            self.rate = larger
        self.resets_left = self.reset_start

    def _count_at_lowest(self) -> None:
        if self.rate <= self.min_lr:
            self.resets_left -= 1
            if self.resets_left <= 0:
                self.reset()

    def _smoothed(self, value: float) -> float:
        if not self.smooth:
            return value
        self.window = [*self.window, value][-self.window_size :]
        return sum(self.window) / len(self.window)

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor, and the state once there is one."""
        names = ("warmup", "max_lr", "smooth", "window_size", "reset_start")
        return {**super().get_config(), **{name: getattr(self, name) for name in names}}
