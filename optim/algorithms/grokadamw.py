"""GrokAdamW: AdamW on gradients whose slow part is amplified."""

from __future__ import annotations

from typing import Any, Unpack

import keras

from optim.core.moments import adam_denominator, adam_moments, bias_correction, moving_average
from optim.core.optimizer import CommonArguments, Optimizer, Tensor, check_range, elementwise


@keras.saving.register_keras_serializable(package="optim")
class GrokAdamW(Optimizer):
    r"""AdamW on Grokfast's gradients: the slow part of the gradient is amplified.

    .. math::
        s_t &= \alpha s_{t-1} + (1 - \alpha)\, g \\
        g'_t &= g + \lambda_s s_t

    and :math:`g'` takes the place of :math:`g` in the equations of `optim.AdamW`, where
    :math:`\alpha` is ``alpha_init`` and :math:`\lambda_s` is ``lamb``.

    The PyTorch package of this name has two more parts, which are not here: it lowers ``beta_1`` by
    the *position* of a tensor in the list (``gamma``; the 50th would have 0.005), so that its
    result depends on the order of the variables, and it lowers :math:`\alpha` by functions of the
    user's that read losses on the host. It also adds epsilon before the correction of the bias;
    its newer versions scale :math:`g'` back to the norm of :math:`g`.

    Args:
        learning_rate: A number, a learning-rate schedule or a callable without arguments.
        beta_1: Decay rate of the mean of the gradient, in [0, 1).
        beta_2: Decay rate of the mean of its square, in [0, 1).
        epsilon: Keeps the denominator away from zero, not negative.
        weight_decay: Fraction of ``learning_rate * variable`` taken off per update.
        alpha_init: Decay rate of the slow part, in [0, 1).
        lamb: How much the slow part is amplified, not negative.
        **common: The arguments common to all optimizers, see `optim.Optimizer`.

    Raises:
        ValueError: If a hyperparameter is out of its range.

    Example:
        >>> import keras, optim
        >>> variable = keras.Variable([1.0, -1.0])
        >>> optimizer = optim.GrokAdamW(learning_rate=0.25, weight_decay=0.0)
        >>> optimizer.apply([keras.ops.array([3.0, -2.0])], [variable])
        >>> [round(float(x), 4) for x in keras.ops.convert_to_numpy(variable)]
        [0.75, -0.75]

    Reference:
        - [Lee et al., Grokfast: Accelerated Grokking by Amplifying Slow Gradients](https://arxiv.org/abs/2405.20233)
        - [The PyTorch package](https://github.com/cognitivecomputations/grokadamw)
    """

    def __init__(
        self,
        learning_rate: Any = 1e-3,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-8,
        weight_decay: float | None = 0.01,
        alpha_init: float = 0.98,
        lamb: float = 2.0,
        **common: Unpack[CommonArguments],
    ) -> None:
        super().__init__(learning_rate, weight_decay=weight_decay, **common)
        self.beta_1 = check_range("beta_1", beta_1, 0.0, 1.0)
        self.beta_2 = check_range("beta_2", beta_2, 0.0, 1.0)
        self.epsilon = check_range("epsilon", epsilon, 0.0)
        self.alpha_init = check_range("alpha_init", alpha_init, 0.0, 1.0)
        self.lamb = check_range("lamb", lamb, 0.0)

    def slot_shapes(self, shape: tuple[int, ...]) -> dict[str, Any]:
        """Adam's running means, and the slow part of the gradient.

        Args:
            shape: Shape of the variable.

        Returns:
            Shapes of ``"momentum"``, ``"velocity"`` and ``"slow_gradient"``.
        """
        return {"momentum": shape, "velocity": shape, "slow_gradient": shape}

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
        slow = moving_average(slots["slow_gradient"], gradient, self.alpha_init)
        moments = adam_moments(slots, gradient + self.lamb * slow, self.beta_1, self.beta_2)
        denominator = adam_denominator(moments, step, self.beta_2, self.epsilon)
        scale = learning_rate / bias_correction(self.beta_1, step)
        if weight_decay:
            parameter = parameter - (learning_rate * weight_decay) * parameter
        delta = scale * moments["momentum"] / denominator
        return parameter - delta, {**moments, "slow_gradient": slow}

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor, as a serializable dictionary."""
        return {
            **super().get_config(),
            "beta_1": self.beta_1,
            "beta_2": self.beta_2,
            "epsilon": self.epsilon,
            "alpha_init": self.alpha_init,
            "lamb": self.lamb,
        }
