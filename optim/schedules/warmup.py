r"""Learning rate as a pure function of the update count.

Every schedule here is a float32 function of the number of updates done so far, so there is nothing
to save with a run: the optimizer's counter is all the state. With base learning rate :math:`\eta`,
step :math:`s` (0 at the first update), warm-up :math:`w` and training length :math:`T`, a schedule
is

.. math::
    \eta(s) = \eta \cdot \begin{cases} s / \max(1, w) & s < w \\ \lambda(s) & s \ge w \end{cases}

so the first update of a run with warm-up has learning rate 0. To write another one, derive from
`Schedule`, give the factor :math:`\lambda` and the configuration.
"""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from optim.core import precision
from optim.core.checks import check_count, check_range
from optim.core.optimizer import Tensor


class Schedule(keras.optimizers.schedules.LearningRateSchedule):  # type: ignore[misc]
    """Base of the schedules: linear warm-up, then `factor` times the learning rate.

    Args:
        learning_rate: The base learning rate, reached at the end of the warm-up.
        num_warmup_steps: Updates until then.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> import keras, optim
        >>> @keras.saving.register_keras_serializable(package="example")
        ... class InverseTime(optim.Schedule):
        ...     def factor(self, step):
        ...         return 1.0 / (1.0 + step)
        >>> float(InverseTime(0.5)(3))
        0.125
    """

    keeps_float64 = True

    def __init__(self, learning_rate: float, num_warmup_steps: int = 0) -> None:
        self.learning_rate = check_range("learning_rate", learning_rate, 0.0)
        self.num_warmup_steps = check_count("num_warmup_steps", num_warmup_steps, 0)

    def __call__(self, step: Any) -> Tensor:
        """The learning rate of the update that follows ``step`` updates.

        Args:
            step: Number of updates done so far: an integer, a scalar tensor or variable.

        Returns:
            float32 scalar tensor; float64 if the step is, or ``keras.config.floatx()``.
        """
        dtype = precision.schedule_dtype(step)
        with precision.arithmetic(dtype):
            step = ops.cast(step, dtype)
            factor = self.factor(step)
            if self.num_warmup_steps:
                warm = step < self.num_warmup_steps
                factor = ops.where(warm, self.warmup_factor(step), factor)
            return ops.cast(self.learning_rate * factor, dtype)

    def warmup_factor(self, step: Tensor) -> Tensor:
        """The share of the learning rate during the warm-up.

        Args:
            step: float32 scalar; used where it is less than ``num_warmup_steps``.

        Returns:
            float32 scalar.
        """
        return step / self.num_warmup_steps

    def factor(self, step: Tensor) -> Tensor:
        """The share of the learning rate after the warm-up.

        Args:
            step: float32 scalar; used where it is at least ``num_warmup_steps``.

        Returns:
            float32 scalar.
        """
        raise NotImplementedError(f"{type(self).__name__} must define `factor(self, step)`.")

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor, as a serializable dictionary."""
        return {"learning_rate": self.learning_rate, "num_warmup_steps": self.num_warmup_steps}


class FiniteSchedule(Schedule):
    """Base of the schedules that need the length of the training.

    Args:
        learning_rate: The base learning rate.
        num_warmup_steps: Number of updates of the warm-up.
        num_training_steps: Number of updates of the whole training, the warm-up included.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self, learning_rate: float, num_warmup_steps: int, num_training_steps: int
    ) -> None:
        super().__init__(learning_rate, num_warmup_steps)
        self.num_training_steps = check_count("num_training_steps", num_training_steps, 1)

    @property
    def length(self) -> int:
        """Number of updates after the warm-up, at least 1."""
        return max(1, self.num_training_steps - self.num_warmup_steps)

    def remaining(self, step: Tensor) -> Tensor:
        """The share of the updates after the warm-up that is left: 1 at its end, 0 past the last.

        Counted from the end, so that it is exact there for any length.

        Args:
            step: float32 scalar.

        Returns:
            float32 scalar.
        """
        return ops.maximum(0.0, (self.num_training_steps - step) / self.length)

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor, as a serializable dictionary."""
        return {**super().get_config(), "num_training_steps": self.num_training_steps}


@keras.saving.register_keras_serializable(package="optim")
class Constant(Schedule):
    """The same learning rate at every step.

    Args:
        learning_rate: That learning rate.

    Raises:
        ValueError: If it is negative or not a number.

    Example:
        >>> import optim
        >>> float(optim.Constant(0.5)(1000))
        0.5
    """

    def __init__(self, learning_rate: float) -> None:
        super().__init__(learning_rate)

    def factor(self, step: Tensor) -> Tensor:
        """1 at every step."""
        return ops.ones_like(step)

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor, as a serializable dictionary."""
        return {"learning_rate": self.learning_rate}


