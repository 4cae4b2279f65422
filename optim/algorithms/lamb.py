"""LAMB: AdamW with a trust ratio per tensor, for large batches."""

from __future__ import annotations

from typing import Any, Unpack

import keras
from keras import ops

from optim.core.moments import adam_denominator, adam_moments, bias_correction
from optim.core.optimizer import CommonArguments, Optimizer, Tensor, check_range, elementwise
from optim.kernels import backend as kernels


@keras.saving.register_keras_serializable(package="optim")
class LAMB(Optimizer):
    r"""LAMB, in the arithmetic of its paper and of optax.

    With Adam's corrected means :math:`\hat m_t` and :math:`\hat v_t`, for each variable:

    .. math::
        r_t &= \hat m_t / (\sqrt{\hat v_t} + \epsilon) + \lambda p_{t-1} \\
        p_t &= p_{t-1} - \eta\, \frac{\lVert p_{t-1} \rVert}{\lVert r_t \rVert}\, r_t

    The ratio is 1 where one of the norms is 0. `keras.optimizers.Lamb` applies the weight decay
    outside of the ratio, where it is not scaled by it.

    Args:
        learning_rate: A number, a learning-rate schedule or a callable without arguments.
        beta_1: Decay rate of the mean of the gradient, in [0, 1).
        beta_2: Decay rate of the mean of its square, in [0, 1).
        epsilon: Keeps the denominator away from zero, not negative.
        weight_decay: Part of the direction, before the trust ratio.
        **common: The arguments common to all optimizers, see `optim.Optimizer`.

    Raises:
        ValueError: If a hyperparameter is out of its range.

    Example:
        >>> import keras, optim
        >>> variable = keras.Variable([1.0, -1.0])
        >>> optimizer = optim.LAMB(learning_rate=0.25)
        >>> optimizer.apply([keras.ops.array([3.0, -2.0])], [variable])
        >>> [round(float(x), 4) for x in keras.ops.convert_to_numpy(variable)]
        [0.75, -0.75]

    Reference:
        - [You et al., Large Batch Optimization for Deep Learning](https://arxiv.org/abs/1904.00962)
    """

    def __init__(
        self,
        learning_rate: Any = 1e-3,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-6,
        weight_decay: float | None = None,
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
        slots = adam_moments(slots, gradient, self.beta_1, self.beta_2)
        denominator = adam_denominator(slots, step, self.beta_2, self.epsilon)
        direction = slots["momentum"] * (1.0 / bias_correction(self.beta_1, step)) / denominator
        if weight_decay:
            direction = direction + weight_decay * parameter
        size, length = norm(parameter), norm(direction)
        usable = ops.logical_and(size > 0.0, length > 0.0)
        ratio = ops.where(usable, size / ops.where(usable, length, 1.0), 1.0)
        return parameter - (learning_rate * ratio) * direction, slots

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor, as a serializable dictionary."""
        return {
            **super().get_config(),
            "beta_1": self.beta_1,
            "beta_2": self.beta_2,
            "epsilon": self.epsilon,
        }


def norm(x: Tensor) -> Tensor:
    """The Euclidean norm of all elements of a float32 tensor, a scalar."""
    return ops.sqrt(kernels.squared_norm(x))
