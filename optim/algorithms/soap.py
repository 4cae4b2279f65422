"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import keras
import numpy as np
from keras import ops

from optim.algorithms.adamw import AdamW
from optim.core.checks import check_integer
from optim.core.matrices import is_matrix, sides_of
from optim.core.moments import bias_correction, moving_average
from optim.core.optimizer import CommonArguments, Optimizer, Slot, Tensor, check_range
from optim.core.rule import stackable
from optim.kernels import backend as kernels

SIDES = ("left", "right")


@keras.saving.register_keras_serializable(package="optim")
class SOAP(Optimizer):
    r"""SOAP, in the arithmetic of its authors' code.

    With gradient :math:`G` of a matrix, and :math:`Q_L`, :math:`Q_R` as the update before left
    them:

    .. math::
        M_t &= \beta_1 M_{t-1} + (1 - \beta_1)\, G \\
        V_t &= \beta_2 V_{t-1} + (1 - \beta_2)\, (Q_L^T G\, Q_R)^2 \\
        N_t &= (Q_L^T M_t\, Q_R) / (\sqrt{\hat V_t} + \epsilon_t) \\
        W_t &= (1 - \eta \lambda)\,(W_{t-1} - \eta\, Q_L N_t Q_R^T / (1 - \beta_1^t)) \\
        L_t &= \beta_s L_{t-1} + (1 - \beta_s)\, G G^T, \qquad
        R_t = \beta_s R_{t-1} + (1 - \beta_s)\, G^T G

    with :math:`\hat V_t` as in Adam and :math:`\epsilon_t = \epsilon / \sqrt{1 - \beta_2^t}`. Every
    ``precondition_frequency`` updates one step of a power iteration moves the bases towards the
    eigenvectors of :math:`L` and :math:`R`: their columns are sorted by the size of
    :math:`\operatorname{diag}(Q^T L\, Q)`, :math:`V` with them, and :math:`Q` becomes the
    orthogonal factor of :math:`L Q`. In the other updates no decomposition is executed.

    The first update moves no matrix, and does not count: it fills :math:`L` and :math:`R` and
    decomposes them, so that no gradient is ever seen in a basis it has chosen.

    A side longer than ``max_precond_dim`` keeps its own basis; with both sides that long the rule
    is Adam's. Matrices are the variables of two axes and more; a kernel of more axes is a matrix of
    its leading axes times its trailing ones, cut where that is the most square (the original has a
    basis for each axis). Vectors, scalars, matrices with a side of 1 and biases of any shape get
    AdamW's rule with the same hyperparameters, from the first update on.

    State of an n x m matrix: ``2 n m + 2 n n + 2 m m`` numbers. On PyTorch the question whether a
    decomposition is due is answered on the host: nothing on a CPU, a wait for the device on a GPU.

    Args:
        learning_rate: A number, a learning-rate schedule or a callable without arguments.
        betas: Decay rates of the mean of the gradient and of the mean of its square in the
            eigenbasis, each in [0, 1).
        shampoo_beta: Decay rate of ``L`` and ``R``, in [0, 1); ``None`` for the second of
            ``betas``.
        precondition_frequency: Number of updates for which a basis is kept.
        max_precond_dim: Longest side that gets a basis of its own.
        epsilon: Keeps the denominator away from zero, not negative.
        weight_decay: Fraction of ``learning_rate * variable`` taken off per update.
        **common: The arguments common to all optimizers, see `optim.Optimizer`.

    Raises:
        ValueError: If a hyperparameter is out of its range.

    Example:
        >>> import numpy as np, keras, optim
        >>> variable = keras.Variable(np.zeros((2, 2), "float32"), name="kernel")
        >>> optimizer = optim.SOAP(0.5, weight_decay=0.0)
        >>> for _ in range(2):
        ...     optimizer.apply([keras.ops.array([[3.0, 0.0], [0.0, 1.0]])], [variable])
        >>> (keras.ops.convert_to_numpy(variable).round(4) + 0.0).tolist()
        [[-0.5, 0.0], [0.0, -0.5]]

    Reference:
        - [Vyas et al., SOAP: Improving and Stabilizing Shampoo using Adam](https://arxiv.org/abs/2409.11321)
    """

    def __init__(
        self,
        learning_rate: Any = 3e-3,
        betas: Sequence[float] = (0.95, 0.95),
        shampoo_beta: float | None = None,
        precondition_frequency: int = 10,
        max_precond_dim: int = 10000,
        epsilon: float = 1e-8,
        weight_decay: float | None = 0.01,
        **common: Unpack[CommonArguments],
    ) -> None:
        super().__init__(learning_rate, weight_decay=weight_decay, **common)
        if not isinstance(betas, Sequence) or isinstance(betas, str) or len(betas) != 2:
            raise ValueError(
                f"`betas` must be two numbers in [0.0, 1.0). Received: betas={betas!r}"
            )
        self.betas = tuple(check_range("betas", beta, 0.0, 1.0) for beta in betas)
        if shampoo_beta is not None:
            shampoo_beta = check_range("shampoo_beta", shampoo_beta, 0.0, 1.0)
        self.shampoo_beta = shampoo_beta
        frequency = check_integer("precondition_frequency", precondition_frequency, 1)
        self.precondition_frequency = frequency
        self.max_precond_dim = check_integer("max_precond_dim", max_precond_dim, 1)
        self.epsilon = check_range("epsilon", epsilon, 0.0)
        first, second = self.betas
        self.adamw = AdamW(0.0, first, second, epsilon, weight_decay, kernel=self.kernel)

    def rule_for(self, variable: Any) -> Optimizer:
        """This rule for matrices, AdamW's for the rest.

        Args:
            variable: One of the variables the optimizer is built with.

        Returns:
            This optimizer, or the AdamW it holds.
        """
        return self if is_matrix(variable) else self.adamw

    def slot_shapes(self, shape: tuple[int, ...]) -> Mapping[str, tuple[int, ...] | Slot]:
        """The running means, and for each side its preconditioner and basis.

        Args:
            shape: Shape of the variable.

        Returns:
            Shapes of ``"momentum"``, ``"velocity"`` (a matrix, in the eigenbasis), ``"left"``,
            ``"left_basis"``, ``"right"`` and ``"right_basis"``; a side that is too long has none.
        """
        sides = sides_of(shape)
        shapes: dict[str, tuple[int, ...]] = {"momentum": shape, "velocity": tuple(sides)}
        for name, length in zip(SIDES, sides, strict=True):
            if length <= self.max_precond_dim:
                shapes |= {name: (length, length), f"{name}_basis": (length, length)}
        return shapes

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
        shape = tuple(parameter.shape)
        sides = tuple(sides_of(shape))
        beta_1, beta_2 = self.betas
        counted = step - 1.0
        moves = counted > 0.5
        bases = [slots.get(f"{name}_basis") for name in SIDES]
        matrix = ops.reshape(gradient, sides)
        square = _turned(matrix, *bases) ** 2
        momentum = moving_average(slots["momentum"], gradient, beta_1)
        velocity = moving_average(slots["velocity"], square, beta_2)
        momentum = ops.where(moves, momentum, slots["momentum"])
        velocity = ops.where(moves, velocity, slots["velocity"])
        at = ops.maximum(counted, 1.0)
        direction = _turned(ops.reshape(momentum, sides), *bases)
        direction = direction / (ops.sqrt(velocity) + self.epsilon)
        direction = ops.where(_is_above_rounding(velocity, *bases), direction, 0.0)
        direction = ops.reshape(_turned(direction, *map(_transposed, bases)), shape)
        rate = learning_rate * ops.sqrt(bias_correction(beta_2, at)) / bias_correction(beta_1, at)
        moved = parameter - rate * direction
        if weight_decay:
            moved = moved - (learning_rate * weight_decay) * moved
        moved = ops.where(moves, moved, parameter)
        kept = {"momentum": momentum}
        for axis, name in enumerate(SIDES):
            if name in slots:
                kept[name], kept[f"{name}_basis"], order = self._advanced(
                    slots[name], bases[axis], matrix if axis == 0 else _transposed(matrix), counted
                )
                velocity = ops.take(velocity, order, axis=axis)
        return moved, {**kept, "velocity": velocity}

    def _advanced(
        self, preconditioner: Tensor, basis: Tensor, matrix: Tensor, counted: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A side's preconditioner and basis after an update, and the new order of its columns."""
        beta = self.betas[1] if self.shampoo_beta is None else self.shampoo_beta
        outer = ops.matmul(matrix, _transposed(matrix))
        preconditioner = moving_average(preconditioner, outer, beta)
        first = counted < 0.5
        due = ops.equal(ops.mod(counted, float(self.precondition_frequency)), 0.0)
        due = ops.logical_and(due, ops.logical_not(first))
        basis = kernels.refresh(first, eigenvectors, preconditioner, basis)
        # The order goes along as one more row, because one tensor is all that comes back.
        length = basis.shape[0]
        same = ops.cast(ops.reshape(ops.arange(length, dtype="float32"), (1, length)), basis.dtype)
        both = ops.concatenate([basis, same], axis=0)
        both = kernels.refresh(due, turned_towards, preconditioner, both)
        return preconditioner, both[:length], ops.cast(both[length], "int32")

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor, as a serializable dictionary."""
        return {
            **super().get_config(),
            "betas": list(self.betas),
            "shampoo_beta": self.shampoo_beta,
            "precondition_frequency": self.precondition_frequency,
            "max_precond_dim": self.max_precond_dim,
            "epsilon": self.epsilon,
        }


def eigenvectors(matrix: Tensor, current: Tensor) -> Tensor:
    """The eigenvectors of a symmetric matrix as columns, those of the largest values first.

    Args:
        matrix: float32 tensor of shape (n, n).
        current: float32 tensor of that shape; not used.

    Returns:
        float32 tensor of that shape. NaN if an element of the matrix is not finite: a decomposition
        would raise an error on one backend and never return on another.
    """
    safe, finite = _safe(matrix)
    values, vectors = (ops.flip(part, axis=-1) for part in ops.eigh(safe))
    return ops.where(finite, _settled(values, vectors), float("nan"))


def _settled(values: Tensor, vectors: Tensor) -> Tensor:
    """Eigenvectors that do not depend on rounding where the matrix is rank-deficient.

    The first gradient of a layer seldom gives its preconditioner full rank, and any basis of the
    null space is valid: a decomposition returns one that depends on the last bits. Adam in another
    basis makes another update, so accumulated gradients, another backend or another order of
    addition would train differently. The null space as a whole is stable; its basis is made from
    fixed vectors, close to the axes, projected onto it.

    Args:
        values: Tensor of shape (n,), the largest first.
        vectors: Tensor of shape (n, n), as columns.
    """
    known = values > 1e-5 * values[0]
    kept = ops.where(known, vectors, 0.0)
    length = vectors.shape[0]
    axes = ops.eye(length, dtype=vectors.dtype)
    numbers = ops.arange(1, length + 1, dtype=vectors.dtype)
    # Not the axes themselves: projected ones can be linearly dependent.
    fixed = axes + 0.01 * ops.cos(ops.outer(numbers, numbers))
    projected = ops.matmul(axes - ops.matmul(kept, _transposed(kept)), fixed)
    basis, _ = ops.qr(ops.where(known, vectors, projected))
    return ops.where(known, vectors, basis)


def turned_towards(matrix: Tensor, both: Tensor) -> Tensor:
    """One step of a power iteration of a basis towards a symmetric matrix's eigenvectors.

    Args:
        matrix: float32 tensor of shape (n, n).
        both: float32 tensor of shape (n + 1, n), the basis as columns; the last row is not used.

    Returns:
        float32 tensor of that shape: the new basis, and which column each has come from. NaN and
        the same order if an element of the matrix is not finite.
    """
    safe, finite = _safe(matrix)
    length = matrix.shape[0]
    basis = ops.where(finite, both[:length], 0.0)
    sizes = ops.sum(basis * ops.matmul(safe, basis), axis=0)
    order = ops.argsort(-sizes)
    new, _ = ops.qr(ops.matmul(safe, ops.take(basis, order, axis=1)))
    new = ops.where(finite, new, float("nan"))
    moved = ops.where(finite, ops.cast(order, both.dtype), both[length])
    return ops.concatenate([new, ops.reshape(moved, (1, length))], axis=0)


def _safe(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """A multiple of a matrix that can be decomposed, and whether all of it is finite."""
    finite = ops.isfinite(matrix)
    safe = ops.where(finite, matrix, 0.0)
    # Relative to the largest element: of small gradients the squares are smaller still.
    return safe / ops.maximum(ops.max(ops.abs(safe)), 1e-37), ops.all(finite)


def _is_above_rounding(velocity: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """Where squared gradients in the eigenbasis are more than what rounding leaves there.

    A gradient has no part in the null space of its preconditioner; turned into the eigenbasis, it
    has one of its size times the precision. Divided by its own root that would be a full step, in
    a direction that only rounding determines.

    Args:
        velocity: Tensor of shape (n, m), the mean of the squares.
        left: The basis of the first side; None if it is not turned.
        right: The basis of the second side.
    """
    turned = [axis for axis, basis in enumerate((left, right)) if basis is not None]
    if not turned:
        return ops.ones_like(velocity, dtype="bool")
    precision = 8.0 * float(np.finfo(keras.backend.standardize_dtype(velocity.dtype)).eps)
    return velocity > precision**2 * ops.sum(velocity, axis=turned, keepdims=True)


def _turned(matrix: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """A matrix in other bases of its two sides, given as columns; None for its own."""
    if left is not None:
        matrix = ops.matmul(ops.transpose(left), matrix)
    return matrix if right is None else ops.matmul(matrix, right)


def _transposed(matrix: Tensor | None) -> Tensor | None:
    return None if matrix is None else ops.transpose(matrix)
