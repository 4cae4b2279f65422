"""NAdam: Adam with Nesterov momentum."""

from __future__ import annotations

import math
from typing import Any, Unpack

import keras
from keras import ops

from optim.core.checks import check_flag
from optim.core.moments import adam_denominator, adam_moments, add_l2
from optim.core.optimizer import CommonArguments, Optimizer, Tensor, check_range, elementwise


@keras.saving.register_keras_serializable(package="optim")
class NAdam(Optimizer):
    r"""Adam with Nesterov momentum, in the arithmetic of PyTorch.

    With Adam's running means :math:`m_t` and :math:`v_t`, and :math:`\psi` the ``momentum_decay``:

    .. math::
        \mu_t &= \beta_1 (1 - 0.5 \cdot 0.96^{t \psi}) \\
        \hat m_t &= \mu_{t+1} m_t / (1 - \textstyle\prod_{i=1}^{t+1} \mu_i)
                   + (1 - \mu_t)\, g / (1 - \textstyle\prod_{i=1}^{t} \mu_i) \\
        p_t &= p_{t-1} - \eta\, \hat m_t / (\sqrt{\hat v_t} + \epsilon)

    The product of the :math:`\mu_i` is kept per variable (as one minus it, so that it starts at 0).
    `keras.optimizers.Nadam` keeps one for all variables, fixes :math:`\psi` at 1 and adds epsilon
    to :math:`\sqrt{v_t}` with another correction.

    Args:
        learning_rate: A number, a learning-rate schedule or a callable without arguments.
        beta_1: Decay rate of the mean of the gradient, in [0, 1).
        beta_2: Decay rate of the mean of its square, in [0, 1).
        epsilon: Keeps the denominator away from zero, not negative.
        weight_decay: Added to the gradient as ``weight_decay * variable``, or see the next.
        momentum_decay: How fast the momentum grows to ``beta_1``, not negative.
        decoupled_weight_decay: Take ``learning_rate * weight_decay * variable`` off the variable
            instead, as `optim.AdamW` does.
        **common: The arguments common to all optimizers, see `optim.Optimizer`.

    Raises:
        ValueError: If a hyperparameter is out of its range.

    Example:
        >>> import keras, optim
        >>> variable = keras.Variable([1.0, -1.0])
        >>> optimizer = optim.NAdam(learning_rate=0.25)
        >>> optimizer.apply([keras.ops.array([3.0, -2.0])], [variable])
        >>> [round(float(x), 4) for x in keras.ops.convert_to_numpy(variable)]
        [0.7359, -0.7359]

    Reference:
        - [Dozat, Incorporating Nesterov Momentum into Adam](https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ)
    """

    def __init__(
        self,
        learning_rate: Any = 2e-3,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-8,
        weight_decay: float | None = None,
        momentum_decay: float = 4e-3,
        decoupled_weight_decay: bool = False,
        **common: Unpack[CommonArguments],
    ) -> None:
        super().__init__(learning_rate, weight_decay=weight_decay, **common)
        self.beta_1 = check_range("beta_1", beta_1, 0.0, 1.0)
        self.beta_2 = check_range("beta_2", beta_2, 0.0, 1.0)
        self.epsilon = check_range("epsilon", epsilon, 0.0)
        self.momentum_decay = check_range("momentum_decay", momentum_decay, 0.0)
        self.decoupled_weight_decay = check_flag("decoupled_weight_decay", decoupled_weight_decay)

    def slot_shapes(self, shape: tuple[int, ...]) -> dict[str, Any]:
        """The running means, and one minus the product of the momenta so far.

        Args:
            shape: Shape of the variable.

        Returns:
            Shapes of ``"momentum"``, ``"velocity"`` and the scalar ``"momentum_used"``.
        """
        return {"momentum": shape, "velocity": shape, "momentum_used": ()}

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
        decayed = parameter
        if self.decoupled_weight_decay:
            decayed = parameter - (learning_rate * weight_decay) * parameter
        else:
            gradient = add_l2(gradient, parameter, weight_decay)
        moments = adam_moments(slots, gradient, self.beta_1, self.beta_2)
        denominator = adam_denominator(moments, step, self.beta_2, self.epsilon)
        mu, mu_next = self._momentum(step), self._momentum(step + 1.0)
        # 1 - mu * (1 - used), of two terms that are not negative.
        used = (1.0 - mu) + mu * slots["momentum_used"]
        used_next = (1.0 - mu_next) + mu_next * used
        # The rates of the gradient and of the momentum; one factor for the sum: a kernel has one
        # for nothing.
        gradient_rate = (1.0 - mu) / used
        momentum_rate = mu_next / used_next
        both = gradient + (momentum_rate / gradient_rate) * moments["momentum"]
        delta = (learning_rate * gradient_rate) * both / denominator
        return decayed - delta, {**moments, "momentum_used": used}

    def _momentum(self, step: Tensor) -> Tensor:
        return self.beta_1 * (1.0 - 0.5 * ops.exp(step * (self.momentum_decay * math.log(0.96))))

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor, as a serializable dictionary."""
        return {
            **super().get_config(),
            "beta_1": self.beta_1,
            "beta_2": self.beta_2,
            "epsilon": self.epsilon,
            "momentum_decay": self.momentum_decay,
            "decoupled_weight_decay": self.decoupled_weight_decay,
        }
