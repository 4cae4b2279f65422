r"""The schedules that follow a cosine.

All of them count the phase in whole numbers. In float32 the cosine of a phase that is itself
rounded loses all digits where it is near 0, that is towards the end of a training, and a restart
may come an update late.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import keras
from keras import ops

from optim.core.checks import check_closed, check_count, check_flag, check_range
from optim.core.optimizer import Tensor
from optim.schedules.warmup import FiniteSchedule

_LARGEST_DENOMINATOR = 1000
_LARGEST_PERIOD = 2**28


def turn_remainder(done: Tensor, turns: int, period: int) -> Tensor:
    """``(turns * done) % period``, exact although the product may not fit.

    The quotient is estimated in float32 and is wrong by a few at most; products wrap around in
    int32, and their small difference is right again.

    Args:
        done: Whole number of updates, float32 or int32.
        turns: At least 0.
        period: From 1 to 2**28.

    Returns:
        int32 tensor in ``[0, period)``.
    """
    turns %= period
    quotient = ops.cast(ops.floor(ops.cast(done, "float32") * (turns / period)), "int32")
    return ops.mod(ops.cast(done, "int32") * turns - quotient * period, period)


def half_wave(rest: Tensor, period: int, dtype: Any = "float32") -> Tensor:
    r"""The height of a half wave, :math:`(1 + \cos(\pi\, \text{rest} / \text{period})) / 2`.

    Written as a square of a sine counted from the end, which has all digits near 0 as well.

    Args:
        rest: Whole numbers.
        period: Where the height is 0.
        dtype: Of the result.

    Returns:
        A tensor of the shape of ``rest``.
    """
    left = ops.cast(period - rest, dtype) / period
    return ops.square(ops.sin((0.5 * math.pi) * left))


def wave(done: Tensor, cycles: float, length: int) -> Tensor:
    r"""The height of a wave, :math:`(1 + \cos(2\pi c\, d / L)) / 2`.

    Args:
        done: :math:`d`, a whole number of updates as float32.
        cycles: :math:`c`, waves in ``length`` updates.
        length: :math:`L`, at least 1.

    Returns:
        float32 tensor in [0, 1], of the shape of ``done``.
    """
    # Two half waves a cycle: 1 -> 0, and back.
    turns = 2 * Fraction(cycles).limit_denominator(_LARGEST_DENOMINATOR)
    ratio = turns / (2 * length)
    if float(turns) == 2 * cycles and ratio.denominator <= _LARGEST_PERIOD:
        rest = turn_remainder(done, ratio.numerator, ratio.denominator)
        return half_wave(2 * rest, ratio.denominator, done.dtype)
    return ops.square(ops.cos((math.pi * cycles / length) * done))


@keras.saving.register_keras_serializable(package="optim")
class CosineWithWarmup(FiniteSchedule):
    r"""Linear warm-up, then a cosine: :math:`\lambda(s) = (1 + \cos 2\pi c p)/2`.

    Here :math:`c` is ``num_cycles`` and :math:`p = (s-w)/\max(1, T-w)`; with the default of half a
    cycle it falls from the learning rate to 0. The widespread implementation of this schedule lets
    :math:`p` grow past 1, so that in a run that is too long the learning rate rises again;
    here it stays at its last value unless ``clamp=False``.

    Args:
        learning_rate: The largest learning rate, at the end of the warm-up.
        num_warmup_steps: Number of updates of the warm-up.
        num_training_steps: Number of updates of the whole training, the warm-up included.
        num_cycles: Number of cosine waves; 0.5 ends at 0.
        clamp: Stay at the last value past the end of the training.

    Raises:
        ValueError: If an argument is out of range.

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
        self.clamp = check_flag("clamp", clamp)

    def done(self, step: Tensor) -> Tensor:
        """Updates after the warm-up, at most all of them if clamped."""
        done = step - self.num_warmup_steps
        return ops.minimum(done, float(self.length)) if self.clamp else done

    def factor(self, step: Tensor) -> Tensor:
        """The height of the wave, from 0 to 1."""
        return wave(self.done(step), self.num_cycles, self.length)

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor, as a serializable dictionary."""
        return {**super().get_config(), "num_cycles": self.num_cycles, "clamp": self.clamp}


@keras.saving.register_keras_serializable(package="optim")
class CosineWithRestarts(FiniteSchedule):
    r"""Linear warm-up, then falling half cosines, each from the learning rate to 0.

    :math:`\lambda(s) = (1 + \cos(\pi\, (n p \bmod 1)))/2` with :math:`n` cycles and
    :math:`p = (s-w)/\max(1, T-w)`; 0 from :math:`p = 1` on.

    Args:
        learning_rate: The largest learning rate, at the beginning of each cycle.
        num_warmup_steps: Number of updates of the warm-up.
        num_training_steps: Number of updates of the whole training, the warm-up included.
        num_cycles: Number of cycles, at least 1.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> import optim
        >>> schedule = optim.CosineWithRestarts(1.0, 2, 10, num_cycles=2)
        >>> [round(float(schedule(step)), 4) for step in (0, 2, 4, 5, 6, 8, 10)]
        [0.0, 1.0, 0.5, 0.1464, 1.0, 0.5, 0.0]

    Reference:
        - [Loshchilov and Hutter, SGDR](https://arxiv.org/abs/1608.03983)
    """

    def __init__(
        self,
        learning_rate: float,
        num_warmup_steps: int,
        num_training_steps: int,
        num_cycles: int = 1,
    ) -> None:
        super().__init__(learning_rate, num_warmup_steps, num_training_steps)
        self.num_cycles = check_count("num_cycles", num_cycles, 1)

    def factor(self, step: Tensor) -> Tensor:
        """The height of the current cycle."""
        done = step - self.num_warmup_steps
        ratio = Fraction(self.num_cycles, self.length)
        rest = turn_remainder(done, ratio.numerator, ratio.denominator)
        return ops.where(done >= self.length, 0.0, half_wave(rest, ratio.denominator, done.dtype))

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor, as a serializable dictionary."""
        return {**super().get_config(), "num_cycles": self.num_cycles}


@keras.saving.register_keras_serializable(package="optim")
class CosineWithMinLR(CosineWithWarmup):
    r"""`CosineWithWarmup` with a lowest rate: :math:`r + (1-r)\,(1 + \cos 2\pi c p)/2`.

    Args:
        learning_rate: The largest learning rate, at the end of the warm-up.
        num_warmup_steps: Number of updates of the warm-up.
        num_training_steps: Number of updates of the whole training, the warm-up included.
        num_cycles: Number of cosine waves; 0.5 ends at the lowest rate.
        min_lr: The lowest learning rate, at most ``learning_rate``. Either this
        min_lr_rate: Or :math:`r`, its share of ``learning_rate``, has to be given.
        clamp: Stay at the last value past the end of the training, rather than rise again.

    Raises:
        ValueError: If an argument is out of range, or not exactly one of ``min_lr`` and
            ``min_lr_rate`` is given.

    Example:
        >>> import optim
        >>> schedule = optim.CosineWithMinLR(1.0, 2, 10, min_lr=0.5)
        >>> [round(float(schedule(step)), 4) for step in (0, 2, 6, 10, 12)]
        [0.0, 1.0, 0.75, 0.5, 0.5]
    """

    def __init__(
        self,
        learning_rate: float,
        num_warmup_steps: int,
        num_training_steps: int,
        num_cycles: float = 0.5,
        min_lr: float | None = None,
        min_lr_rate: float | None = None,
        clamp: bool = True,
    ) -> None:
        super().__init__(learning_rate, num_warmup_steps, num_training_steps, num_cycles, clamp)
        if (min_lr is None) == (min_lr_rate is None):
            raise ValueError(
                "Exactly one of `min_lr` and `min_lr_rate` must be given. "
                f"Received: min_lr={min_lr!r}, min_lr_rate={min_lr_rate!r}"
            )
        self.min_lr, self.min_lr_rate = min_lr, min_lr_rate
        self.lowest = self._lowest_share()

    def _lowest_share(self) -> float:
        min_lr, learning_rate = self.min_lr, self.learning_rate
        if min_lr is not None:
            check_range("min_lr", min_lr, 0.0)
            if min_lr > learning_rate or not learning_rate:
                raise ValueError(
                    "`min_lr` must be at most `learning_rate`, which must be above 0. "
                    f"Received: min_lr={min_lr!r}, learning_rate={learning_rate!r}"
                )
            return min_lr / learning_rate
        return check_closed("min_lr_rate", self.min_lr_rate, 0.0, 1.0)

    def factor(self, step: Tensor) -> Tensor:
        """The height of the wave, from the lowest share to 1."""
        return self.lowest + (1.0 - self.lowest) * super().factor(step)

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor, as a serializable dictionary."""
        lowest = {"min_lr": self.min_lr, "min_lr_rate": self.min_lr_rate}
        return {**super().get_config(), **lowest}


@keras.saving.register_keras_serializable(package="optim")
class CosineWarmupWithMinLR(CosineWithMinLR):
    r"""`CosineWithMinLR` whose first update is not lost: it is one update ahead.

    The warm-up is :math:`(s+1)/\max(1,w)`, or with ``warmup_lr_rate`` :math:`q` a line from
    :math:`q` to 1: :math:`q + (1-q)\,s/\max(1,w-1)`; then :math:`p = (s-w+1)/\max(1, T-w)`. So the
    lowest rate comes with the last update of the training, not after it.

    Args:
        learning_rate: The largest learning rate, at the last update of the warm-up.
        num_warmup_steps: Number of updates of the warm-up.
        num_training_steps: Number of updates of the whole training, the warm-up included.
        num_cycles: Number of cosine waves; 0.5 ends at the lowest rate.
        min_lr: The lowest learning rate, at most ``learning_rate``. Either this
        min_lr_rate: Or its share of ``learning_rate`` has to be given.
        warmup_lr_rate: The share of ``learning_rate`` that the warm-up begins with.
        clamp: Stay at the last value past the end of the training, rather than rise again.

    Raises:
        ValueError: As for `CosineWithMinLR`.

    Example:
        >>> import optim
        >>> schedule = optim.CosineWarmupWithMinLR(1.0, 2, 10, min_lr=0.5)
        >>> [round(float(schedule(step)), 4) for step in (0, 1, 5, 9, 12)]
        [0.5, 1.0, 0.75, 0.5, 0.5]
    """

    def __init__(
        self,
        learning_rate: float,
        num_warmup_steps: int,
        num_training_steps: int,
        num_cycles: float = 0.5,
        min_lr: float | None = None,
        min_lr_rate: float | None = None,
        warmup_lr_rate: float | None = None,
        clamp: bool = True,
    ) -> None:
        super().__init__(
            learning_rate,
            num_warmup_steps,
            num_training_steps,
            num_cycles,
            min_lr,
            min_lr_rate,
            clamp,
        )
        if warmup_lr_rate is not None:
            check_closed("warmup_lr_rate", warmup_lr_rate, 0.0, 1.0)
        self.warmup_lr_rate = warmup_lr_rate

    def warmup_factor(self, step: Tensor) -> Tensor:
        """The line of the warm-up."""
        if self.warmup_lr_rate is None:
            return (step + 1.0) / self.num_warmup_steps
        rise = (1.0 - self.warmup_lr_rate) / max(1, self.num_warmup_steps - 1)
        return self.warmup_lr_rate + rise * step

    def done(self, step: Tensor) -> Tensor:
        """As in `CosineWithWarmup`, one update ahead."""
        return super().done(step + 1.0)

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor, as a serializable dictionary."""
        return {**super().get_config(), "warmup_lr_rate": self.warmup_lr_rate}
