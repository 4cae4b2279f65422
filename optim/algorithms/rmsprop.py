"""RMSprop, plain or centred, with momentum as an option."""

from __future__ import annotations

from typing import Any, Unpack

import keras
from keras import ops

from optim.core.checks import check_closed, check_flag
from optim.core.moments import add_l2, moving_average
from optim.core.optimizer import CommonArguments, Optimizer, Tensor, check_range, elementwise


@keras.saving.register_keras_serializable(package="optim")
class RMSprop(Optimizer):
    r"""RMSprop, in the arithmetic of PyTorch and with its defaults.

    With :math:`\alpha` the ``rho`` and :math:`\mu` the momentum:

    .. math::
        g' &= g + \lambda p_{t-1} \\
        v_t &= \alpha v_{t-1} + (1 - \alpha)\, g'^2 \\
        a_t &= \alpha a_{t-1} + (1 - \alpha)\, g' \quad \text{(centred; else 0)} \\
        b_t &= \mu b_{t-1} + g' / (\sqrt{v_t - a_t^2} + \epsilon) \\
        p_t &= p_{t-1} - \eta\, b_t

    `keras.optimizers.RMSprop` puts epsilon under the root (1e-7), has :math:`\alpha = 0.9`, and
    multiplies by the learning rate before the momentum. Rounding can leave the variance
    :math:`v_t - a_t^2` slightly negative, where PyTorch gives NaN; here it counts as 0.

    Args:
        learning_rate: A number, a learning-rate schedule or a callable without arguments.
        rho: Decay rate of the mean square, in [0, 1) (PyTorch calls it alpha).
        momentum: Share of the buffer that an update keeps, in [0, 1]; 0 keeps no buffer.
        epsilon: Keeps the denominator away from zero, not negative.
        centered: Divide by the standard deviation instead of the root mean square.
        weight_decay: Added to the gradient as ``weight_decay * variable`` (an L2 penalty, as in
            PyTorch; `keras.optimizers` decouples it).
        **common: The arguments common to all optimizers, see `optim.Optimizer`.

    Raises:
        ValueError: If a hyperparameter is out of its range.

    Example:
        >>> import keras, optim
        >>> variable = keras.Variable([1.0, -1.0])
        >>> optimizer = optim.RMSprop(learning_rate=0.25, rho=0.75)
        >>> optimizer.apply([keras.ops.array([3.0, -2.0])], [variable])
        >>> [round(float(x), 4) for x in keras.ops.convert_to_numpy(variable)]
        [0.5, -0.5]

    Reference:
        - [Tieleman and Hinton, Lecture 6.5](https://www.cs.toronto.edu/~tijmen/csc321/slides/lecture_slides_lec6.pdf)
        - [Graves, Generating Sequences With RNNs](https://arxiv.org/abs/1308.0850), centred
    """

    def __init__(
        self,
        learning_rate: Any = 1e-2,
        rho: float = 0.99,
        momentum: float = 0.0,
        epsilon: float = 1e-8,
        centered: bool = False,
        weight_decay: float | None = None,
        **common: Unpack[CommonArguments],
    ) -> None:
        super().__init__(learning_rate, weight_decay=weight_decay, **common)
        self.rho = check_range("rho", rho, 0.0, 1.0)
        self.momentum = check_closed("momentum", momentum, 0.0, 1.0)
        self.epsilon = check_range("epsilon", epsilon, 0.0)
        self.centered = check_flag("centered", centered)

    def slot_shapes(self, shape: tuple[int, ...]) -> dict[str, Any]:
        """The mean square, and what the options need.

        Args:
            shape: Shape of the variable.

        Returns:
            Shapes of ``"velocity"``, ``"average_gradient"`` (centred), ``"momentum"``.
        """
        slots = {"velocity": shape}
        if self.centered:
            slots["average_gradient"] = shape
        if self.momentum:
            slots["momentum"] = shape
        return slots

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
        velocity = moving_average(slots["velocity"], gradient * gradient, self.rho)
        new = {"velocity": velocity}
        variance = velocity
        if self.centered:
            average = moving_average(slots["average_gradient"], gradient, self.rho)
            new["average_gradient"] = average
            variance = ops.maximum(velocity - average * average, 0.0)
        denominator = ops.sqrt(variance) + self.epsilon
        if not self.momentum:
            return parameter - learning_rate * gradient / denominator, new
        new["momentum"] = self.momentum * slots["momentum"] + gradient / denominator
        return parameter - learning_rate * new["momentum"], new

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor, as a serializable dictionary."""
        return {
            **super().get_config(),
            "rho": self.rho,
            "momentum": self.momentum,
            "epsilon": self.epsilon,
            "centered": self.centered,
        }