@keras.saving.register_keras_serializable(package="optim")
class ConstantWithWarmup(Schedule):
    """Linear warm-up, then a constant learning rate.

    Args:
        learning_rate: The learning rate after the warm-up.
        num_warmup_steps: Number of updates of the warm-up.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> import optim
        >>> [float(optim.ConstantWithWarmup(1.0, 4)(step)) for step in (0, 1, 4, 9)]
        [0.0, 0.25, 1.0, 1.0]
    """

    def __init__(self, learning_rate: float, num_warmup_steps: int) -> None:
        super().__init__(learning_rate, num_warmup_steps)

    def factor(self, step: Tensor) -> Tensor:
        """1 at every step after the warm-up."""
        return ops.ones_like(step)


@keras.saving.register_keras_serializable(package="optim")
class LinearWithWarmup(FiniteSchedule):
    r"""Linear warm-up, then linear decay to 0: :math:`\lambda(s) = \max(0, (T-s)/\max(1, T-w))`.

    Args:
        learning_rate: The largest learning rate, at the end of the warm-up.
        num_warmup_steps: Number of updates of the warm-up.
        num_training_steps: Number of updates of the whole training, the warm-up included.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> import optim
        >>> schedule = optim.LinearWithWarmup(1.0, num_warmup_steps=2, num_training_steps=10)
        >>> [float(schedule(step)) for step in (0, 1, 2, 6, 10, 11)]
        [0.0, 0.5, 1.0, 0.5, 0.0, 0.0]
    """

    def factor(self, step: Tensor) -> Tensor:
        """The share of the updates that is left."""
        return self.remaining(step)


@keras.saving.register_keras_serializable(package="optim")
class PolynomialWithWarmup(FiniteSchedule):
    r"""Linear warm-up, then a power of the share that is left, down to ``lr_end``.

    With :math:`r = (T-s)/(T-w)` and end :math:`e`:
    :math:`\eta(s) = (\eta - e)\, r^{\text{power}} + e`, and :math:`e` past the end.

    Args:
        learning_rate: The largest learning rate, at the end of the warm-up.
        num_warmup_steps: Number of updates of the warm-up.
        num_training_steps: Number of updates of the whole training, the warm-up included.
        lr_end: The learning rate at the end and after it, less than ``learning_rate``.
        power: 1 is a straight line, 2 a parabola.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> import optim
        >>> schedule = optim.PolynomialWithWarmup(1.0, 2, 10, lr_end=0.0, power=2)
        >>> [float(schedule(step)) for step in (0, 1, 2, 6, 10, 11)]
        [0.0, 0.5, 1.0, 0.25, 0.0, 0.0]
    """

    def __init__(
        self,
        learning_rate: float,
        num_warmup_steps: int,
        num_training_steps: int,
        lr_end: float = 1e-7,
        power: float = 1.0,
    ) -> None:
        super().__init__(learning_rate, num_warmup_steps, num_training_steps)
        self.lr_end = check_range("lr_end", lr_end, 0.0, self.learning_rate)
        self.power = check_range("power", power, 0.0)

    def factor(self, step: Tensor) -> Tensor:
        """The power of the share that is left, between 1 and the end."""
        end = self.lr_end / self.learning_rate
        remaining = self.remaining(step)
        decayed = end + (1.0 - end) * ops.power(remaining, self.power)
        # A power of 0 holds the learning rate up to the end.
        return ops.where(step > self.num_training_steps, end, decayed)

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor, as a serializable dictionary."""
        return {**super().get_config(), "lr_end": self.lr_end, "power": self.power}


@keras.saving.register_keras_serializable(package="optim")
class InverseSqrtWithWarmup(Schedule):
    r"""Linear warm-up, then one over the square root of the time; it has no end.

    :math:`\lambda(s) = \sqrt{\tau / (s + \tau - w)}`.

    Args:
        learning_rate: The largest learning rate, at the end of the warm-up.
        num_warmup_steps: Number of updates of the warm-up.
        timescale: :math:`\tau`, in updates; the default is the warm-up, or 10000 without one.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> import optim
        >>> schedule = optim.InverseSqrtWithWarmup(1.0, num_warmup_steps=4)
        >>> [float(schedule(step)) for step in (0, 2, 4, 16, 64)]
        [0.0, 0.5, 1.0, 0.5, 0.25]

    Reference:
        - [Zhai et al., Scaling Vision Transformers](https://arxiv.org/abs/2106.04560)
    """

    def __init__(
        self, learning_rate: float, num_warmup_steps: int, timescale: int | None = None
    ) -> None:
        super().__init__(learning_rate, num_warmup_steps)
        if timescale is None:
            timescale = self.num_warmup_steps or 10_000
        self.timescale = check_count("timescale", timescale, 1)

    def factor(self, step: Tensor) -> Tensor:
        """The root of the timescale over the time, which is the timescale at the end of warm-up."""
        time = step + float(self.timescale - self.num_warmup_steps)
        # During a warm-up longer than the timescale, where this is not used, it would be negative.
        return ops.sqrt(self.timescale / ops.maximum(1.0, time))

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor, as a serializable dictionary."""
        return {**super().get_config(), "timescale": self.timescale}
