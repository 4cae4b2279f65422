"""SGD with momentum, dampening and Nesterov momentum."""

from __future__ import annotations

from typing import Any, Unpack

import keras
from keras import ops

from optim.core.checks import check_closed, check_flag
from optim.core.moments import add_l2
from optim.core.optimizer import CommonArguments, Optimizer, Tensor, elementwise, fused


@keras.saving.register_keras_serializable(package="optim")
class SGD(Optimizer):
    r"""Stochastic gradient descent, in the arithmetic of PyTorch.

    With momentum :math:`\mu` and dampening :math:`\tau`:

    .. math::
        g' &= g + \lambda p_{t-1} \\
        b_t &= \mu b_{t-1} + (1 - \tau)\, g', \qquad b_1 = g' \\
        p_t &= p_{t-1} - \eta \cdot
            \begin{cases} g' + \mu b_t & \text{Nesterov} \\ b_t & \text{else} \end{cases}

    `keras.optimizers.SGD` multiplies the gradient by the learning rate before it goes into
    :math:`b`: the same for a constant learning rate, but under a schedule its momentum carries on
    at old learning rates. It has no dampening and decouples ``weight_decay``.

    A difference to PyTorch where dampening is used: :math:`b_1 = g'` holds at the first update of
    the optimizer, also for a variable that has no gradient then.

    Args:
        learning_rate: A number, a learning-rate schedule or a callable without arguments.
        momentum: Share of the buffer that an update keeps, in [0, 1]; 0 keeps no state.
        nesterov: Look ahead by one step of the momentum; needs momentum and no dampening.
        dampening: Share of the gradient that is kept out of the buffer, in [0, 1].
        weight_decay: Added to the gradient as ``weight_decay * variable`` (an L2 penalty, as in
            PyTorch; `keras.optimizers` decouples it).
        **common: The arguments common to all optimizers, see `optim.Optimizer`.

    Raises:
        ValueError: If a hyperparameter is out of its range, or ``nesterov`` does not fit.

    Example:
        >>> import keras, optim
        >>> variable = keras.Variable([1.0, -1.0])
        >>> optimizer = optim.SGD(learning_rate=0.25, momentum=0.9)
        >>> optimizer.apply([keras.ops.array([3.0, -2.0])], [variable])
        >>> [round(float(x), 4) for x in keras.ops.convert_to_numpy(variable)]
        [0.25, -0.5]

    Reference:
        - [Sutskever et al., On the importance of momentum](https://proceedings.mlr.press/v28/sutskever13.html)
    """

    def __init__(
        self,
        learning_rate: Any = 1e-3,
        momentum: float = 0.0,
        nesterov: bool = False,
        dampening: float = 0.0,
        weight_decay: float | None = None,
        **common: Unpack[CommonArguments],
    ) -> None:
        super().__init__(learning_rate, weight_decay=weight_decay, **common)
        self.momentum = check_closed("momentum", momentum, 0.0, 1.0)
        self.dampening = check_closed("dampening", dampening, 0.0, 1.0)
        self.nesterov = check_flag("nesterov", nesterov)
        if nesterov and not (self.momentum and not self.dampening):
            raise ValueError(
                "`nesterov` needs `momentum` above 0 and `dampening` 0. Received: "
                f"nesterov={nesterov!r}, momentum={momentum!r}, dampening={dampening!r}"
            )

    def slot_shapes(self, shape: tuple[int, ...]) -> dict[str, Any]:
        """The momentum's buffer, if there is momentum.

        Args:
            shape: Shape of the variable.

        Returns:
            Shape of ``"momentum"``, or nothing.
        """
        return {"momentum": shape} if self.momentum else {}

    @fused("sgd")
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
        if not self.momentum:
            return parameter - learning_rate * gradient, {}
        share: Any = 1.0 - self.dampening
        if self.dampening:
            share = ops.where(step < 1.5, 1.0, share)
        buffer = self.momentum * slots["momentum"] + share * gradient
        direction = gradient + self.momentum * buffer if self.nesterov else buffer
        return parameter - learning_rate * direction, {"momentum": buffer}

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor, as a serializable dictionary."""
        return {
            **super().get_config(),
            "momentum": self.momentum,
            "nesterov": self.nesterov,
            "dampening": self.dampening,
        }
