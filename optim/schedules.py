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

import math
from numbers import Real
from typing import Any

import keras
from keras import ops

from optim.optimizer import Tensor, check_range


def check_count(name: str, value: Any, low: int) -> int:
    """Check a number of steps.

    Args:
        name: the argument's name, for the message.
        value: what the user gave.
        low: smallest allowed value.

    Returns:
        The value as an int.

    Raises:
        ValueError: if it is not a whole number of at least ``low``.
    """
    number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value < low or value != math.floor(value):
        raise ValueError(
            f"`{name}` must be a whole number of steps, at least {low}. Received: {name}={value!r}"
        )
    return int(value)


class Schedule(keras.optimizers.schedules.LearningRateSchedule):
    """Base of the schedules: linear warm-up, then `factor` times the learning rate.

    Args:
        learning_rate: the base learning rate, reached at the end of the warm-up.
        num_warmup_steps: updates until then.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> import keras, optim
        >>> @keras.saving.register_keras_serializable(package="example")
        ... class InverseTime(optim.Schedule):
        ...     def factor(self, step):
        ...         return 1.0 / (1.0 + step)
        >>> float(InverseTime(0.5)(3))
        0.125
    """

    def __init__(self, learning_rate: float, num_warmup_steps: int = 0) -> None:
        self.learning_rate = check_range("learning_rate", learning_rate, 0.0)
        self.num_warmup_steps = check_count("num_warmup_steps", num_warmup_steps, 0)

    def __call__(self, step: Any) -> Tensor:
        """The learning rate of the update that follows ``step`` updates.

        Args:
            step: number of updates done so far: an integer, a scalar tensor or variable.

        Returns:
            float32 scalar tensor.
        """
        step = ops.cast(step, "float32")
        factor = self.factor(step)
        if self.num_warmup_steps:
            warm = step < self.num_warmup_steps
            factor = ops.where(warm, self.warmup_factor(step), factor)
        return ops.cast(self.learning_rate * factor, "float32")

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


class _Finite(Schedule):
    """A schedule that knows how long the training is."""

    def __init__(
        self, learning_rate: float, num_warmup_steps: int, num_training_steps: int
    ) -> None:
        super().__init__(learning_rate, num_warmup_steps)
        self.num_training_steps = check_count("num_training_steps", num_training_steps, 1)

    def progress(self, step: Tensor) -> Tensor:
        """The share of the steps after the warm-up that is done: 0 at its end, 1 at the last."""
        length = max(1, self.num_training_steps - self.num_warmup_steps)
        return (step - self.num_warmup_steps) / length

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor, as a serializable dictionary."""
        return {**super().get_config(), "num_training_steps": self.num_training_steps}


@keras.saving.register_keras_serializable(package="optim")
class Constant(Schedule):
    """The same learning rate at every step.

    Args:
        learning_rate: that learning rate.

    Raises:
        ValueError: if it is negative or not a number.

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
        learning_rate: the learning rate after the warm-up.
        num_warmup_steps: number of updates of the warm-up.

    Raises:
        ValueError: if an argument is out of range.

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
class LinearWithWarmup(_Finite):
    r"""Linear warm-up, then linear decay to 0: :math:`\lambda(s) = \max(0, (T-s)/\max(1, T-w))`.

    Args:
        learning_rate: the largest learning rate, at the end of the warm-up.
        num_warmup_steps: number of updates of the warm-up.
        num_training_steps: number of updates of the whole training, the warm-up included.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> import optim
        >>> schedule = optim.LinearWithWarmup(1.0, num_warmup_steps=2, num_training_steps=10)
        >>> [float(schedule(step)) for step in (0, 1, 2, 6, 10, 11)]
        [0.0, 0.5, 1.0, 0.5, 0.0, 0.0]
    """

    def factor(self, step: Tensor) -> Tensor:
        """The share of the steps that is left."""
        # Counted from the end, so that it is exactly 0 there for any length.
        length = max(1, self.num_training_steps - self.num_warmup_steps)
        return ops.maximum(0.0, (self.num_training_steps - step) / length)


@keras.saving.register_keras_serializable(package="optim")
class CosineWithWarmup(_Finite):
    r"""Linear warm-up, then a cosine: :math:`\lambda(s) = \max(0, (1 + \cos 2\pi c p)/2)`.

    Here :math:`c` is ``num_cycles`` and :math:`p = (s-w)/\max(1, T-w)`; with the default of half a
    cycle it falls from the learning rate to 0. The widespread implementation of this schedule lets
    :math:`p` grow past 1, so that a run that goes on too long sees the learning rate rise again;
    here it stays at its last value unless ``clamp=False``.

    Args:
        learning_rate: the largest learning rate, at the end of the warm-up.
        num_warmup_steps: number of updates of the warm-up.
        num_training_steps: number of updates of the whole training, the warm-up included.
        num_cycles: number of cosine waves; 0.5 ends at 0.
        clamp: stay at the last value past the end of the training.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> import optim
        >>> schedule = optim.CosineWithWarmup(1.0, num_warmup_steps=2, num_training_steps=10)
        >>> [round(float(schedule(step)), 4) for step in (0, 2, 4, 6, 10, 12)]
        [0.0, 1.0, 0.8536, 0.5, 0.0, 0.0]

    Reference:
        - [Loshchilov and Hutter, SGDR](https://arxiv.org/abs/1608.03983)
    """

    def __init__(
        self,
        learning_rate: float,
        num_warmup_steps: int,
        num_training_steps: int,
        num_cycles: float = 0.5,
        clamp: bool = True,
    ) -> None:
        super().__init__(learning_rate, num_warmup_steps, num_training_steps)
        self.num_cycles = check_range("num_cycles", num_cycles, 0.0)
        self.clamp = bool(clamp)

    def factor(self, step: Tensor) -> Tensor:
        """The height of the wave, from 0 to 1."""
        progress = self.progress(step)
        if self.clamp:
            progress = ops.minimum(1.0, progress)
        return ops.maximum(0.0, 0.5 * (1.0 + ops.cos(2.0 * math.pi * self.num_cycles * progress)))

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor, as a serializable dictionary."""
        return {**super().get_config(), "num_cycles": self.num_cycles, "clamp": self.clamp}
