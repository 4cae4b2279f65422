"""RAdam: Adam with a rectified learning rate instead of a warm-up."""

from __future__ import annotations

from typing import Any, Unpack

import keras
from keras import ops

from optim.core.checks import check_flag
from optim.core.moments import adam_moments, add_l2, bias_correction, rectify
from optim.core.optimizer import CommonArguments, Optimizer, Tensor, check_range, elementwise


@keras.saving.register_keras_serializable(package="optim")
class RAdam(Optimizer):
    r"""Rectified Adam, in the arithmetic of PyTorch.

    With Adam's running means :math:`m_t` and :math:`v_t` and
    :math:`\rho_\infty = 2 / (1 - \beta_2) - 1`:

    .. math::
        \rho_t &= \rho_\infty - 2 t \beta_2^t / (1 - \beta_2^t) \\
        r_t &= \sqrt{\frac{(\rho_t - 4)(\rho_t - 2)\,\rho_\infty}
                           {(\rho_\infty - 4)(\rho_\infty - 2)\,\rho_t}} \\
        p_t &= p_{t-1} - \eta\, \hat m_t \cdot
            \begin{cases} r_t \sqrt{1 - \beta_2^t} / (\sqrt{v_t} + \epsilon) & \rho_t > 5 \\
                           1 & \text{else} \end{cases}

    As in PyTorch epsilon is added before the correction of the bias, unlike in `optim.Adam`. With
    the default :math:`\beta_2` the first five updates are those of plain momentum.

    Args:
        learning_rate: A number, a learning-rate schedule or a callable without arguments.
        beta_1: Decay rate of the mean of the gradient, in [0, 1).
        beta_2: Decay rate of the mean of its square, in [0, 1).
        epsilon: Keeps the denominator away from zero, not negative.
        weight_decay: Added to the gradient as ``weight_decay * variable``, or see the next.
        decoupled_weight_decay: Take ``learning_rate * weight_decay * variable`` off the variable
            instead, as `optim.AdamW` does.
        **common: The arguments common to all optimizers, see `optim.Optimizer`.

    Raises:
        ValueError: If a hyperparameter is out of its range.

    Example:
        >>> import keras, optim
        >>> variable = keras.Variable([1.0, -1.0])
        >>> optimizer = optim.RAdam(learning_rate=0.25)
        >>> optimizer.apply([keras.ops.array([3.0, -2.0])], [variable])
        >>> [round(float(x), 4) for x in keras.ops.convert_to_numpy(variable)]
        [0.25, -0.5]

    Reference:
        - [Liu et al., On the Variance of the Adaptive Learning Rate and Beyond](https://arxiv.org/abs/1908.03265)
    """

    def __init__(
        self,
        learning_rate: Any = 1e-3,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-8,
        weight_decay: float | None = None,
        decoupled_weight_decay: bool = False,
        **common: Unpack[CommonArguments],
    ) -> None:
        super().__init__(learning_rate, weight_decay=weight_decay, **common)
        self.beta_1 = check_range("beta_1", beta_1, 0.0, 1.0)
        self.beta_2 = check_range("beta_2", beta_2, 0.0, 1.0)
        self.epsilon = check_range("epsilon", epsilon, 0.0)
        self.decoupled_weight_decay = check_flag("decoupled_weight_decay", decoupled_weight_decay)

    def slot_shapes(self, shape: tuple[int, ...]) -> dict[str, Any]:
        """The running means of the gradient and of its square.

        Args:
            shape: Shape of the variable.

        Returns:
            Shapes of ``"momentum"`` and ``"velocity"``.
        """
        return {"momentum": shape, "velocity": shape}

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
        slots = adam_moments(slots, gradient, self.beta_1, self.beta_2)
        rectified, rectification = rectify(self.beta_2, step)
        corrected = rectification * ops.sqrt(bias_correction(self.beta_2, step))
        # (sqrt(v) + epsilon) / corrected, and 1 as long as that is not defined.
        scale = ops.where(rectified, 1.0 / corrected, 0.0)
        offset = ops.where(rectified, self.epsilon / corrected, 1.0)
        rate = learning_rate / bias_correction(self.beta_1, step)
        delta = rate * slots["momentum"] / (scale * ops.sqrt(slots["velocity"]) + offset)
        return decayed - delta, slots

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor, as a serializable dictionary."""
        return {
            **super().get_config(),
            "beta_1": self.beta_1,
            "beta_2": self.beta_2,
            "epsilon": self.epsilon,
            "decoupled_weight_decay": self.decoupled_weight_decay,
        }
