"""GaLore: AdamW in the subspace that holds most of the gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import keras
from keras import ops

from optim.algorithms.low_rank import LowRank
from optim.core.matrices import sides_of
from optim.core.moments import adam_denominator, bias_correction
from optim.core.optimizer import CommonArguments, Slot, Tensor
from optim.kernels import backend as kernels


@keras.saving.register_keras_serializable(package="optim")
class GaLoreAdamW(LowRank):
    r"""AdamW on gradients that are projected to a few singular vectors, with state that small.

    With gradient :math:`G` of an n x m matrix, :math:`n < m` (else everything is transposed), and
    the ``rank`` first left singular vectors :math:`P` of the gradient at the last refresh:

    .. math::
        R_t &= P^T G \\
        M_t &= \beta_1 M_{t-1} + (1 - \beta_1)\, R_t \\
        V_t &= \beta_2 V_{t-1} + (1 - \beta_2)\, R_t^2 \\
        N_t &= \hat M_t / (\sqrt{\hat V_t} + \epsilon) \\
        W_t &= (1 - \eta \lambda)\, W_{t-1} - \eta\, \alpha\, P N_t

    with the bias corrections of `optim.AdamW` and :math:`\alpha` = ``scale``. :math:`P` is computed
    anew at the updates 1, 1 + ``update_proj_gap``, and so on; between them no singular value
    decomposition is executed. The moments are kept when :math:`P` changes.

    State of a matrix: ``rank * (min(n, m) + 2 max(n, m))`` numbers, :math:`P` included, in place of
    ``2 n m``. The sign of a singular vector is arbitrary. :math:`P N_t` does not depend on it, but
    moments that are kept must not meet a vector of the opposite sign, so a refresh gives each
    vector the sign of the one it replaces (the original takes what the library returns). Two
    backends then make the same updates, while their slots may differ by the sign of a row.

    Which variables count as matrices: those of two axes and more that ``target_modules`` picks and
    whose smaller side is larger than ``rank``; a kernel of more axes is a matrix of its leading
    axes times its trailing ones, cut where that is the most square. Everything else gets exactly
    AdamW's rule, without ``scale``.

    On PyTorch the question whether a refresh is due is answered on the host, once per matrix and
    update: nothing on a CPU, a wait for the device on a GPU.

    Args:
        learning_rate: A number, a learning-rate schedule or a callable without arguments.
        rank: What the smaller side of a matrix is projected to.
        update_proj_gap: Number of updates for which a projection is kept.
        scale: Factor of the updates of the projected matrices, not negative.
        target_modules: Regular expressions, or a single one, searched for in the paths of
            variables; ``None`` or ``"all-linear"`` for all matrices apart from biases and
            embeddings.
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
        >>> optimizer = optim.GaLoreAdamW(0.5, rank=1, scale=1.0)
        >>> optimizer.apply([keras.ops.array([[0.0, 0.0, 0.0], [9.0, -9.0, 9.0]])], [variable])
        >>> (keras.ops.convert_to_numpy(variable).round(4) + 0).tolist()
        [[0.0, 0.0, 0.0], [-0.5, 0.5, -0.5]]
        >>> {name: tuple(slot.shape) for name, slot in optimizer.slots_of(variable).items()}
        {'projection': (2, 1), 'momentum': (1, 3), 'velocity': (1, 3)}

    Reference:
        - [Zhao et al., GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection](https://arxiv.org/abs/2403.03507)
    """

    def __init__(
        self,
        learning_rate: Any = 1e-3,
        rank: int = 128,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        target_modules: str | Sequence[str] | None = None,
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

    def slot_shapes(self, shape: tuple[int, ...]) -> Mapping[str, tuple[int, ...] | Slot]:
        """The projection and the running means of the projected gradient and of its square.

        Args:
            shape: Shape of the variable.

        Returns:
            Shapes of ``"projection"``, ``"momentum"`` and ``"velocity"``.
        """
        sides = sides_of(shape)
        small = sides.projected(self.rank)
        return {"projection": sides.projection(self.rank), "momentum": small, "velocity": small}

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
        due = ops.equal(ops.mod(step - 1.0, float(self.update_proj_gap)), 0.0)
        projection = kernels.refresh(due, principal, matrix, slots["projection"])
        new = self.moments(slots, sides.project(matrix, projection))
        denominator = adam_denominator(new, step, self.adamw.beta_2, self.adamw.epsilon)
        direction = new["momentum"] / denominator
        lifted = sides.lift(direction, projection)
        factor = learning_rate * (self.scale / bias_correction(self.adamw.beta_1, step))
        delta = factor * ops.reshape(lifted, shape)
        if weight_decay:
            delta = delta + (learning_rate * weight_decay) * parameter
        return parameter - delta, {"projection": projection, **new}


def principal(matrix: Tensor, current: Tensor) -> Tensor:
    """The first singular vectors of a matrix, on the side that is smaller.

    Args:
        matrix: float32 tensor of shape (rows, columns).
        current: float32 tensor of shape (smaller side, rank), the vectors so far, or zeros.

    Returns:
        float32 tensor of that shape with orthonormal columns, none of which points away from its
        predecessor in ``current``. NaN if an element of the matrix is
        not finite: a decomposition would raise an error on one backend and never return on another.
    """
    finite = ops.isfinite(matrix)
    largest = ops.max(ops.abs(ops.where(finite, matrix, 0.0)))
    # Relative to the largest element: squares of gradients below 1e-19 are 0 in float32.
    safe = ops.where(finite, matrix, 0.0) / ops.maximum(largest, 1e-37)
    vectors = kernels.singular_vectors(safe)[:, : current.shape[1]]
    backwards = ops.sum(vectors * current, axis=0, keepdims=True) < 0.0
    vectors = ops.where(backwards, -vectors, vectors)
    return ops.where(ops.all(finite), vectors, float("nan"))
