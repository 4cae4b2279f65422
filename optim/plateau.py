r"""Learning rates that answer to a metric: `ReduceLROnPlateau` and `GreedyLR`.

Such a schedule is no function of the step. It lives on the host, is told a value after every
evaluation, and writes its rate into the ``learning_rate`` variable of an optimizer, which the
compiled step reads like any other variable: a new rate compiles nothing.

The door to a trainer (kbtrain's, or your own) is four names, so any object that has them will do:

- ``rate``: the current learning rate, a float;
- ``bind(variable)``: from now on the rate is written into this variable;
- ``on_metric(value)``: what to call after an evaluation;
- ``state()`` and ``load_state(state)``: everything it remembers, as JSON can hold it.
"""

import math
from typing import Any, Self

import keras
import numpy as np

from optim.checks import check_count, check_range

_MODES = ("min", "max")
_THRESHOLD_MODES = ("rel", "abs")


class MetricSchedule:
    """Base of the schedules that answer to a metric.

    A subclass keeps what it remembers in attributes, names them in ``remembered``, and changes
    ``self.rate`` in `react`.

    Args:
        learning_rate: the first learning rate.
        mode: ``"min"`` if a smaller metric is better, ``"max"`` if a larger one is.
        factor: in (0, 1): how much smaller a smaller learning rate is.
        patience: evaluations of one kind that change nothing yet.
        threshold: how much better counts as better.
        threshold_mode: ``"rel"``: as a share of the best metric; ``"abs"``: in its unit.
        cooldown: evaluations without counting after the rate was made smaller.
        min_lr: the rate is not made smaller than this.
        eps: changes of at most this size are left out.

    Raises:
        ValueError: if an argument is out of range.
    """

    remembered: tuple[str, ...] = ("rate", "best", "num_bad", "cooldown_counter")

    def __init__(
        self,
        learning_rate: float,
        mode: str,
        factor: float,
        patience: int,
        threshold: float,
        threshold_mode: str,
        cooldown: int,
        min_lr: float,
        eps: float,
    ) -> None:
        self.learning_rate = check_range("learning_rate", learning_rate, 0.0)
        self.mode = _check_choice("mode", mode, _MODES)
        self.factor = check_range("factor", factor, 0.0, 1.0)
        if not self.factor:
            raise ValueError(f"`factor` must be above 0. Received: factor={factor!r}")
        self.patience = check_count("patience", patience, 0)
        self.threshold = check_range("threshold", threshold, 0.0)
        self.threshold_mode = _check_choice("threshold_mode", threshold_mode, _THRESHOLD_MODES)
        self.cooldown = check_count("cooldown", cooldown, 0)
        self.min_lr = check_range("min_lr", min_lr, 0.0)
        self.eps = check_range("eps", eps, 0.0)
        self._variable: keras.Variable | None = None
        self.reset()

    def reset(self) -> None:
        """Forget everything: the learning rate is the first one again."""
        self.rate = self.learning_rate
        self.best = math.inf if self.mode == "min" else -math.inf
        self.num_bad = 0
        self.cooldown_counter = 0

    def bind(self, variable: keras.Variable) -> None:
        """Write the learning rate into a variable, now and after each change.

        Args:
            variable: an optimizer's ``learning_rate``.
        """
        self._variable = variable
        variable.assign(self.rate)

    def is_bound_to(self, variable: keras.Variable) -> bool:
        """Whether the rate is written into this variable.

        Args:
            variable: an optimizer's ``learning_rate``.

        Returns:
            True if `bind` was last called with it.
        """
        return self._variable is variable

    def on_metric(self, value: float) -> None:
        """Answer to the result of an evaluation.

        Args:
            value: the metric. A NaN is not better than anything.
        """
        self._notice_foreign_rate()
        self.react(float(value))
        if self._variable is not None:
            self._variable.assign(self.rate)

    def react(self, value: float) -> None:
        """Count, and change ``self.rate`` if it is time.

        Args:
            value: the metric.
        """
        raise NotImplementedError(f"{type(self).__name__} must define `react(self, value)`.")

    def is_better(self, value: float) -> bool:
        """Whether a metric is better than the best one, by more than the threshold.

        Args:
            value: the metric.

        Returns:
            True or False; False for NaN.
        """
        sign = -1.0 if self.mode == "min" else 1.0
        if self.threshold_mode == "abs":
            return sign * value > sign * (self.best + sign * self.threshold)
        return sign * value > sign * (self.best * (1.0 + sign * self.threshold))

    def make_smaller(self) -> None:
        """Multiply the rate by the factor, down to the lowest."""
        smaller = max(self.rate * self.factor, self.min_lr)
        if self.rate - smaller > self.eps:
            self.rate = smaller

    def state(self) -> dict[str, Any]:
        """What the schedule remembers; what is not finite as text, because JSON has none of it.

        Returns:
            A dictionary of numbers, texts and lists.
        """
        return {name: _to_json(getattr(self, name)) for name in self.remembered}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what `state` returned, the learning rate included.

        Args:
            state: as `state` returned it, possibly read from JSON.

        Raises:
            ValueError: if it is the state of another kind of schedule.
        """
        if set(state) != set(self.remembered):
            raise ValueError(
                f"This is not the state of a {type(self).__name__}, which has "
                f"{', '.join(self.remembered)}. Received: {', '.join(sorted(state))}"
            )
        values = {name: _from_json(value) for name, value in state.items()}
        for name, value in values.items():
            if isinstance(value, list) != isinstance(getattr(self, name), list):
                raise ValueError(f"{name} is not of the kind it was saved as. Received: {value!r}")
        vars(self).update(values)
        if self._variable is not None:
            self._variable.assign(self.rate)

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor, and the state once there is one."""
        names = (
            *("learning_rate", "mode", "factor", "patience", "threshold", "threshold_mode"),
            *("cooldown", "min_lr", "eps"),
        )
        config = {name: getattr(self, name) for name in names}
        if self.state() != self._first_state():
            config["state"] = self.state()
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Make one from `get_config`, in the state that it had."""
        config = dict(config)
        state = config.pop("state", None)
        schedule = cls(**config)
        if state is not None:
            schedule.load_state(state)
        return schedule

    def _first_state(self) -> dict[str, Any]:
        first = type(self).__new__(type(self))
        first.__dict__.update(self.__dict__)
        first.reset()
        return first.state()

    def _notice_foreign_rate(self) -> None:
        """Somebody may have assigned the optimizer's learning rate meanwhile: go on from there."""
        if self._variable is not None:
            actual = np.float32(keras.ops.convert_to_numpy(self._variable))
            if actual != np.float32(self.rate):
                self.rate = float(actual)


