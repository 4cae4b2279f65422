"""StableAdamW: AdamW with Adafactor's clipping of the update, per tensor."""

from __future__ import annotations

from typing import Any, Unpack

import keras
from keras import ops

from optim.core.moments import bias_correction
from optim.core.optimizer import CommonArguments, Optimizer, Tensor, check_range, elementwise
from optim.kernels import backend as kernels


@keras.saving.register_keras_serializable(package="optim")
class StableAdamW(Optimizer):
    r"""StableAdamW, in the arithmetic of its paper.

    The correction of the bias is in the decay rates,
    :math:`\hat\beta_t = \beta (1 - \beta^{t-1}) / (1 - \beta^t)`, and the learning rate of a
    variable is lowered where its gradient has outgrown the mean square:

    .. math::
        m_t &= \hat\beta_{1,t}\, m_{t-1} + (1 - \hat\beta_{1,t})\, g \\
        v_t &= \hat\beta_{2,t}\, v_{t-1} + (1 - \hat\beta_{2,t})\, g^2 \\
        \mathrm{RMS}_t &= \sqrt{\operatorname{mean}(g^2 / \max(v_t, \epsilon^2))}, \qquad
            \eta_t = \eta / \max(1, \mathrm{RMS}_t) \\
        p_t &= (1 - \eta_t \lambda)\, p_{t-1} - \eta_t\, m_t / (\sqrt{v_t} + \epsilon)

    So spikes need no clipping of the gradient. The options of torch-optimi for a decay that does
    not depend on the learning rate, and for Kahan summation, are not here: low-precision variables
    follow their float32 trajectory anyway.

    Args:
        learning_rate: A number, a learning-rate schedule or a callable without arguments.
        beta_1: Decay rate of the mean of the gradient, in [0, 1).
        beta_2: Decay rate of the mean of its square, in [0, 1).
        epsilon: Keeps the denominator away from zero, not negative.
        weight_decay: Fraction of ``learning_rate * variable`` taken off per update.
        **common: The arguments common to all optimizers, see `optim.Optimizer`.

    Raises:
        ValueError: If a hyperparameter is out of its range.

    Example:
        >>> import keras, optim
        >>> variable = keras.Variable([1.0, -1.0])
        >>> optimizer = optim.StableAdamW(learning_rate=0.25, weight_decay=0.0)
        >>> optimizer.apply([keras.ops.array([3.0, -2.0])], [variable])
        >>> [round(float(x), 4) for x in keras.ops.convert_to_numpy(variable)]
        [0.75, -0.75]

    Reference:
        - [Wortsman et al., Stable and low-precision training](https://arxiv.org/abs/2304.13013)
    """

    def __init__(
        self,
        learning_rate: Any = 1e-3,
        beta_1: float = 0.9,
        beta_2: float = 0.99,
        epsilon: float = 1e-8,
        weight_decay: float | None = 0.01,
        **common: Unpack[CommonArguments],
    ) -> None:
        super().__init__(learning_rate, weight_decay=weight_decay, **common)
        self.beta_1 = check_range("beta_1", beta_1, 0.0, 1.0)
        self.beta_2 = check_range("beta_2", beta_2, 0.0, 1.0)
        self.epsilon = check_range("epsilon", epsilon, 0.0)

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
        square = gradient * gradient
        share_1 = (1.0 - self.beta_1) / bias_correction(self.beta_1, step)
        share_2 = (1.0 - self.beta_2) / bias_correction(self.beta_2, step)
        momentum = slots["momentum"] + share_1 * (gradient - slots["momentum"])
        velocity = slots["velocity"] + share_2 * (square - slots["velocity"])
        floor = max(self.epsilon * self.epsilon, SMALLEST_SQUARE)
        relative = gradient / ops.maximum(velocity, floor)
        growth = ops.sqrt(kernels.mean_product(gradient, relative))
        rate = learning_rate / ops.maximum(1.0, growth)
        if weight_decay:
            parameter = parameter - (rate * weight_decay) * parameter
        delta = rate * momentum / (ops.sqrt(velocity) + self.epsilon)
        return parameter - delta, {"momentum": momentum, "velocity": velocity}

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor, as a serializable dictionary."""
        return {
            **super().get_config(),
            "beta_1": self.beta_1,
            "beta_2": self.beta_2,
            "epsilon": self.epsilon,
        }


SMALLEST_SQUARE = 1e-30
"""Below it a square in float32 has lost its digits."""
