"""`MetricSchedule`: a metric-driven learning rate.

Such a schedule is not a function of the step. It lives on the host, gets a value after every
evaluation, and writes its rate into the ``learning_rate`` variable of an optimizer, which the
compiled step reads like any other variable: a new rate does not retrace anything.

A trainer (kbtrain's, or your own) uses these names only, so any object that has them works:

- ``rate``: the current learning rate, a float;
- ``bind(variable)``: from now on the rate is written into this variable;
- ``on_metric(value)``: to be called after an evaluation;
- ``state()`` and ``load_state(state)``: its state, as JSON values.
"""

from __future__ import annotations

import math
from typing import Any, Self

import keras
import numpy as np

from optim.core.checks import check_count, check_range

_MODES = ("min", "max")
_THRESHOLD_MODES = ("rel", "abs")


class MetricSchedule:
    """Base of the metric-driven schedules.

    A subclass keeps its state in attributes, lists their names in ``remembered``, and changes
    ``self.rate`` in `react`.

    Args:
        learning_rate: The first learning rate.
        mode: ``"min"`` if a smaller metric is better, ``"max"`` if a larger one is.
        factor: In (0, 1): how much smaller a smaller learning rate is.
        patience: Evaluations of one kind that change nothing yet.
        threshold: How much better counts as better.
        threshold_mode: ``"rel"``: as a share of the best metric; ``"abs"``: in its unit.
        cooldown: Evaluations without counting after the rate was made smaller.
        min_lr: The rate is not made smaller than this.
        eps: Changes of at most this size are left out.

    Raises:
        ValueError: If an argument is out of range.
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
        """Return to the initial state and the first learning rate."""
        self.rate = self.learning_rate
        self.best = math.inf if self.mode == "min" else -math.inf
        self.num_bad = 0
        self.cooldown_counter = 0

    def bind(self, variable: keras.Variable) -> None:
        """Write the learning rate into a variable, now and after each change.

        Args:
            variable: An optimizer's ``learning_rate``.
        """
        self._variable = variable
        variable.assign(self.rate)

    def is_bound_to(self, variable: keras.Variable) -> bool:
        """Whether the rate is written into this variable.

        Args:
            variable: An optimizer's ``learning_rate``.

        Returns:
            True if `bind` was last called with it.
        """
        return self._variable is variable

    def on_metric(self, value: float) -> None:
        """Update the rate from the result of an evaluation.

        Args:
            value: The metric. A NaN is not better than anything.
        """
        self._read_assigned_rate()
        self.react(float(value))
        if self._variable is not None:
            self._variable.assign(self.rate)

    def react(self, value: float) -> None:
        """Count evaluations, and change ``self.rate`` when due.

        Args:
            value: The metric.
        """
        raise NotImplementedError(f"{type(self).__name__} must define `react(self, value)`.")

    def is_better(self, value: float) -> bool:
        """Whether a metric is better than the best one, by more than the threshold.

        Args:
            value: The metric.

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
        """The state of the schedule; non-finite numbers are strings, because JSON has none.

        Returns:
            A dictionary of numbers, strings and lists.
        """
        return {name: _to_json(getattr(self, name)) for name in self.remembered}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned, the learning rate included.

        Args:
            state: As `state` returned it, possibly read from JSON.

        Raises:
            ValueError: If it is the state of another kind of schedule.
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

    def _read_assigned_rate(self) -> None:
        """Continue from the optimizer's learning rate if it was assigned in the meantime."""
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