@keras.saving.register_keras_serializable(package="optim")
class ReduceLROnPlateau(MetricSchedule):
    r"""Smaller steps when a metric has stopped improving, in the arithmetic of PyTorch.

    After more than ``patience`` evaluations in a row that were not better than the best, the rate
    becomes :math:`\max(\eta \cdot \text{factor}, \eta_{\min})`, and ``cooldown`` evaluations
    pass before any is counted again.

    Args:
        learning_rate: the first learning rate.
        mode: ``"min"`` if a smaller metric is better, ``"max"`` if a larger one is.
        factor: in (0, 1).
        patience: evaluations without improvement that change nothing yet.
        threshold: how much better counts as better.
        threshold_mode: ``"rel"``: as a share of the best metric; ``"abs"``: in its unit.
        cooldown: evaluations that are not counted after the rate was made smaller.
        min_lr: the lowest learning rate.
        eps: changes of at most this size are left out.

    Raises:
        ValueError: if an argument is out of range.

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

    The defaults of the bounds are those of the reference: with a learning rate below 0.001 the
    default ``min_lr`` means that it is never made smaller.

    Args:
        learning_rate: the first learning rate.
        mode: ``"min"`` if a smaller metric is better, ``"max"`` if a larger one is.
        factor: in (0, 1).
        patience: evaluations of one kind that change nothing yet.
        threshold: how much better counts as better.
        threshold_mode: ``"rel"``: as a share of the best metric; ``"abs"``: in its unit.
        cooldown: evaluations that are not counted after the rate was made smaller.
        warmup: evaluations that are not counted after the rate was made larger.
        min_lr: the rate is not made smaller than this.
        max_lr: the rate is not made larger than this.
        eps: changes of at most this size are left out.
        smooth: judge the mean of the last metrics.
        window_size: number of metrics in that mean.
        reset_start: reductions at the lowest rate before everything is forgotten.

    Raises:
        ValueError: if an argument is out of range.

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
        self.smooth = bool(smooth)
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
        """Forget everything: the learning rate is the first one again."""
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


class FeedMetricSchedule(keras.callbacks.Callback):
    """Tells the learning-rate schedule of a model's optimizer its metric, in ``model.fit``.

    Args:
        monitor: name of the metric in the logs of an epoch.
        schedule: a schedule to use with an optimizer that was made with a plain number, such as one
            of Keras' own; the default is the one the optimizer was made with.

    Raises:
        ValueError: when training begins: the optimizer has no such schedule, or cannot be given
            one; after an epoch: the logs have no such metric.

    Example:
        >>> import numpy as np, keras, optim
        >>> schedule = optim.ReduceLROnPlateau(0.5, factor=0.5, patience=0)
        >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
        >>> model.compile(optimizer=optim.AdamW(schedule), loss=lambda y, p: 0.0 * p)
        >>> history = model.fit(
        ...     np.ones((2, 1)),
        ...     np.ones((2, 1)),
        ...     epochs=3,
        ...     verbose=0,
        ...     callbacks=[optim.FeedMetricSchedule("loss")],
        ... )
        >>> schedule.rate
        0.125
    """

    def __init__(self, monitor: str = "val_loss", schedule: MetricSchedule | None = None) -> None:
        super().__init__()
        self.monitor = monitor
        self.schedule = schedule
        self._fed: MetricSchedule | None = None

    def on_train_begin(self, logs: Any = None) -> None:
        """Find the schedule, and see that its rate is the optimizer's."""
        optimizer = self.model.optimizer
        while hasattr(optimizer, "inner_optimizer"):
            optimizer = optimizer.inner_optimizer
        self._fed = getattr(optimizer, "metric_schedule", None) or self.schedule
        if self._fed is None:
            raise ValueError(
                "The optimizer was not made with a learning rate that answers to a metric. Make it "
                "with one, optim.AdamW(optim.ReduceLROnPlateau(...)), or give this callback a "
                f"`schedule`. Received: optimizer={type(optimizer).__name__}"
            )
        if self.schedule not in (None, self._fed):
            raise ValueError(
                "The optimizer was made with one schedule that answers to a metric and this "
                "callback was given another. Give one of them only."
            )
        if not isinstance(optimizer.learning_rate, keras.Variable):
            raise ValueError(
                "An optimizer whose learning rate is a function of the step cannot answer to a "
                "metric too. Make it with a number as its learning rate."
            )
        if not self._fed.is_bound_to(optimizer.learning_rate):
            self._fed.bind(optimizer.learning_rate)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Tell the schedule the metric of this epoch."""
        logs = logs or {}
        if self.monitor not in logs:
            raise ValueError(
                f"There is no {self.monitor!r} among the logs of this epoch: "
                f"{', '.join(sorted(logs)) or 'there are none'}. "
                f"Received: monitor={self.monitor!r}"
            )
        if self._fed is not None:
            self._fed.on_metric(logs[self.monitor])


def _to_json(value: Any) -> Any:
    if isinstance(value, list):
        return [_to_json(item) for item in value]
    return value if math.isfinite(value) else str(value)


def _from_json(value: Any) -> Any:
    if isinstance(value, list):
        return [_from_json(item) for item in value]
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise TypeError(f"A state is made of numbers. Received: {value!r}")
    return float(value) if isinstance(value, str) else value


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ValueError(
            f"`{name}` must be one of {', '.join(choices)}. Received: {name}={value!r}"
        )
    return str(value)
