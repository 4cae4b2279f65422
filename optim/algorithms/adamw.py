"""AdamW: Adam with decoupled weight decay."""

from __future__ import annotations

from typing import Any, Unpack

import keras

from optim.core.checks import check_flag
from optim.core.moments import adam_denominator, adam_moments, bias_correction
from optim.core.optimizer import CommonArguments, Optimizer, Tensor, check_range, elementwise, fused


@keras.saving.register_keras_serializable(package="optim")
class AdamW(Optimizer):
    r"""Adam with decoupled weight decay, in the arithmetic of PyTorch and optax.

    With gradient :math:`g`, learning rate :math:`\eta`, weight decay :math:`\lambda` and the update
    counter :math:`t`, from 1:

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1)\, g \\
        v_t &= \beta_2 v_{t-1} + (1 - \beta_2)\, g^2 \\
        \hat m_t &= m_t / (1 - \beta_1^t), \qquad \hat v_t = v_t / (1 - \beta_2^t) \\
        p_t &= (1 - \eta \lambda)\, p_{t-1} - \eta\, \hat m_t / (\sqrt{\hat v_t} + \epsilon)

    `keras.optimizers.AdamW` adds epsilon to :math:`\sqrt{v_t}` before the correction, so its
    epsilon is in effect larger during the first few thousand updates; at gradients around 1e-7 the
    two move quite differently. Its defaults differ as well (epsilon 1e-7, weight decay 0.004).

    With ``amsgrad`` the largest :math:`v` seen so far takes the place of :math:`v_t`, as in PyTorch
    (before the correction; `keras.optimizers.AdamW` does the same).

    On PyTorch the update is executed by PyTorch's own fused kernel.

    Args:
        learning_rate: A number, a learning-rate schedule or a callable without arguments.
        beta_1: Decay rate of the mean of the gradient, in [0, 1).
        beta_2: Decay rate of the mean of its square, in [0, 1).
        epsilon: Keeps the denominator away from zero, not negative.
        weight_decay: Fraction of ``learning_rate * variable`` taken off per update.
        amsgrad: Divide by the largest mean square so far; one more slot.
        **common: The arguments common to all optimizers, see `optim.Optimizer`.

    Raises:
        ValueError: If a hyperparameter is out of its range.

    Example:
        >>> import keras, optim
        >>> variable = keras.Variable([1.0, -1.0])
        >>> optimizer = optim.AdamW(learning_rate=0.25, weight_decay=0.0)
        >>> optimizer.apply([keras.ops.array([3.0, -2.0])], [variable])
        >>> [round(float(x), 6) for x in keras.ops.convert_to_numpy(variable)]
        [0.75, -0.75]

    Reference:
        - [Loshchilov and Hutter, Decoupled Weight Decay Regularization](https://arxiv.org/abs/1711.05101)
        - [Reddi et al., On the Convergence of Adam and Beyond](https://arxiv.org/abs/1904.09237)
    """

    def __init__(
        self,
        learning_rate: Any = 1e-3,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-8,
        weight_decay: float | None = 0.01,
        amsgrad: bool = False,
        **common: Unpack[CommonArguments],
    ) -> None:
        super().__init__(learning_rate, weight_decay=weight_decay, **common)
        self.beta_1 = check_range("beta_1", beta_1, 0.0, 1.0)
        self.beta_2 = check_range("beta_2", beta_2, 0.0, 1.0)
        self.epsilon = check_range("epsilon", epsilon, 0.0)
        self.amsgrad = check_flag("amsgrad", amsgrad)

    def slot_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """The running means of the gradient and of its square.

        Args:
            shape: Shape of the variable.

        Returns:
            Shapes of ``"momentum"`` and ``"velocity"``, and ``"velocity_max"`` for AMSGrad.
        """
        slots = {"momentum": shape, "velocity": shape}
        return {**slots, "velocity_max": shape} if self.amsgrad else slots

    @fused("adamw")
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
        slots = adam_moments(slots, gradient, self.beta_1, self.beta_2)
        denominator = adam_denominator(slots, step, self.beta_2, self.epsilon)
        scale = learning_rate / bias_correction(self.beta_1, step)
        delta = scale * slots["momentum"] / denominator
        if weight_decay:
            # Subtracted with the step: `1 - learning_rate * weight_decay` would round to a few
            # digits of the decay.
            delta = delta + (learning_rate * weight_decay) * parameter
        return parameter - delta, slots

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor, as a serializable dictionary."""
        return {
            **super().get_config(),
            "beta_1": self.beta_1,
            "beta_2": self.beta_2,
            "epsilon": self.epsilon,
            "amsgrad": self.amsgrad,
        }
