"""Adan: Nesterov momentum by the differences of the gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

import keras
from keras import ops

from optim.core.checks import check_flag
from optim.core.moments import bias_correction, moving_average
from optim.core.optimizer import CommonArguments, Optimizer, Tensor, check_range, elementwise


@keras.saving.register_keras_serializable(package="optim")
class Adan(Optimizer):
    r"""Adan, in the arithmetic of its authors' code.

    With :math:`d_t = g_t - g_{t-1}` (0 at the first update), and hats for the correction of the
    bias as in Adam:

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1)\, g_t \\
        v_t &= \beta_2 v_{t-1} + (1 - \beta_2)\, d_t \\
        n_t &= \beta_3 n_{t-1} + (1 - \beta_3)\, (g_t + \beta_2 d_t)^2 \\
        p_t &= \frac{p_{t-1} - \eta\, (\hat m_t + \beta_2 \hat v_t) / (\sqrt{\hat n_t} + \epsilon)}
                   {1 + \eta \lambda}

    The paper writes :math:`1 - \beta` where its code and this class write :math:`\beta`. optax does
    so in the means, but has :math:`1 - \beta_2` in front of :math:`d_t` and :math:`\hat v_t`: 0.08
    by default, for the paper's 0.92. The three are one argument, because they do not mean what
    Adam's of the same number mean.

    Args:
        learning_rate: A number, a learning-rate schedule or a callable without arguments.
        betas: Decay rates of the three means, each in [0, 1).
        epsilon: Keeps the denominator away from zero, not negative.
        weight_decay: The variable is divided by ``1 + learning_rate * weight_decay`` after the
            step, or see the next.
        no_prox: Multiply by ``1 - learning_rate * weight_decay`` before the step instead.
        **common: The arguments common to all optimizers, see `optim.Optimizer`.

    Raises:
        ValueError: If a hyperparameter is out of its range.

    Example:
        >>> import keras, optim
        >>> variable = keras.Variable([1.0, -1.0])
        >>> optimizer = optim.Adan(learning_rate=0.25)
        >>> optimizer.apply([keras.ops.array([3.0, -2.0])], [variable])
        >>> [round(float(x), 4) for x in keras.ops.convert_to_numpy(variable)]
        [0.75, -0.75]

    Reference:
        - [Xie et al., Adan: Adaptive Nesterov Momentum Algorithm](https://arxiv.org/abs/2208.06677)
    """

    def __init__(
        self,
        learning_rate: Any = 1e-3,
        betas: Sequence[float] = (0.98, 0.92, 0.99),
        epsilon: float = 1e-8,
        weight_decay: float | None = None,
        no_prox: bool = False,
        **common: Unpack[CommonArguments],
    ) -> None:
        super().__init__(learning_rate, weight_decay=weight_decay, **common)
        if not isinstance(betas, Sequence) or isinstance(betas, str) or len(betas) != 3:
            raise ValueError(
                f"`betas` must be three numbers in [0.0, 1.0). Received: betas={betas!r}"
            )
        self.betas = tuple(check_range("betas", beta, 0.0, 1.0) for beta in betas)
        self.epsilon = check_range("epsilon", epsilon, 0.0)
        self.no_prox = check_flag("no_prox", no_prox)

    def slot_shapes(self, shape: tuple[int, ...]) -> dict[str, Any]:
        """The three means, and the gradient of the update before.

        Args:
            shape: Shape of the variable.

        Returns:
            Shapes of ``"momentum"``, ``"difference"``, ``"velocity"``, ``"previous_gradient"``.
        """
        names = ("momentum", "difference", "velocity", "previous_gradient")
        return dict.fromkeys(names, shape)

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
        beta_1, beta_2, beta_3 = self.betas
        # Nothing at the first update: there is no gradient before it.
        later = ops.cast(step > 1.5, gradient.dtype)
        # At the first update the difference is that to zeros, and does not count.
        difference, old = gradient - slots["previous_gradient"], slots["difference"]
        looking_ahead = gradient + (later * beta_2) * difference
        share = later * (1.0 - beta_2)
        if beta_2 < 0.5:  # see `moving_average`
            moved = (1.0 - share) * old + share * difference
        else:
            moved = old + share * (difference - old)
        new = {
            "momentum": moving_average(slots["momentum"], gradient, beta_1),
            "difference": moved,
            "velocity": moving_average(slots["velocity"], looking_ahead * looking_ahead, beta_3),
            "previous_gradient": gradient,
        }
        root = ops.rsqrt(bias_correction(beta_3, step)) * ops.sqrt(new["velocity"])
        correction = bias_correction(beta_1, step)
        # One factor for the sum: a kernel has one for nothing.
        ratio = beta_2 * correction / bias_correction(beta_2, step)
        direction = (learning_rate / correction) * (new["momentum"] + ratio * new["difference"])
        delta = direction / (root + self.epsilon)
        if weight_decay:
            decay = learning_rate * weight_decay
            delta = delta + decay * parameter
            if not self.no_prox:
                # (p - s) / (1 + d) = p - (s + d p) / (1 + d), which does not round d away.
                delta = delta / (1.0 + decay)
        return parameter - delta, new

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor, as a serializable dictionary."""
        return {
            **super().get_config(),
            "betas": list(self.betas),
            "epsilon": self.epsilon,
            "no_prox": self.no_prox,
        }
