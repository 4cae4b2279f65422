"""Muon: orthogonal updates for matrices, AdamW for everything else."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Unpack

import keras
from keras import ops

from optim.algorithms.adamw import AdamW
from optim.core.checks import check_flag, check_integer, check_pattern
from optim.core.matrices import is_matrix, sides_of
from optim.core.moments import moving_average
from optim.core.optimizer import CommonArguments, Optimizer, Slot, Tensor, check_range
from optim.core.parameter_groups import path_of
from optim.core.rule import stackable
from optim.kernels import backend as kernels

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic; its slope at 0 is as large as it can be, its limit only roughly 1."""

_AT_ONCE = 3
"""Iterations between two products with the matrix itself; after seven, rounding errors dominate."""

NOT_HIDDEN = r"embed|(^|/)([^/]*_)?(head|logits|classifier|predictions)(_\d+)?(/|$)"
"""Paths of embeddings and of output layers, by the names they usually have."""


@keras.saving.register_keras_serializable(package="optim")
class Muon(Optimizer):
    r"""Momentum, made orthogonal by a Newton-Schulz iteration, for the matrices of a network.

    With gradient :math:`g` of an n x m matrix (Keras' kernels: n inputs, m outputs):

    .. math::
        b_t &= \mu\, b_{t-1} + (1 - \mu)\, g \\
        u_t &= (1 - \mu)\, g + \mu\, b_t \quad\text{(Nesterov; else } b_t) \\
        o_t &= \mathrm{NewtonSchulz}(u_t) \approx U V^T, \quad u_t = U \Sigma V^T \\
        p_t &= (1 - \eta \lambda)\, p_{t-1} - \eta\, s\, o_t

    with :math:`s = \sqrt{\max(1, m / n)}`, or :math:`s = 0.2 \sqrt{\max(n, m)}` with ``match_rms``:
    then an update is as large as AdamW's usually are, and AdamW's learning rate and weight decay
    can be used. The iteration :math:`X \leftarrow a X + (b A + c A^2) X, A = X X^T` leaves singular
    values between about 0.7 and 1.2.

    Which variables count as matrices: those of two axes and more whose path does not match
    ``exclude``. A kernel of more axes is a matrix of its leading axes times its trailing ones, cut
    where that is the most square: an attention's (width, heads, size) is width x (heads size), a
    convolution's (3, 3, 64, 64) is 576 x 64. Everything else (vectors, scalars, matrices with a
    side of 1, biases of any shape, embeddings, output layers) gets AdamW's rule with the learning
    rate times ``adamw_multiplier``. An output layer is recognised by its name only; give it such a
    name, or use ``exclude``.

    `keras.optimizers.Muon` scales as ``match_rms`` does by default, looks ahead by a whole
    update, adds epsilon like Keras' Adam, and gives all kernels of more than two axes
    (convolutions, attention) to Adam.

    Args:
        learning_rate: Of the matrices; a number, a schedule or a callable without arguments.
        momentum: Decay rate of the mean of the gradient, in [0, 1).
        nesterov: Look ahead by one update.
        ns_steps: Newton-Schulz iterations, at least 1.
        ns_dtype: Dtype of the iteration: ``"float32"``, or ``"bfloat16"`` as in the original; with
            ``"auto"`` that on GPUs and TPUs that multiply matrices in it. State is float32.
        match_rms: Scale updates to AdamW's usual size (Moonlight).
        exclude: Regular expression, searched for in the paths of variables that get AdamW's rule;
            ``None`` for embeddings and output layers by their usual names (`NOT_HIDDEN`).
        adamw_multiplier: AdamW's learning rate divided by the matrices'; ``None`` for 1 with
            ``match_rms`` and else 0.015 (the original's 3e-4 and 0.02).
        beta_1: Of AdamW's rule, in [0, 1).
        beta_2: Of AdamW's rule, in [0, 1).
        epsilon: Of AdamW's rule, not negative.
        weight_decay: Fraction of ``learning_rate * variable`` taken off per update.
        **common: The arguments common to all optimizers, see `optim.Optimizer`.

    Raises:
        ValueError: If a hyperparameter is out of its range.

    Example:
        >>> import numpy as np, keras, optim
        >>> variable = keras.Variable(np.zeros((2, 2), "float32"))
        >>> optimizer = optim.Muon(learning_rate=1.0, ns_steps=30)
        >>> optimizer.apply([keras.ops.array([[0.0, 9.0], [1.0, 0.0]])], [variable])
        >>> delta = -keras.ops.convert_to_numpy(variable)
        >>> bool(np.all((delta > 0.6) == [[False, True], [True, False]]))
        True

    Reference:
        - [Jordan et al., Muon](https://kellerjordan.github.io/posts/muon/)
        - [Liu et al., Muon is Scalable for LLM Training](https://arxiv.org/abs/2502.16982)
    """

    def __init__(
        self,
        learning_rate: Any = 0.02,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        ns_dtype: str = "auto",
        match_rms: bool = False,
        exclude: str | None = None,
        adamw_multiplier: float | None = None,
        beta_1: float = 0.9,
        beta_2: float = 0.95,
        epsilon: float = 1e-8,
        weight_decay: float | None = 0.0,
        **common: Unpack[CommonArguments],
    ) -> None:
        super().__init__(learning_rate, weight_decay=weight_decay, **common)
        if ns_dtype not in ("auto", "float32", "bfloat16"):
            raise ValueError(
                "`ns_dtype` must be 'auto', 'float32' or 'bfloat16'. "
                f"Received: ns_dtype={ns_dtype!r}"
            )
        if adamw_multiplier is None:
            adamw_multiplier = 1.0 if match_rms else 0.015
        self.momentum = check_range("momentum", momentum, 0.0, 1.0)
        self.nesterov = check_flag("nesterov", nesterov)
        self.match_rms = check_flag("match_rms", match_rms)
        self.ns_steps, self.ns_dtype = check_integer("ns_steps", ns_steps, 1), ns_dtype
        self.exclude = NOT_HIDDEN if exclude is None else check_pattern("exclude", exclude)
        self.adamw_multiplier = check_range("adamw_multiplier", adamw_multiplier, 0.0)
        self.adamw = AdamW(0.0, beta_1, beta_2, epsilon, weight_decay, kernel=self.kernel)

    def rule_for(self, variable: Any) -> Optimizer:
        """This rule for matrices, AdamW's for the rest.

        Args:
            variable: One of the variables the optimizer is built with.

        Returns:
            This optimizer, or the AdamW it holds.
        """
        hidden = is_matrix(variable) and not re.search(self.exclude, path_of(variable))
        return self if hidden else self.adamw

    def learning_rate_multiplier_of(self, variable: Any) -> float:
        """AdamW's share of the learning rate for what has its rule.

        Args:
            variable: One of the variables the optimizer was built with.

        Returns:
            A Python number.
        """
        own = self.adamw_multiplier if self.rule_of(variable) is self.adamw else 1.0
        return super().learning_rate_multiplier_of(variable) * own

    def slot_shapes(self, shape: tuple[int, ...]) -> Mapping[str, tuple[int, ...] | Slot]:
        """The running mean of the gradient.

        Args:
            shape: Shape of the variable.

        Returns:
            Shape of ``"momentum"``.
        """
        return {"momentum": shape}

    @stackable
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
        momentum = moving_average(slots["momentum"], gradient, self.momentum)
        mixed = gradient + self.momentum * (momentum - gradient) if self.nesterov else momentum
        shape = tuple(parameter.shape)
        rows, columns = sides_of(shape)
        dtype = kernels.matrix_dtype(parameter) if self.ns_dtype == "auto" else self.ns_dtype
        direction = orthogonalized(ops.reshape(mixed, (rows, columns)), self.ns_steps, dtype)
        scale = math.sqrt(max(1.0, columns / rows))
        if self.match_rms:
            scale = 0.2 * math.sqrt(max(rows, columns))
        delta = (learning_rate * scale) * ops.reshape(direction, shape)
        if weight_decay:
            delta = delta + (learning_rate * weight_decay) * parameter
        return parameter - delta, {"momentum": momentum}

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor, as a serializable dictionary."""
        return {
            **super().get_config(),
            "momentum": self.momentum,
            "nesterov": self.nesterov,
            "ns_steps": self.ns_steps,
            "ns_dtype": self.ns_dtype,
            "match_rms": self.match_rms,
            "exclude": self.exclude,
            "adamw_multiplier": self.adamw_multiplier,
            "beta_1": self.adamw.beta_1,
            "beta_2": self.adamw.beta_2,
            "epsilon": self.adamw.epsilon,
        }


def orthogonalized(matrix: Tensor, steps: int, dtype: str = "float32") -> Tensor:
    """Roughly the orthogonal factor of a matrix, by Newton-Schulz iterations.

    Args:
        matrix: float32 tensor of two axes.
        steps: Number of iterations.
        dtype: What they are computed in.

    Returns:
        float32 tensor of the same shape; its singular values are between about 0.7 and 1.2, apart
        from those that were nearly 0.
    """
    a, b, c = _COEFFICIENTS
    wide = matrix.shape[0] <= matrix.shape[1]
    x = matrix if wide else ops.transpose(matrix)
    # By the largest element first: squares of gradients below 1e-19 are 0 in float32.
    x = x / ops.maximum(ops.max(ops.abs(x)), 1e-30)
    x = x / (ops.sqrt(kernels.squared_norm(x)) + 1e-7)
    if dtype != "float32":  # which is the matrix's own
        x = ops.cast(x, dtype)
    if dtype == "float32" and 2 * x.shape[0] <= x.shape[1]:
        for done in range(0, steps, _AT_ONCE):
            x = ops.matmul(_polynomial(x, min(_AT_ONCE, steps - done)), x)
    else:
        for _ in range(steps):
            gram = ops.matmul(x, ops.transpose(x))
            x = a * x + ops.matmul(b * gram + c * ops.matmul(gram, gram), x)
    x = ops.cast(x, matrix.dtype)
    return x if wide else ops.transpose(x)


def _polynomial(x: Tensor, steps: int) -> Tensor:
    """What some iterations multiply ``x`` by: a square matrix of its smaller side.

    Every iteration multiplies by a polynomial of ``x x^T``, and what becomes of that product
    follows from it alone. So ``x`` itself is not needed in between, which saves time where it is
    long. Rounding errors of small singular values grow twelvefold with each.

    Args:
        x: float32 tensor of two axes.
        steps: Number of iterations.
    """
    a, b, c = _COEFFICIENTS
    gram = ops.matmul(x, ops.transpose(x))
    identity, product = ops.eye(x.shape[0], dtype=x.dtype), None
    for i in range(steps):
        factor = a * identity + (b * gram + c * ops.matmul(gram, gram))
        product = factor if product is None else ops.matmul(factor, product)
        if i < steps - 1:
            gram = ops.matmul(factor, ops.matmul(factor, gram))
    return product
