"""AdamW: Adam with decoupled weight decay."""

import math
from typing import Any, Unpack

import keras
from keras import ops

from optim.optimizer import CommonArguments, Optimizer, Tensor, check_range, fused


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

    On PyTorch the update is executed by PyTorch's own fused kernel.

    Args:
        learning_rate: a number, a learning-rate schedule or a callable without arguments.
        beta_1: decay rate of the mean of the gradient, in [0, 1).
        beta_2: decay rate of the mean of its square, in [0, 1).
        epsilon: keeps the denominator away from zero, not negative.
        weight_decay: fraction of ``learning_rate * variable`` taken off per update.
        **common: the arguments common to all optimizers, see `optim.Optimizer`.

    Raises:
        ValueError: if a hyperparameter is out of its range.

    Example:
        >>> import keras, optim
        >>> variable = keras.Variable([1.0, -1.0])
        >>> optimizer = optim.AdamW(learning_rate=0.25, weight_decay=0.0)
        >>> optimizer.apply([keras.ops.array([3.0, -2.0])], [variable])
        >>> [round(float(x), 6) for x in keras.ops.convert_to_numpy(variable)]
        [0.75, -0.75]

    Reference:
        - [Loshchilov and Hutter, Decoupled Weight Decay Regularization](https://arxiv.org/abs/1711.05101)
    """

    def __init__(
        self,
        learning_rate: Any = 1e-3,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-8,
        weight_decay: float | None = 0.01,
        **common: Unpack[CommonArguments],
    ) -> None:
        super().__init__(learning_rate, weight_decay=weight_decay, **common)
        self.beta_1 = check_range("beta_1", beta_1, 0.0, 1.0)
        self.beta_2 = check_range("beta_2", beta_2, 0.0, 1.0)
        self.epsilon = check_range("epsilon", epsilon, 0.0)

    def slot_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """The running means of the gradient and of its square.

        Args:
            shape: shape of the variable.

        Returns:
            Shapes of ``"momentum"`` and ``"velocity"``.
        """
        return {"momentum": shape, "velocity": shape}

    @fused("adamw")
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
        momentum = moving_average(slots["momentum"], gradient, self.beta_1)
        velocity = moving_average(slots["velocity"], gradient * gradient, self.beta_2)
        scale = 1.0 / bias_correction(self.beta_1, step)
        root_scale = ops.rsqrt(bias_correction(self.beta_2, step))
        denominator = root_scale * ops.sqrt(velocity) + self.epsilon
        movement = (learning_rate * scale) * momentum / denominator
        if weight_decay:
            # Subtracted with the step: `1 - learning_rate * weight_decay` would round to a few
            # digits of the decay.
            movement = movement + (learning_rate * weight_decay) * parameter
        parameter = parameter - movement
        return parameter, {"momentum": momentum, "velocity": velocity}

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor, as a serializable dictionary."""
        return {
            **super().get_config(),
            "beta_1": self.beta_1,
            "beta_2": self.beta_2,
            "epsilon": self.epsilon,
        }


def moving_average(average: Tensor, value: Tensor, beta: float) -> Tensor:
    """``beta * average + (1 - beta) * value``, with the right fixed point in float32.

    A ``beta`` near 1 rounds so that the factors no longer add up to 1 (0.999 by 1e-5 of their
    difference); written as a step of size ``1 - beta`` nothing is lost. For a small ``beta`` that
    form would cancel instead.

    Args:
        average: float32 tensor.
        value: float32 tensor of the same shape.
        beta: decay rate in [0, 1).

    Returns:
        float32 tensor of the same shape.
    """
    if beta < 0.5:
        return beta * average + (1.0 - beta) * value
    return average + (1.0 - beta) * (value - average)


def bias_correction(beta: float, step: Tensor) -> Tensor:
    """``1 - beta ** step`` without the cancellation that float32 has for ``beta`` near 1.

    Args:
        beta: decay rate in [0, 1).
        step: float32 scalar, at least 1.

    Returns:
        float32 scalar.
    """
    log_beta = math.log(beta) if beta > 0 else -math.inf
    return -ops.expm1(step * log_beta)
