"""APOLLO: gradients scaled by what AdamW would do to a random projection of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import keras
from keras import ops

from optim.algorithms.low_rank import LowRank
from optim.core.checks import check_integer, check_range
from optim.core.matrices import sides_of
from optim.core.moments import adam_denominator, bias_correction
from optim.core.optimizer import CommonArguments, Slot, Tensor

_TINY = 1e-8
"""Keeps quotients of norms away from a division by zero, as in the authors' code."""


@keras.saving.register_keras_serializable(package="optim")
class APOLLOAdamW(LowRank):
    r"""Gradients scaled, column by column, as AdamW scales a random projection of them.

    With gradient :math:`G` of an n x m matrix, :math:`n < m` (else everything is transposed), and
    an n x ``rank`` matrix :math:`P` of normal random numbers with variance 1 / ``rank``:

    .. math::
        R_t &= P^T G \\
        M_t &= \beta_1 M_{t-1} + (1 - \beta_1)\, R_t \\
        V_t &= \beta_2 V_{t-1} + (1 - \beta_2)\, R_t^2 \\
        N_t &= M_t / (\sqrt{V_t} + \epsilon_t), \qquad
            s_j = \lVert N_{t,j} \rVert / (\lVert R_{t,j} \rVert + 10^{-8}) \\
        U_t &= l_t\, G\, \mathrm{diag}(s) \\
        W_t &= (1 - \eta \lambda)\, W_{t-1} -
            \eta\, \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t} \sqrt{\alpha}\, U_t

    :math:`\epsilon_t = \epsilon \sqrt{1 - \beta_2^t}` puts the epsilon where `optim.AdamW` has it
    (the authors add :math:`\epsilon` itself). :math:`\alpha` = ``scale``; the paper states its
    root, as the authors' code takes ``scale`` under the root. The factor :math:`l_t \le 1` lets the
    norm of :math:`U_t` grow by at most ``norm_growth_limit`` from one update to the next. A norm of
    0 limits nothing: in the authors' code a matrix whose first gradient is zero, as those below an
    output layer of zeros, would hardly move for a thousand updates.

    With ``scale_type="tensor"`` one :math:`s` stands for the whole matrix: with ``rank=1`` and
    ``scale=128`` that is APOLLO-Mini.

    :math:`P` is drawn anew every ``update_proj_gap`` updates. It is a pure function of ``seed``,
    the variable's path and the number of the draw, computed where it is needed and never stored. So
    state of a matrix is ``2 rank max(n, m) + 2`` numbers in place of ``2 n m``, and a resumed run,
    also on another backend, draws the same. Drawing costs some fifty elementwise operations for
    each of ``rank * min(n, m)`` numbers at every update, against ``2 max(n, m)`` for each of them
    in the product with the gradient.

    Which variables count as matrices: those of two axes and more that ``target_modules`` picks and
    whose smaller side is larger than ``rank``; a kernel of more axes is a matrix of its leading
    axes times its trailing ones, cut where that is the most square. Everything else gets exactly
    AdamW's rule, without ``scale``.

    Args:
        learning_rate: A number, a learning-rate schedule or a callable without arguments.
        rank: What the smaller side of a matrix is projected to.
        update_proj_gap: Number of updates for which a projection is kept.
        scale: The updates of the projected matrices are multiplied by its root; not negative.
        target_modules: Regular expressions, or a single one, searched for in the paths of
            variables; ``None`` or ``"all-linear"`` for all matrices apart from biases and
            embeddings.
        scale_type: ``"channel"`` for a factor for each row or column along the larger side,
            ``"tensor"`` for one for the whole matrix.
        norm_growth_limit: Largest growth of the norm of a matrix's update from one step to the
            next, before the learning rate; at least 1. ``None`` for no limit.
        seed: Of the projections, an integer in [0, 2 ** 31).
        beta_1: Decay rate of the mean of the gradient, in [0, 1).
        beta_2: Decay rate of the mean of its square, in [0, 1).
        epsilon: Keeps the denominator away from zero, not negative.
        weight_decay: Fraction of ``learning_rate * variable`` taken off per update.
        **common: The arguments common to all optimizers, see `optim.Optimizer`.

    Raises:
        ValueError: If a hyperparameter is out of its range.

    Example:
        >>> import numpy as np, keras, optim
        >>> variable = keras.Variable(np.zeros((2, 3), "float32"), name="kernel")
        >>> optimizer = optim.APOLLOAdamW(0.5, rank=1, scale_type="tensor")
        >>> optimizer.apply([keras.ops.array([[0.0, 0.0, 0.0], [9.0, -9.0, 9.0]])], [variable])
        >>> [bool(x < 0) for x in keras.ops.convert_to_numpy(variable)[1]]
        [True, False, True]
        >>> {name: tuple(slot.shape) for name, slot in optimizer.slots_of(variable).items()}
        {'momentum': (1, 3), 'velocity': (1, 3), 'norm': (), 'key': ()}

    Reference:
        - [Zhu et al., APOLLO: SGD-like Memory, AdamW-level Performance](https://arxiv.org/abs/2412.05270)
    """

    def __init__(
        self,
        learning_rate: Any = 1e-3,
        rank: int = 128,
        update_proj_gap: int = 200,
        scale: float = 1.0,
        target_modules: str | Sequence[str] | None = None,
        scale_type: str = "channel",
        norm_growth_limit: float | None = 1.01,
        seed: int = 0,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-8,
        weight_decay: float | None = 0.01,
        **common: Unpack[CommonArguments],
    ) -> None:
        super().__init__(
            learning_rate,
            rank,
            update_proj_gap,
            scale,
            target_modules,
            beta_1,
            beta_2,
            epsilon,
            weight_decay,
            **common,
        )
        if scale_type not in ("channel", "tensor"):
            raise ValueError(
                f"`scale_type` must be 'channel' or 'tensor'. Received: scale_type={scale_type!r}"
            )
        if norm_growth_limit is not None:
            norm_growth_limit = check_range("norm_growth_limit", norm_growth_limit, 1.0)
        if check_integer("seed", seed, 0) >= 2**31:
            raise ValueError(f"`seed` must be below 2 ** 31. Received: seed={seed!r}")
        self.scale_type, self.norm_growth_limit, self.seed = scale_type, norm_growth_limit, seed

    def slot_shapes(self, shape: tuple[int, ...]) -> Mapping[str, tuple[int, ...] | Slot]:
        """The running means of the projected gradient and of its square, and two numbers.

        Args:
            shape: Shape of the variable.

        Returns:
            Shapes of ``"momentum"`` and ``"velocity"``, ``"norm"`` for that of the last update,
            and ``"key"`` for what the variable's projections are drawn from, besides the seed.
        """
        small = sides_of(shape).projected(self.rank)
        key = Slot((), "int32", "path")
        return {"momentum": small, "velocity": small, "norm": (), "key": key}

    def update(
        self,
        parameter: Tensor,
        gradient: Tensor,
        slots: dict[str, Tensor],
        step: Tensor,
        learning_rate: Tensor,
        weight_decay: float,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One update of one matrix, see `Optimizer.update`."""
        shape = tuple(parameter.shape)
        sides = sides_of(shape)
        matrix = ops.reshape(gradient, tuple(sides))
        number = ops.cast(ops.floor((step - 1.0) / float(self.update_proj_gap)), "int32")
        normal = random_normal(
            sides.projection(self.rank), self.seed, slots["key"], number, gradient.dtype
        )
        projection = normal * (1.0 / math.sqrt(self.rank))
        projected = sides.project(matrix, projection)
        new = self.moments(slots, projected)
        # M / (sqrt(V) + epsilon_t), and the bias corrections on their own.
        root = ops.sqrt(bias_correction(self.adamw.beta_2, step))
        corrected = adam_denominator(new, step, self.adamw.beta_2, self.adamw.epsilon)
        direction = new["momentum"] / (root * corrected)
        axis = None if self.scale_type == "tensor" else (0 if sides.wide else 1)
        factors = _norm(direction, axis) / (_norm(projected, axis) + _TINY)
        scaled, norm = self._limited(matrix * factors, slots["norm"])
        rate = learning_rate * (math.sqrt(self.scale) * root)
        delta = rate / bias_correction(self.adamw.beta_1, step) * ops.reshape(scaled, shape)
        if weight_decay:
            delta = delta + (learning_rate * weight_decay) * parameter
        return parameter - delta, {**new, "norm": norm, "key": slots["key"]}

    def _limited(self, scaled: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """The scaled gradient with a norm that does not grow too fast, and that norm."""
        norm = ops.reshape(_norm(scaled, None), ())
        if self.norm_growth_limit is None:
            return scaled, norm
        growth = ops.maximum(norm / (last + _TINY) / self.norm_growth_limit, 1.0)
        # After an update of zero norm, or before the first one, there is nothing to compare with.
        growth = ops.where(last > 0.0, growth, 1.0)
        return scaled / growth, norm / growth

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor, as a serializable dictionary."""
        return {
            **super().get_config(),
            "scale_type": self.scale_type,
            "norm_growth_limit": self.norm_growth_limit,
            "seed": self.seed,
        }


def random_normal(
    shape: tuple[int, int], seed: int, key: Tensor, number: Tensor, dtype: Any = "float32"
) -> Tensor:
    """Normal random numbers as a function of integers, the same on every backend to rounding.

    The position of an element is hashed with the integers, twice, and two uniform numbers are
    turned into a normal one as Box and Muller do.

    Args:
        shape: Of the result.
        seed: Python integer in [0, 2 ** 31).
        key: int32 scalar.
        number: int32 scalar, not negative.
        dtype: Of the result.

    Returns:
        A tensor.
    """
    base = _hashed(number + _hashed(key + _hashed(ops.convert_to_tensor(seed, "int32"))))
    position = ops.reshape(ops.arange(math.prod(shape), dtype="int32"), shape) * 2
    # Hashed before the integers enter: two sums could meet, and would go on together.
    first, second = (
        _uniform(_hashed(ops.bitwise_xor(_hashed(position + i), base)), dtype) for i in (0, 1)
    )
    return ops.sqrt(-2.0 * ops.log(first)) * ops.cos((2.0 * math.pi) * second)


_FACTORS = (0x7FEB352D, 0x846CA68B - 2**32)


def _hashed(x: Tensor) -> Tensor:
    """A permutation of the 32-bit integers that looks random (Wellons' lowbias32)."""
    x = ops.bitwise_xor(x, _shifted(x, 16)) * _FACTORS[0]
    x = ops.bitwise_xor(x, _shifted(x, 15)) * _FACTORS[1]
    return ops.bitwise_xor(x, _shifted(x, 16))


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Shift to the right that moves zeros in, also for negative integers."""
    return ops.bitwise_and(ops.right_shift(x, bits), (1 << (32 - bits)) - 1)


def _uniform(x: Tensor, dtype: Any) -> Tensor:
    """The upper 23 bits of integers as numbers inside (0, 1), neither end included."""
    return (ops.cast(_shifted(x, 9), dtype) + 0.5) * 2.0**-23


def _norm(x: Tensor, axis: int | None) -> Tensor:
    """Euclidean norm along an axis or of everything, the number of axes kept."""
    return ops.sqrt(ops.sum(x * x, axis=axis, keepdims=True))
