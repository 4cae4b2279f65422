"""Adafactor: the second moment of a matrix from its row and column sums."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

import keras
from keras import ops

from optim.core import precision
from optim.core.checks import check_flag
from optim.core.optimizer import CommonArguments, Optimizer, Slot, Tensor, check_range, fused
from optim.kernels import backend as kernels


@keras.saving.register_keras_serializable(package="optim")
class RelativeStep(keras.optimizers.schedules.LearningRateSchedule):  # type: ignore[misc]
    r"""Adafactor's own rate: :math:`\min(c, 1/\sqrt t)`, with the update :math:`t` from 1.

    Args:
        warmup_init: Begin small: :math:`c = 10^{-6}\, t` instead of 0.01.

    Example:
        >>> import optim
        >>> [round(float(optim.RelativeStep()(s)), 6) for s in (0, 9999, 39999)]
        [0.01, 0.01, 0.005]
    """

    keeps_float64 = True

    def __init__(self, warmup_init: bool = False) -> None:
        self.warmup_init = bool(warmup_init)

    def __call__(self, step: Any) -> Tensor:
        """The rate after ``step`` updates, a scalar of the dtype of `optim.Schedule`'s."""
        dtype = precision.schedule_dtype(step)
        with precision.arithmetic(dtype):
            count = ops.cast(step, dtype) + 1.0
            ceiling = 1e-6 * count if self.warmup_init else 1e-2
            return ops.minimum(ceiling, ops.rsqrt(count))

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor."""
        return {"warmup_init": self.warmup_init}


@keras.saving.register_keras_serializable(package="optim")
class Adafactor(Optimizer):
    r"""Adafactor, in the arithmetic of Transformers' implementation.

    With gradient :math:`g`, :math:`\hat\beta_t = 1 - t^{d}` (:math:`d` is ``beta_2_decay``) and the
    root mean square :math:`\mathrm{RMS}(x) = \lVert x \rVert / \sqrt n`:

    .. math::
        \eta_t &= \rho_t \cdot \max(\epsilon_2, \mathrm{RMS}(p_{t-1})) \\
        R_t &= \hat\beta_t R_{t-1} + (1 - \hat\beta_t)\,\mathrm{mean}_{-1}(g^2 + \epsilon_1) \\
        C_t &= \hat\beta_t C_{t-1} + (1 - \hat\beta_t)\,\mathrm{mean}_{-2}(g^2 + \epsilon_1) \\
        u &= g \,/\, \sqrt{(R_t / \mathrm{mean}(R_t)) \otimes C_t} \\
        u &\leftarrow \eta_t\, u \,/\, \max(1, \mathrm{RMS}(u) / d_{\mathrm{clip}}) \\
        p_t &= (1 - \eta_t \lambda)\, p_{t-1} - u

    Tensors of fewer than two axes keep the full mean of :math:`g^2 + \epsilon_1`. The factor
    :math:`\max(\epsilon_2, \mathrm{RMS}(p))` is there with ``scale_parameter`` only. With
    ``momentum`` the update is a running mean of :math:`u`. The factored state of an n x m matrix
    is n + m numbers; Adam's is 2 n m.

    The rate :math:`\rho_t` is either ``learning_rate`` or Adafactor's own (`RelativeStep`).
    `keras.optimizers.Adafactor` has neither a fixed rate nor one without the parameter's scale,
    and keeps full-size state besides the factors.

    Args:
        learning_rate: A number, schedule or callable. ``None`` for the rate of `RelativeStep`.
        epsilon_1: Added to the squared gradient.
        epsilon_2: Smallest scale of a parameter.
        clip_threshold: Largest root mean square of the update before the rate.
        beta_2_decay: Exponent of the decay rate's approach to 1, negative.
        momentum: Decay rate of the running mean of updates in [0, 1), ``None`` for no such mean.
            (`beta1` in Transformers.)
        scale_parameter: Whether the rate is relative to the parameter's scale. ``None``: if and
            only if no ``learning_rate`` is given.
        relative_step: Whether the rate is Adafactor's own; must agree with ``learning_rate``;
            an argument because Transformers has it.
        warmup_init: Begin with a small rate; without a ``learning_rate`` only.
        weight_decay: Fraction of ``rate * variable`` taken off per update.
        **common: The arguments common to all optimizers, see `optim.Optimizer`.

    Raises:
        ValueError: If a hyperparameter is out of its range, or both a ``learning_rate`` and
            Adafactor's own are asked for.

    Example:
        >>> import keras, optim
        >>> variable = keras.Variable([1.0, -1.0])
        >>> optimizer = optim.Adafactor(learning_rate=0.25)
        >>> optimizer.apply([keras.ops.array([3.0, -2.0])], [variable])
        >>> [round(float(x), 6) for x in keras.ops.convert_to_numpy(variable)]
        [0.75, -0.75]

    Reference:
        - [Shazeer and Stern, Adafactor](https://arxiv.org/abs/1804.04235)
    """

    def __init__(
        self,
        learning_rate: Any = None,
        epsilon_1: float = 1e-30,
        epsilon_2: float = 1e-3,
        clip_threshold: float = 1.0,
        beta_2_decay: float = -0.8,
        momentum: float | None = None,
        scale_parameter: bool | None = None,
        relative_step: bool | None = None,
        warmup_init: bool = False,
        weight_decay: float | None = None,
        **common: Unpack[CommonArguments],
    ) -> None:
        relative = learning_rate is None
        if relative_step is not None and check_flag("relative_step", relative_step) != relative:
            raise ValueError(
                "`relative_step=True` is Adafactor's own learning rate, which is used if and only "
                "if no `learning_rate` is given: pass one of the two. "
                f"Received: learning_rate={learning_rate!r}, relative_step={relative_step!r}"
            )
        if check_flag("warmup_init", warmup_init) and not relative:
            raise ValueError(
                "`warmup_init=True` belongs to Adafactor's own learning rate. Leave it out, or "
                "pass no `learning_rate`. "
                f"Received: learning_rate={learning_rate!r}, warmup_init={warmup_init!r}"
            )
        rate = RelativeStep(warmup_init) if relative else learning_rate
        super().__init__(rate, weight_decay=weight_decay, **common)
        self.relative_step = relative
        self.warmup_init = warmup_init
        if scale_parameter is None:
            scale_parameter = relative
        self.scale_parameter = check_flag("scale_parameter", scale_parameter)
        self.epsilon_1 = check_range("epsilon_1", epsilon_1, 0.0)
        self.epsilon_2 = check_range("epsilon_2", epsilon_2, 0.0)
        self.clip_threshold = check_range("clip_threshold", clip_threshold, 1e-30)
        self.beta_2_decay = check_range("beta_2_decay", beta_2_decay, -10.0, 0.0)
        self.momentum = None if momentum is None else check_range("momentum", momentum, 0.0, 1.0)

    def slot_shapes(self, shape: tuple[int, ...]) -> Mapping[str, tuple[int, ...] | Slot]:
        """Row and column means, or the whole second moment; the mean of updates.

        Args:
            shape: Shape of the variable.

        Returns:
            Shapes of ``"row"`` and ``"column"``, or of ``"velocity"``; of ``"momentum"``, if any.
        """
        slots = {"velocity": shape}
        if len(shape) >= 2:
            slots = {"row": shape[:-1], "column": (*shape[:-2], shape[-1])}
        return slots if self.momentum is None else {**slots, "momentum": shape}

    @fused("adafactor")
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
        rate = learning_rate
        if self.scale_parameter:
            rate = rate * ops.maximum(self.epsilon_2, _root_mean_square(parameter))
        share = ops.exp(self.beta_2_decay * ops.log(step))
        square = gradient * gradient + self.epsilon_1
        if "row" in slots:
            row = slots["row"] + share * (ops.mean(square, axis=-1) - slots["row"])
            column = slots["column"] + share * (ops.mean(square, axis=-2) - slots["column"])
            new = {"row": row, "column": column}
            # Not the root of the quotient: where a row had no gradient, that may underflow to 0.
            by_row = ops.rsqrt(row) * ops.sqrt(ops.mean(row, axis=-1, keepdims=True))
            delta = gradient * ops.expand_dims(by_row, -1)
            delta = delta * ops.expand_dims(ops.rsqrt(column), -2)
        else:
            velocity = slots["velocity"] + share * (square - slots["velocity"])
            new = {"velocity": velocity}
            delta = gradient * ops.rsqrt(velocity)
        size = _root_mean_square(delta) / self.clip_threshold
        delta = delta * (rate / ops.maximum(1.0, size))
        if self.momentum is not None:
            share = 1.0 - self.momentum
            delta = slots["momentum"] + share * (delta - slots["momentum"])
            new["momentum"] = delta
        if weight_decay:
            delta = delta + (rate * weight_decay) * parameter
        return parameter - delta, new

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor, as a serializable dictionary."""
        config = super().get_config()
        if self.relative_step:
            config["learning_rate"] = None
        return {
            **config,
            "epsilon_1": self.epsilon_1,
            "epsilon_2": self.epsilon_2,
            "clip_threshold": self.clip_threshold,
            "beta_2_decay": self.beta_2_decay,
            "momentum": self.momentum,
            "scale_parameter": self.scale_parameter,
            "relative_step": self.relative_step,
            "warmup_init": self.warmup_init,
        }


def _root_mean_square(x: Tensor) -> Tensor:
    return ops.sqrt(kernels.mean_product(x, x))
