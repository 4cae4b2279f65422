"""Variables as matrices: which ones are, and where their axes are cut into rows and columns."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from keras import ops

from optim.core.parameter_groups import path_of
from optim.core.rule import Tensor


class Sides(NamedTuple):
    """A variable as a matrix.

    Attributes:
        rows: Product of its leading axes.
        columns: Product of its trailing axes.
    """

    rows: int
    columns: int

    @property
    def wide(self) -> bool:
        """Whether the rows are projected: the smaller side is, the columns of a square."""
        return self.rows < self.columns

    def projected(self, rank: int) -> tuple[int, int]:
        """Shape of the matrix after its smaller side was projected to ``rank``."""
        return (rank, self.columns) if self.wide else (self.rows, rank)

    def projection(self, rank: int) -> tuple[int, int]:
        """Shape of the matrix that does it: the smaller side times ``rank``."""
        return min(self), rank

    def project(self, matrix: Tensor, projection: Tensor) -> Tensor:
        """A matrix with its smaller side projected."""
        if self.wide:
            return ops.matmul(ops.transpose(projection), matrix)
        return ops.matmul(matrix, projection)

    def lift(self, projected: Tensor, projection: Tensor) -> Tensor:
        """A projected matrix in the space it came from."""
        if self.wide:
            return ops.matmul(projection, projected)
        return ops.matmul(projected, ops.transpose(projection))


def sides_of(shape: tuple[int, ...]) -> Sides:
    """A shape as that of a matrix: leading axes times trailing ones, cut where it is most square.

    Args:
        shape: Shape of a variable.

    Returns:
        Its rows and columns; a vector or a scalar has one row.
    """
    if len(shape) < 2:
        return Sides(1, math.prod(shape))
    cuts = [Sides(math.prod(shape[:i]), math.prod(shape[i:])) for i in range(1, len(shape))]
    return max(cuts, key=min)


def is_matrix(variable: Any) -> bool:
    """Whether a variable is a matrix by its shape and not a bias (attention's have two axes).

    Args:
        variable: A Keras variable.
    """
    sides = sides_of(tuple(variable.shape))
    return min(sides) > 1 and not path_of(variable).endswith("bias")
