"""Lion: the sign of an interpolated momentum."""

from __future__ import annotations

from typing import Any, Unpack

import keras
from keras import ops

from optim.core.moments import moving_average
from optim.core.optimizer import CommonArguments, Optimizer, Tensor, check_range, elementwise


@keras.saving.register_keras_serializable(package="optim")
class Lion(Optimizer):
    r"""Lion (EvoLved Sign Momentum), in the arithmetic of its paper.

    .. math::
        c_t &= \beta_1 m_{t-1} + (1 - \beta_1)\, g \\
        p_t &= p_{t-1} - \eta\, (\operatorname{sign}(c_t) + \lambda p_{t-1}) \\
        m_t &= \beta_2 m_{t-1} + (1 - \beta_2)\, g

    All elements move by the same amount, so the learning rate is 3 to 10 times smaller, and the
    weight decay as much larger, than for `optim.AdamW`. `keras.optimizers.Lion` has the same rule;
    here state and arithmetic are float32 for low-precision variables too.

    Args:
        learning_rate: A number, a learning-rate schedule or a callable without arguments.
        beta_1: Share of the momentum in the direction, in [0, 1).
        beta_2: Decay rate of the momentum, in [0, 1).
        weight_decay: Fraction of ``learning_rate * variable`` taken off per update.
        **common: The arguments common to all optimizers, see `optim.Optimizer`.

    Raises:
        ValueError: If a hyperparameter is out of its range.

    Example:
        >>> import keras, optim
        >>> variable = keras.Variable([1.0, -1.0])
        >>> optimizer = optim.Lion(learning_rate=0.25)
        >>> optimizer.apply([keras.ops.array([3.0, -2.0])], [variable])
        >>> [round(float(x), 4) for x in keras.ops.convert_to_numpy(variable)]
        [0.75, -0.75]

    Reference:
        - [Chen et al., Symbolic Discovery of Optimization Algorithms](https://arxiv.org/abs/2302.06675)
    """

    def __init__(
        self,
        learning_rate: Any = 1e-4,
        beta_1: float = 0.9,
        beta_2: float = 0.99,
        weight_decay: float | None = None,
        **common: Unpack[CommonArguments],
    ) -> None:
        super().__init__(learning_rate, weight_decay=weight_decay, **common)
        self.beta_1 = check_range("beta_1", beta_1, 0.0, 1.0)
        self.beta_2 = check_range("beta_2", beta_2, 0.0, 1.0)

    def slot_shapes(self, shape: tuple[int, ...]) -> dict[str, Any]:
        """The momentum.

        Args:
            shape: Shape of the variable.

        Returns:
            Shape of ``"momentum"``.
        """
        return {"momentum": shape}

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
        mixed = moving_average(slots["momentum"], gradient, self.beta_1)
        # PyTorch's sign of NaN is 0, which would hide it: the weight would not change.
        direction = ops.sign(mixed) + 0.0 * mixed
        if weight_decay:
            direction = direction + weight_decay * parameter
        momentum = moving_average(slots["momentum"], gradient, self.beta_2)
        return parameter - learning_rate * direction, {"momentum": momentum}

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor, as a serializable dictionary."""
        return {
            **super().get_config(),
            "beta_1": self.beta_1,
            "beta_2": self.beta_2,
        }
