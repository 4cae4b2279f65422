"""Schedule-free AdamW, SGD and RAdam: averaging in place of a decaying learning rate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

import keras
from keras import ops

from optim.core.checks import check_flag, check_integer
from optim.core.moments import bias_correction, moving_average, rectify
from optim.core.optimizer import CommonArguments, Optimizer, Slot, Tensor, check_range, elementwise


class _ScheduleFree(Optimizer):
    r"""What the schedule-free optimizers share; a subclass defines the `direction`.

    The method has three sequences: :math:`z` moves, :math:`x` averages, and the gradient is taken
    between them, at :math:`y = (1 - \beta) z + \beta x`, which is what the variable holds. Kept are
    :math:`y` and :math:`d = z - y`, which determine the others, begin at 0, and stay valid if
    the variable is assigned.
    """

    def __init__(
        self,
        learning_rate: Any,
        beta: tuple[str, float],
        r: float,
        weight_lr_power: float,
        weight_decay: float | None,
        warmup_steps: int = 0,
        **common: Unpack[CommonArguments],
    ) -> None:
        if common.get("use_ema"):
            raise ValueError(
                "`use_ema=True` averages weights that are evaluated as an average already. Leave "
                f"it out. Received: use_ema={common['use_ema']!r}"
            )
        super().__init__(learning_rate, weight_decay=weight_decay, **common)
        self._beta = check_range(*beta, 1e-6, 1.0)
        self.r = check_range("r", r, 0.0)
        self.weight_lr_power = check_range("weight_lr_power", weight_lr_power, 0.0)
        self.warmup_steps = check_integer("warmup_steps", warmup_steps, 0)

    def slot_shapes(self, shape: tuple[int, ...]) -> Mapping[str, tuple[int, ...] | Slot]:
        """The distance of the moving sequence, and what the weights of the average depend on.

        Args:
            shape: Shape of the variable.

        Returns:
            Shapes of ``"distance"`` and of two scalars.
        """
        return {"distance": shape, "weight_sum": (), "largest_rate": ()}

    def direction(
        self, gradient: Tensor, slots: dict[str, Tensor], step: Tensor
    ) -> tuple[Tensor, Tensor | float, dict[str, Tensor]]:
        """The direction of the step, a factor of the learning rate, and the new slots."""
        raise NotImplementedError

    @elementwise
    def update(
        self,
        parameter: Tensor,
        gradient: Tensor,
        slots: dict[str, Tensor],
        step: Tensor,
        learning_rate: Tensor,
        weight_decay: float,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One update of one tensor, see `Optimizer.update`."""
        direction, factor, new = self.direction(gradient, slots, step)
        if weight_decay:
            direction = direction + weight_decay * parameter
        rate = learning_rate * factor
        if self.warmup_steps:
            rate = rate * ops.minimum(step / self.warmup_steps, 1.0)
        largest = ops.maximum(slots["largest_rate"], rate)
        weight = largest**self.weight_lr_power * step**self.r
        total = slots["weight_sum"] + weight
        # While the rate has been 0 throughout, nothing has moved and there is nothing to average.
        share = ops.where(total > 0, weight / ops.maximum(total, 1e-30), 0.0)
        distance, kept = slots["distance"], self._beta * (1.0 - share)
        parameter = parameter + share * distance - (rate * (1.0 - kept)) * direction
        distance = (1.0 - share) * distance - (rate * kept) * direction
        new |= {"distance": distance, "weight_sum": total, "largest_rate": largest}
        return parameter, new

    def evaluated(
        self, parameter: Tensor, slots: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The average, and the slots with which training would continue from it."""
        average = parameter - (1.0 / self._beta - 1.0) * slots["distance"]
        return average, {**slots, "distance": ops.zeros_like(slots["distance"])}

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor, as a serializable dictionary."""
        return {
            **super().get_config(),
            "r": self.r,
            "weight_lr_power": self.weight_lr_power,
            "warmup_steps": self.warmup_steps,
        }


@keras.saving.register_keras_serializable(package="optim")
class ScheduleFreeAdamW(_ScheduleFree):
    r"""Schedule-free AdamW: no decay of the learning rate, and no need to know when to stop.

    With gradient :math:`g` at :math:`y`, :math:`\gamma_t` the learning rate, :math:`\hat v_t` as in
    `AdamW` and :math:`w_t = t^r \max_{s \le t} \gamma_s^p` (:math:`p` is ``weight_lr_power``):

    .. math::
        u_t &= g / (\sqrt{\hat v_t} + \epsilon) + \lambda\, y_{t-1} \\
        z_t &= z_{t-1} - \gamma_t\, u_t \\
        c_t &= w_t / \textstyle\sum_{s \le t} w_s \\
        x_t &= (1 - c_t)\, x_{t-1} + c_t z_t \\
        y_t &= (1 - \beta_1)\, z_t + \beta_1 x_t

    The variables hold :math:`y` during training; :math:`x` is what is evaluated and saved (see
    `optim.SwapEvaluationWeights`; `kbtrain.Trainer` does it by itself). Batch normalization
    collects its statistics at :math:`y`; with it, run some batches through the model before
    evaluating, or use a norm without statistics.

    Use a constant rate, best with ``warmup_steps``. In place of the momentum there is the average,
    so the state is as large as Adam's. `keras.optimizers.ScheduleFreeAdamW` averages with equal
    weights whatever the rate, and evaluates and saves :math:`y`.

    Args:
        learning_rate: A number, a learning-rate schedule or a callable without arguments.
        beta_1: How far the gradient is taken towards the average, in (0, 1).
        beta_2: Decay rate of the mean of the squared gradient, in [0, 1).
        epsilon: Keeps the denominator away from zero, not negative.
        r: Power of the step in the weights of the average.
        weight_lr_power: Power of the largest learning rate so far in these weights.
        weight_decay: Multiple of the variable added to the direction.
        warmup_steps: Updates in which the rate rises linearly to ``learning_rate``.
        **common: The arguments common to all optimizers, see `optim.Optimizer`.

    Raises:
        ValueError: If a hyperparameter is out of its range, or ``use_ema=True``.

    Example:
        >>> import keras, optim
        >>> variable = keras.Variable([1.0, -1.0])
        >>> optimizer = optim.ScheduleFreeAdamW(learning_rate=0.25)
        >>> optimizer.apply([keras.ops.array([3.0, -2.0])], [variable])
        >>> [round(float(x), 4) for x in keras.ops.convert_to_numpy(variable)]
        [0.75, -0.75]

    Reference:
        - [Defazio et al., The Road Less Scheduled](https://arxiv.org/abs/2405.15682)
    """

    def __init__(
        self,
        learning_rate: Any = 2.5e-3,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-8,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        weight_decay: float | None = 0.0,
        warmup_steps: int = 0,
        **common: Unpack[CommonArguments],
    ) -> None:
        super().__init__(
            learning_rate,
            ("beta_1", beta_1),
            r,
            weight_lr_power,
            weight_decay,
            warmup_steps,
            **common,
        )
        self.beta_1 = self._beta
        self.beta_2 = check_range("beta_2", beta_2, 0.0, 1.0)
        self.epsilon = check_range("epsilon", epsilon, 0.0)

    def slot_shapes(self, shape: tuple[int, ...]) -> Mapping[str, tuple[int, ...] | Slot]:
        """As for all schedule-free optimizers, and the mean of the squared gradient.

        Args:
            shape: Shape of the variable.

        Returns:
            Slot name -> shape.
        """
        return {**super().slot_shapes(shape), "velocity": shape}

    def direction(
        self, gradient: Tensor, slots: dict[str, Tensor], step: Tensor
    ) -> tuple[Tensor, Tensor | float, dict[str, Tensor]]:
        """Adam's, without momentum."""
        velocity = moving_average(slots["velocity"], gradient * gradient, self.beta_2)
        scale, offset, factor = self.adaptation(step)
        direction = gradient / (scale * ops.sqrt(velocity) + offset)
        return direction, factor, {"velocity": velocity}

    def adaptation(self, step: Tensor) -> tuple[Tensor, Tensor | float, Tensor | float]:
        """Factor of the root of the mean square, what is added to it, and factor of the rate."""
        return ops.rsqrt(bias_correction(self.beta_2, step)), self.epsilon, 1.0

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor, as a serializable dictionary."""
        return {
            **super().get_config(),
            "beta_1": self.beta_1,
            "beta_2": self.beta_2,
            "epsilon": self.epsilon,
        }


@keras.saving.register_keras_serializable(package="optim")
class ScheduleFreeRAdam(ScheduleFreeAdamW):
    r"""Schedule-free AdamW whose rate is rectified as in RAdam, in place of a warm-up.

    With :math:`\rho_\infty = 2 / (1 - \beta_2) - 1` and
    :math:`\rho_t = \rho_\infty - 2 t \beta_2^t / (1 - \beta_2^t)`, the learning rate is multiplied
    by

    .. math::
        \sqrt{\frac{(\rho_t - 4)(\rho_t - 2)\,\rho_\infty}
                   {(\rho_\infty - 4)(\rho_\infty - 2)\,\rho_t}} \quad \text{if } \rho_t > 4,

    and before that nothing moves (or, with ``silent_sgd_phase=False``, the gradient itself is the
    direction). Everything else is as in `ScheduleFreeAdamW`.

    Args:
        learning_rate: A number, a learning-rate schedule or a callable without arguments.
        beta_1: How far the gradient is taken towards the average, in (0, 1).
        beta_2: Decay rate of the mean of the squared gradient, in [0.6, 1).
        epsilon: Keeps the denominator away from zero, not negative.
        r: Power of the step in the weights of the average.
        weight_lr_power: Power of the largest learning rate so far in these weights.
        silent_sgd_phase: Do nothing, rather than plain descent, in the first updates.
        weight_decay: Multiple of the variable added to the direction.
        **common: The arguments common to all optimizers, see `optim.Optimizer`.

    Raises:
        ValueError: If a hyperparameter is out of its range, or ``use_ema=True``.

    Example:
        >>> import keras, optim
        >>> variable = keras.Variable([1.0, -1.0])
        >>> optimizer = optim.ScheduleFreeRAdam(learning_rate=0.25)
        >>> optimizer.apply([keras.ops.array([3.0, -2.0])], [variable])
        >>> [float(x) for x in keras.ops.convert_to_numpy(variable)]
        [1.0, -1.0]

    Reference:
        - [Defazio et al., The Road Less Scheduled](https://arxiv.org/abs/2405.15682)
        - [Liu et al., On the Variance of the Adaptive Learning Rate](https://arxiv.org/abs/1908.03265)
    """

    def __init__(
        self,
        learning_rate: Any = 2.5e-3,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-8,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        silent_sgd_phase: bool = True,
        weight_decay: float | None = 0.0,
        **common: Unpack[CommonArguments],
    ) -> None:
        super().__init__(
            learning_rate,
            beta_1,
            # Below 0.6 the sequence never gets past 4.
            check_range("beta_2", beta_2, 0.6, 1.0),
            epsilon,
            r,
            weight_lr_power,
            weight_decay,
            **common,
        )
        self.silent_sgd_phase = check_flag("silent_sgd_phase", silent_sgd_phase)

    def adaptation(self, step: Tensor) -> tuple[Tensor, Tensor | float, Tensor | float]:
        """Adam's with a rectified rate, once that is defined; the gradient itself before."""
        rectified, factor = rectify(self.beta_2, step, 4.0)
        scale, epsilon, _ = super().adaptation(step)
        before = 0.0 if self.silent_sgd_phase else 1.0
        return (
            ops.where(rectified, scale, 0.0),
            ops.where(rectified, epsilon, 1.0),
            ops.where(rectified, factor, before),
        )

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor, as a serializable dictionary."""
        config = {**super().get_config(), "silent_sgd_phase": self.silent_sgd_phase}
        del config["warmup_steps"]  # there is none: the rectified rate takes its place
        return config


@keras.saving.register_keras_serializable(package="optim")
class ScheduleFreeSGD(_ScheduleFree):
    r"""Schedule-free gradient descent.

    As `ScheduleFreeAdamW`, with :math:`u_t = g + \lambda\, y_{t-1}`.

    Args:
        learning_rate: A number, a learning-rate schedule or a callable without arguments.
        momentum: How far the gradient is taken towards the average, in (0, 1).
        r: Power of the step in the weights of the average.
        weight_lr_power: Power of the largest learning rate so far in these weights.
        weight_decay: Multiple of the variable added to the gradient.
        warmup_steps: Updates in which the rate rises linearly to ``learning_rate``.
        **common: The arguments common to all optimizers, see `optim.Optimizer`.

    Raises:
        ValueError: If a hyperparameter is out of its range, or ``use_ema=True``.

    Example:
        >>> import keras, optim
        >>> variable = keras.Variable([1.0, -1.0])
        >>> optimizer = optim.ScheduleFreeSGD(learning_rate=0.25)
        >>> optimizer.apply([keras.ops.array([2.0, -1.0])], [variable])
        >>> [float(x) for x in keras.ops.convert_to_numpy(variable)]
        [0.5, -0.75]

    Reference:
        - [Defazio et al., The Road Less Scheduled](https://arxiv.org/abs/2405.15682)
    """

    def __init__(
        self,
        learning_rate: Any = 1.0,
        momentum: float = 0.9,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        weight_decay: float | None = 0.0,
        warmup_steps: int = 0,
        **common: Unpack[CommonArguments],
    ) -> None:
        super().__init__(
            learning_rate,
            ("momentum", momentum),
            r,
            weight_lr_power,
            weight_decay,
            warmup_steps,
            **common,
        )
        self.momentum = self._beta

    def direction(
        self, gradient: Tensor, slots: dict[str, Tensor], step: Tensor
    ) -> tuple[Tensor, Tensor | float, dict[str, Tensor]]:
        """The gradient."""
        return gradient, 1.0, {}

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor, as a serializable dictionary."""
        return {**super().get_config(), "momentum": self.momentum}
