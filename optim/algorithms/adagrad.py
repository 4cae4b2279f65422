"""Adagrad: steps divided by the root of the sum of all squared gradients."""

from __future__ import annotations

from typing import Any, Unpack

import keras
from keras import ops

from optim.core.moments import add_l2
from optim.core.optimizer import (
    CommonArguments,
    Optimizer,
    Slot,
    Tensor,
    check_range,
    elementwise,
    fused,
)


@keras.saving.register_keras_serializable(package="optim")
class Adagrad(Optimizer):
    r"""Adagrad, in the arithmetic of PyTorch.

    .. math::
        g' &= g + \lambda p_{t-1} \\
        s_t &= s_{t-1} + g'^2 \\
        p_t &= p_{t-1} - \frac{\eta}{1 + (t - 1)\, \gamma} \cdot \frac{g'}{\sqrt{s_t} + \epsilon}

    with :math:`\gamma` the ``lr_decay`` and :math:`s_0` the ``initial_accumulator_value``.
    `keras.optimizers.Adagrad` starts at 0.1, divides by :math:`\sqrt{s_t + \epsilon}` and has the
    epsilon 1e-7.

    Args:
        learning_rate: A number, a learning-rate schedule or a callable without arguments.
        lr_decay: How fast the learning rate falls with the number of updates, not negative.
        initial_accumulator_value: Value the sum starts at, not negative.
        epsilon: Keeps the denominator away from zero, not negative.
        weight_decay: Added to the gradient as ``weight_decay * variable`` (an L2 penalty, as in
            PyTorch; `keras.optimizers` decouples it).
        **common: The arguments common to all optimizers, see `optim.Optimizer`.

    Raises:
        ValueError: If a hyperparameter is out of its range.

    Example:
        >>> import keras, optim
        >>> variable = keras.Variable([1.0, -1.0])
        >>> optimizer = optim.Adagrad(learning_rate=0.25)
        >>> optimizer.apply([keras.ops.array([3.0, -2.0])], [variable])
        >>> [round(float(x), 4) for x in keras.ops.convert_to_numpy(variable)]
        [0.75, -0.75]

    Reference:
        - [Duchi et al., Adaptive Subgradient Methods](https://jmlr.org/papers/v12/duchi11a.html)
    """

    def __init__(
        self,
        learning_rate: Any = 1e-2,
        lr_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        epsilon: float = 1e-10,
        weight_decay: float | None = None,
        **common: Unpack[CommonArguments],
    ) -> None:
        super().__init__(learning_rate, weight_decay=weight_decay, **common)
        self.lr_decay = check_range("lr_decay", lr_decay, 0.0)
        self.initial_accumulator_value = check_range(
            "initial_accumulator_value", initial_accumulator_value, 0.0
        )
        self.epsilon = check_range("epsilon", epsilon, 0.0)

    def slot_shapes(self, shape: tuple[int, ...]) -> dict[str, Any]:
        """The sum of the squared gradients.

        Args:
            shape: Shape of the variable.

        Returns:
            Shape and initial value of ``"accumulator"``.
        """
        return {"accumulator": Slot(shape, initializer=self.initial_accumulator_value)}

    @fused("adagrad")
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
        gradient = add_l2(gradient, parameter, weight_decay)
        accumulator = slots["accumulator"] + gradient * gradient
        rate = learning_rate
        if self.lr_decay:
            rate = learning_rate / (1.0 + (step - 1.0) * self.lr_decay)
        delta = rate * gradient / (ops.sqrt(accumulator) + self.epsilon)
        return parameter - delta, {"accumulator": accumulator}

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor, as a serializable dictionary."""
        return {
            **super().get_config(),
            "lr_decay": self.lr_decay,
            "initial_accumulator_value": self.initial_accumulator_value,
            "epsilon": self.epsilon,
        }
