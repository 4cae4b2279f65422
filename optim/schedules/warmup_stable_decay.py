"""`WarmupStableDecay`: up, level, down, each part with a length and a shape of its own."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from optim.core.checks import check_closed, check_count, check_range
from optim.core.optimizer import Tensor
from optim.schedules.cosine import half_wave, wave
from optim.schedules.warmup import Schedule

_SHAPES = ("linear", "cosine", "1-sqrt")


@keras.saving.register_keras_serializable(package="optim")
class WarmupStableDecay(Schedule):
    r"""Warm-up, a level part, and a decay that may be added late to a run of open length.

    With :math:`w` updates of warm-up, :math:`S` level ones, :math:`D` of decay, lowest share
    :math:`m`, and the position :math:`u` within a part, from 0 to 1:

    ======== ================================ =====================================
    shape    warm-up                          decay
    ======== ================================ =====================================
    linear   :math:`u`                        :math:`1-u`
    cosine   :math:`(1-\cos \pi u)/2`         :math:`(1+\cos 2\pi c u)/2`
    1-sqrt   :math:`1-\sqrt{1-u}`             :math:`1-\sqrt{u}`
    ======== ================================ =====================================

    each put between :math:`m` and 1; 1 in the level part and :math:`m` after the end.

    Args:
        learning_rate: The learning rate of the level part.
        num_warmup_steps: Number of updates of the warm-up.
        num_decay_steps: Number of updates of the decay.
        num_training_steps: Number of updates of the whole training; the level part takes what
            warm-up and decay leave of them. Not used if ``num_stable_steps`` is given.
        num_stable_steps: Number of updates of the level part.
        warmup_type: ``"linear"``, ``"cosine"`` or ``"1-sqrt"``.
        decay_type: One of the same.
        min_lr_ratio: The share of ``learning_rate`` at the start and at the end.
        num_cycles: Number of cosine waves of a decay of that type; 0.5 ends at the lowest.

    Raises:
        ValueError: If an argument is out of range, neither length is given, or warm-up and decay
            are longer than the training.

    Example:
        >>> import optim
        >>> schedule = optim.WarmupStableDecay(1.0, 2, num_decay_steps=4, num_training_steps=10)
        >>> [round(float(schedule(step)), 4) for step in (0, 1, 2, 6, 8, 10, 11)]
        [0.0, 0.5, 1.0, 1.0, 0.5, 0.0, 0.0]

    Reference:
        - [Hu et al., MiniCPM](https://arxiv.org/abs/2404.06395)
        - [Hägele et al., Scaling Laws and Compute-Optimal Training Beyond Fixed Training
          Durations](https://arxiv.org/abs/2405.18392)
    """

    def __init__(
        self,
        learning_rate: float,
        num_warmup_steps: int,
        num_decay_steps: int,
        num_training_steps: int | None = None,
        num_stable_steps: int | None = None,
        warmup_type: str = "linear",
        decay_type: str = "cosine",
        min_lr_ratio: float = 0.0,
        num_cycles: float = 0.5,
    ) -> None:
        super().__init__(learning_rate, num_warmup_steps)
        self.num_decay_steps = check_count("num_decay_steps", num_decay_steps, 0)
        self.num_training_steps, self.num_stable_steps = num_training_steps, num_stable_steps
        self.decay_begin = self._find_begin_of_decay()
        self.warmup_type = _check_shape("warmup_type", warmup_type)
        self.decay_type = _check_shape("decay_type", decay_type)
        self.min_lr_ratio = check_closed("min_lr_ratio", min_lr_ratio, 0.0, 1.0)
        self.num_cycles = check_range("num_cycles", num_cycles, 0.0)

    def _find_begin_of_decay(self) -> int:
        if self.num_stable_steps is not None:
            stable = check_count("num_stable_steps", self.num_stable_steps, 0)
            return self.num_warmup_steps + stable
        if self.num_training_steps is None:
            raise ValueError(
                "`num_training_steps` or `num_stable_steps` must be given. Received: "
                "num_training_steps=None, num_stable_steps=None"
            )
        total = check_count("num_training_steps", self.num_training_steps, 1)
        if self.num_warmup_steps + self.num_decay_steps > total:
            raise ValueError(
                "`num_warmup_steps` and `num_decay_steps` must not be more than "
                f"`num_training_steps` together. Received: num_warmup_steps="
                f"{self.num_warmup_steps}, num_decay_steps={self.num_decay_steps}, "
                f"num_training_steps={total}"
            )
        return total - self.num_decay_steps

    def warmup_factor(self, step: Tensor) -> Tensor:
        """The rise from the lowest share to 1."""
        length = self.num_warmup_steps
        done = ops.clip(step, 0.0, float(length))
        height = done / length
        if self.warmup_type == "cosine":
            height = half_wave(length - done, length, done.dtype)
        elif self.warmup_type == "1-sqrt":
            # 1 - sqrt(x) without its cancellation near x = 1.
            height = height / (1.0 + ops.sqrt((length - done) / length))
        return self._above_lowest(height)

    def factor(self, step: Tensor) -> Tensor:
        """1 up to the decay, then its fall to the lowest share."""
        length = max(1, self.num_decay_steps)
        done = ops.clip(step - self.decay_begin, 0.0, float(length))
        if self.decay_type == "cosine":
            height = wave(done, self.num_cycles, length)
        else:
            height = (length - done) / length
            if self.decay_type == "1-sqrt":
                height = height / (1.0 + ops.sqrt(done / length))
        height = ops.where(step < self.decay_begin, 1.0, self._above_lowest(height))
        over = step >= self.decay_begin + self.num_decay_steps
        return ops.where(over, self.min_lr_ratio, height)

    def _above_lowest(self, height: Tensor) -> Tensor:
        return self.min_lr_ratio + (1.0 - self.min_lr_ratio) * height

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor, as a serializable dictionary."""
        return {
            **super().get_config(),
            "num_decay_steps": self.num_decay_steps,
            "num_training_steps": self.num_training_steps,
            "num_stable_steps": self.num_stable_steps,
            "warmup_type": self.warmup_type,
            "decay_type": self.decay_type,
            "min_lr_ratio": self.min_lr_ratio,
            "num_cycles": self.num_cycles,
        }


def _check_shape(name: str, value: Any) -> str:
    if value not in _SHAPES:
        raise ValueError(
            f"`{name}` must be one of {', '.join(_SHAPES)}. Received: {name}={value!r}"
        )
    return str(value)
