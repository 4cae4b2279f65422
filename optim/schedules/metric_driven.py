"""`MetricSchedule`: a learning rate that answers to a metric.

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

from optim.core.checks import check_count, check_range

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
