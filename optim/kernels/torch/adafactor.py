"""Adafactor on PyTorch: sums over rows and columns, and the update, in tiles of a few rows.

As it is written, the rule makes a dozen passes over main memory, each into a new tensor of the size
of the gradient. Here a matrix is read three times, a few rows at a time, through one buffer: for
the means of its squares, for the size of the update, and to apply it. The size needs no update: the
squares of the gradient times the squares of the factors of rows and columns are a product with a
vector.

The whole of it is one operation to PyTorch, ``optim::run_adafactor``, so that it can be recorded as
a part of a captured training step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from optim.kernels.torch.custom_op import NumberedObjects, define_in_place, tile_width

# Elements of a tile for each thread: many enough to hide the calls, few enough for the caches.
_TILE = 65536
# Squares of the factors of columns are kept below infinity: it would make NaN of gradients of 0.
_LARGEST = torch.finfo(torch.float32).max


class _Hyperparameters(NamedTuple):
    """The hyperparameters, as `optim.Adafactor` has them."""

    epsilon_1: float
    epsilon_2: float
    clip_threshold: float
    beta_2_decay: float
    momentum: float | None
    scale_parameter: bool


@dataclass
class _Update:
    """One update of many tensors.

    Attributes:
        numbers: The hyperparameters.
        share: Of the new squares in their means, a scalar.
        learning_rate: A scalar.
        weight_decay: A Python number.
        width: Elements of a tile.
        buffer: Flat, of at least that size.
        buffers: Shape -> the buffer in that shape.
    """

    numbers: _Hyperparameters
    share: torch.Tensor
    learning_rate: torch.Tensor
    weight_decay: float
    width: int
    buffer: torch.Tensor
    buffers: dict[Any, torch.Tensor] = field(default_factory=dict)

    def matrix(
        self,
        parameter: torch.Tensor,
        gradient: torch.Tensor,
        means: list[torch.Tensor],
        momentum: torch.Tensor | None,
    ) -> None:
        """A tensor of two and more axes: matrices in its last two."""
        g = gradient.view(-1, *gradient.shape[-2:])
        count, rows, columns = g.shape
        cut = _MatrixTiles(count, rows, columns, self.width)
        row, column = means[0].view(count, rows, 1), means[1].view(count, 1, columns)
        rate = self._rate(parameter)
        given = cut(g)
        of_rows, of_columns = self._mean_squares(given, cut, row, column)
        row.lerp_(of_rows, self.share)
        column.lerp_(of_columns, self.share)
        by_row = row.rsqrt().mul_(row.mean(1, keepdim=True).sqrt_())
        by_column = column.rsqrt()
        # The squares of updates, summed over each row but for the row's own factor.
        sums = of_rows
        squares = by_column.square().clamp_max_(_LARGEST).view(count, columns, 1)
        for x, square, out in zip(given, cut.shared(squares), cut(sums), strict=True):
            torch.bmm(self._square(x), square, out=out)
        by_row.mul_(self._factor(rate, sums.mul_(by_row).mul_(by_row).sum(), g.numel()))
        p = cut(parameter.view(g.shape))
        m = [None] * len(p) if momentum is None else cut(momentum.view(g.shape))
        factors = cut(by_row), cut.shared(by_column)
        for x, of_row, of_column, to, mean in zip(given, *factors, p, m, strict=True):
            delta = torch.mul(x, of_row, out=self._like(x))
            if mean is None and not self.weight_decay:
                to.addcmul_(delta, of_column, value=-1.0)
            else:
                self._move(to, delta.mul_(of_column), mean, rate)

    def vector(
        self,
        parameter: torch.Tensor,
        gradient: torch.Tensor,
        means: list[torch.Tensor],
        momentum: torch.Tensor | None,
    ) -> None:
        """A tensor of fewer axes."""
        (velocity,) = means
        rate = self._rate(parameter)
        velocity.lerp_(gradient.square().add_(self.numbers.epsilon_1), self.share)
        delta = velocity.rsqrt().mul_(gradient)
        flat = delta.view(-1)
        delta.mul_(self._factor(rate, flat.dot(flat), flat.numel()))
        self._move(parameter, delta, momentum, rate)

    def _rate(self, parameter: torch.Tensor) -> torch.Tensor:
        if not self.numbers.scale_parameter:
            return self.learning_rate
        total = torch.stack([x.dot(x) for x in parameter.view(-1).split(self.width)]).sum()
        size = total.div_(parameter.numel()).sqrt_()
        return self.learning_rate * size.clamp_min_(self.numbers.epsilon_2)

    def _factor(self, rate: torch.Tensor, total: torch.Tensor, count: int) -> torch.Tensor:
        """What updates are multiplied by, given the sum of their squares."""
        size = total.div_(count).sqrt_().div_(self.numbers.clip_threshold)
        return rate / size.clamp_min_(1.0)

    def _mean_squares(
        self, given: list[torch.Tensor], cut: _MatrixTiles, row: torch.Tensor, column: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        of_rows, of_columns = torch.empty_like(row), torch.zeros_like(column)
        for x, to_row, to_column in zip(given, cut(of_rows), cut.shared(of_columns), strict=True):
            square = self._square(x)
            torch.sum(square, 2, keepdim=True, out=to_row)
            to_column += square.sum(1, keepdim=True)
        epsilon = self.numbers.epsilon_1
        of_rows.div_(column.shape[2]).add_(epsilon)
        return of_rows, of_columns.div_(row.shape[1]).add_(epsilon)

    def _move(
        self,
        parameter: torch.Tensor,
        delta: torch.Tensor,
        momentum: torch.Tensor | None,
        rate: torch.Tensor,
    ) -> None:
        if momentum is not None:
            momentum.lerp_(delta, 1.0 - (self.numbers.momentum or 0.0))
            delta.copy_(momentum)
        if self.weight_decay:
            delta.addcmul_(parameter, rate * self.weight_decay)
        parameter.sub_(delta)

    def _square(self, x: torch.Tensor) -> torch.Tensor:
        return torch.mul(x, x, out=self._like(x))

    def _like(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape not in self.buffers:
            self.buffers[x.shape] = self.buffer[: x.numel()].view(x.shape)
        return self.buffers[x.shape]


class _MatrixTiles:
    """Cuts tensors of shape (count, rows, ...) into several whole matrices, or rows of one.

    Args:
        count: Number of matrices.
        rows: Of each.
        columns: Of each.
        width: Elements of a tile.
    """

    def __init__(self, count: int, rows: int, columns: int, width: int) -> None:
        self._whole = rows * columns <= width
        self._step = width // (rows * columns) if self._whole else max(width // columns, 1)
        self._repeats = 1 if self._whole else -(-rows // self._step)

    def __call__(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The tiles."""
        if self._whole:
            return list(x.split(self._step))
        return [part for matrix in x.split(1) for part in matrix.split(self._step, 1)]

    def shared(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The tiles of what all rows of a matrix share, of shape (count, ...)."""
        parts = x.split(self._step if self._whole else 1)
        return [part for part in parts for _ in range(self._repeats)]


# ---- one operation for PyTorch -------------------------------------------------------------------

_HYPERPARAMETERS: NumberedObjects[_Hyperparameters] = NumberedObjects()


def _run(
    parameters: list[torch.Tensor],
    gradients: list[torch.Tensor],
    slots: list[torch.Tensor],
    step: torch.Tensor,
    learning_rate: torch.Tensor,
    weight_decay: float,
    rule: int,
) -> None:
    numbers = _HYPERPARAMETERS[rule]
    largest = max(p.numel() for p in parameters)
    width = tile_width(_TILE, largest, step.device)
    longest = max((p.shape[-1] for p in parameters if p.dim() > 1), default=0)
    buffer = torch.empty(max(width, longest), dtype=torch.float32, device=step.device)
    share = torch.exp(numbers.beta_2_decay * torch.log(step))
    update = _Update(numbers, share, learning_rate, weight_decay, width, buffer)
    given = iter(slots)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        means = [next(given) for _ in range(2 if parameter.dim() > 1 else 1)]
        momentum = None if numbers.momentum is None else next(given)
        if not parameter.numel():
            continue
        run = update.matrix if parameter.dim() > 1 else update.vector
        run(parameter, gradient, means, momentum)


define_in_place(
    "run_adafactor(Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[] slots, Tensor step, "
    "Tensor learning_rate, float weight_decay, int rule) -> ()",
    _run,
)


def run_adafactor(
    rule: Any,
    parameters: list[torch.Tensor],
    gradients: list[torch.Tensor],
    slots: dict[str, list[torch.Tensor]],
    step: torch.Tensor,
    learning_rate: torch.Tensor,
    weight_decay: float,
) -> None:
    """Execute Adafactor's rule over lists of tensors, in place.

    Args:
        rule: An `optim.Adafactor`.
        parameters: float32, contiguous.
        gradients: float32, contiguous.
        slots: Slot name -> one tensor for each parameter that has such a slot.
        step: float32 scalar.
        learning_rate: float32 scalar.
        weight_decay: A Python number.
    """
    numbers = _Hyperparameters(*(getattr(rule, name) for name in _Hyperparameters._fields))
    number = _HYPERPARAMETERS.number(rule, numbers, lambda: numbers)
    left = {name: iter(tensors) for name, tensors in slots.items()}
    flat = []
    for parameter in parameters:
        names = ["row", "column"] if parameter.dim() > 1 else ["velocity"]
        flat += [next(left[name]) for name in (*names, "momentum") if name in left]
    torch.ops.optim.run_adafactor(
        parameters, gradients, flat, step, learning_rate, weight_decay, number
    )
