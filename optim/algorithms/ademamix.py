"""AdEMAMix: Adam with a second, much slower mean of the gradients."""

from __future__ import annotations

import math
from typing import Any, Unpack

import keras
from keras import ops

from optim.core.moments import adam_denominator, adam_moments, bias_correction
from optim.core.optimizer import CommonArguments, Optimizer, Tensor, check_range, elementwise


@keras.saving.register_keras_serializable(package="optim")
class AdEMAMix(Optimizer):
    r"""AdEMAMix, in the arithmetic of its paper.

    With Adam's corrected means :math:`\hat m_t` and :math:`\hat v_t`, and a slow mean
    :math:`s_t` without correction:

    .. math::
        s_t &= \beta_3(t)\, s_{t-1} + (1 - \beta_3(t))\, g \\
        p_t &= p_{t-1} - \eta \left(
            \frac{\hat m_t + \alpha(t)\, s_t}{\sqrt{\hat v_t} + \epsilon} + \lambda p_{t-1} \right)

    An old mean is wrong at the beginning, so both are brought in slowly:
    :math:`\alpha(t) = \alpha \min(1, t / T_\alpha)`, and :math:`\beta_3(t)` goes from
    :math:`\beta_1` to :math:`\beta_3` over :math:`T_{\beta_3}` updates, linearly in its half-life:
    :math:`1 / \ln \beta_3(t) = (1 - \tau) / \ln \beta_1 + \tau / \ln \beta_3` with
    :math:`\tau = \min(1, t / T_{\beta_3})`. The paper takes the length of the training for both.

    Args:
        learning_rate: A number, a learning-rate schedule or a callable without arguments.
        beta_1: Decay rate of the mean of the gradient, in [0, 1).
        beta_2: Decay rate of the mean of its square, in [0, 1).
        beta_3: Decay rate of the slow mean, in [0, 1).
        alpha: Weight of the slow mean, not negative.
        t_alpha: Updates over which ``alpha`` grows from 0; ``None``: at once.
        t_beta3: Updates over which the slow mean slows down; ``None``: at once.
        epsilon: Keeps the denominator away from zero, not negative.
        weight_decay: Fraction of ``learning_rate * variable`` taken off per update.
        **common: The arguments common to all optimizers, see `optim.Optimizer`.

    Raises:
        ValueError: If a hyperparameter is out of its range.

    Example:
        >>> import keras, optim
        >>> variable = keras.Variable([1.0, -1.0])
        >>> optimizer = optim.AdEMAMix(learning_rate=0.25, t_alpha=100, weight_decay=0.0)
        >>> optimizer.apply([keras.ops.array([3.0, -2.0])], [variable])
        >>> [round(float(x), 4) for x in keras.ops.convert_to_numpy(variable)]
        [0.75, -0.75]

    Reference:
        - [Pagliardini et al., The AdEMAMix Optimizer](https://arxiv.org/abs/2409.03137)
    """

    def __init__(
        self,
        learning_rate: Any = 1e-3,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        beta_3: float = 0.9999,
        alpha: float = 5.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
        epsilon: float = 1e-8,
        weight_decay: float | None = 0.01,
        **common: Unpack[CommonArguments],
    ) -> None:
        super().__init__(learning_rate, weight_decay=weight_decay, **common)
        self.beta_1 = check_range("beta_1", beta_1, 0.0, 1.0)
        self.beta_2 = check_range("beta_2", beta_2, 0.0, 1.0)
        self.beta_3 = check_range("beta_3", beta_3, 0.0, 1.0)
        self.alpha = check_range("alpha", alpha, 0.0)
        self.t_alpha = None if t_alpha is None else check_range("t_alpha", t_alpha, 1)
        self.t_beta3 = None if t_beta3 is None else check_range("t_beta3", t_beta3, 1)
        self.epsilon = check_range("epsilon", epsilon, 0.0)

    def slot_shapes(self, shape: tuple[int, ...]) -> dict[str, Any]:
        """The fast and the slow mean of the gradient, and the mean of its square.

        Args:
            shape: Shape of the variable.

        Returns:
            Shapes of ``"momentum"``, ``"slow_momentum"`` and ``"velocity"``.
        """
        return {"momentum": shape, "slow_momentum": shape, "velocity": shape}

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
        moments = adam_moments(slots, gradient, self.beta_1, self.beta_2)
        slow = slots["slow_momentum"]
        slow = slow + self._slow_share(step) * (gradient - slow)
        denominator = adam_denominator(moments, step, self.beta_2, self.epsilon)
        # One factor for the sum: a kernel has one for nothing.
        correction = bias_correction(self.beta_1, step)
        both = moments["momentum"] + (self._slow_weight(step) * correction) * slow
        direction = (learning_rate / correction) * both
        if weight_decay:
            parameter = parameter - (learning_rate * weight_decay) * parameter
        return parameter - direction / denominator, {**moments, "slow_momentum": slow}

    def _slow_weight(self, step: Tensor) -> Any:
        """Alpha at a step."""
        if self.t_alpha is None:
            return self.alpha
        return self.alpha * ops.minimum(1.0, step / self.t_alpha)

    def _slow_share(self, step: Tensor) -> Any:
        """1 - beta_3 at a step."""
        if self.t_beta3 is None or not self.beta_3:
            return 1.0 - self.beta_3
        reached = ops.minimum(1.0, step / self.t_beta3)
        first = 1.0 / math.log(self.beta_1) if self.beta_1 else 0.0
        last = 1.0 / math.log(self.beta_3)
        return -ops.expm1(1.0 / (first * (1.0 - reached) + last * reached))

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor, as a serializable dictionary."""
        return {
            **super().get_config(),
            "beta_1": self.beta_1,
            "beta_2": self.beta_2,
            "beta_3": self.beta_3,
            "alpha": self.alpha,
            "t_alpha": self.t_alpha,
            "t_beta3": self.t_beta3,
            "epsilon": self.epsilon,
        }
