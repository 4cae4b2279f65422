"""State in 8 bits: codes of a dynamic scale, block by block, around any rule of this package."""

from __future__ import annotations

import functools
import inspect
import math
import re
from typing import Any, cast

import numpy as np
from keras import ops

from optim.core import precision
from optim.core.checks import check_pattern
from optim.core.optimizer import Optimizer, Slot, Tensor, fused
from optim.core.parameter_groups import path_of
from optim.kernels import backend
from optim.kernels.eight_bit_codes import (
    BLOCK,
    HASH_FACTORS,
    SMALLEST_SCALE,
    code_values,
    nearest,
    not_larger,
)

SMALLEST_QUANTIZED = 4096
"""Tensors with fewer elements keep float32 state: there is nothing to save."""

EMBEDDINGS = r"embed"
"""Paths of variables that keep float32 state: their rows have gradients of very different size."""


def quantized(x: Tensor, signed: bool, step: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes of a tensor, and the scales of its blocks.

    The nearest codes, or with ``step`` one of the two neighbours, each as often as it is near: then
    the mean over many updates is the number itself. What decides is a hash of the number's bits and
    the step, so the same run rounds the same way again.

    Args:
        x: float32 tensor of any shape, not empty.
        signed: Whether it has negative elements. If not, what is not 0 gets a code that is not 0.
        step: float32 scalar, for the random choice.

    Returns:
        uint8 tensor of shape (blocks, `BLOCK`) and float32 tensor of shape (blocks,).
    """
    size = math.prod(tuple(x.shape))
    flat = ops.pad(ops.reshape(x, (size,)), [[0, -size % BLOCK]])
    blocks = ops.reshape(flat, (-1, BLOCK))
    scales = ops.max(ops.abs(blocks), axis=1)
    relative = blocks / ops.expand_dims(ops.maximum(scales, SMALLEST_SCALE), 1)
    relative = ops.reshape(relative, (-1,))
    if step is None:
        found = _found(nearest(signed), relative)
    else:
        # Of the values above -1 the last one that is not larger; the gap above it is to be shared.
        table = code_values(signed)
        below = _found(not_larger(signed), relative)
        gaps = backend.take(ops.convert_to_tensor(np.diff(table)), below)
        above = relative - backend.take(ops.convert_to_tensor(table[:-1]), below)
        found = below + ops.cast(above > _random(relative, step) * gaps, below.dtype)
    codes = ops.cast(ops.reshape(found, tuple(blocks.shape)), "uint8")
    return codes, scales


def _found(finder: np.ndarray, x: Tensor) -> Tensor:
    """How many borders are below each element of ``x``, see `optim.kernels.eight_bit_codes`."""
    bits = ops.view(x, "int32")
    upper = ops.bitwise_and(ops.right_shift(bits, 16), (1 << 16) - 1)
    return ops.abs(ops.right_shift(backend.take(ops.convert_to_tensor(finder), upper) + bits, 16))


def _random(x: Tensor, step: Tensor) -> Tensor:
    """A number in [0, 1) made of each element's bits and the step."""
    bits = ops.bitwise_xor(ops.view(x, "int32"), ops.cast(step, "int32") * HASH_FACTORS[0])
    for factor in HASH_FACTORS:
        shifted = ops.bitwise_and(ops.right_shift(bits, 15), (1 << 17) - 1)
        bits = ops.bitwise_xor(bits, shifted) * factor
    return ops.cast(ops.bitwise_and(ops.right_shift(bits, 9), (1 << 23) - 1), "float32") * 2.0**-23


def restored(codes: Tensor, scales: Tensor, shape: tuple[int, ...], signed: bool) -> Tensor:
    """The inverse of `quantized`, up to rounding.

    Args:
        codes: uint8 tensor of shape (blocks, `BLOCK`).
        scales: float32 tensor of shape (blocks,).
        shape: Shape of the tensor that was quantized.
        signed: As in `quantized`.

    Returns:
        float32 tensor.
    """
    table = ops.convert_to_tensor(code_values(signed))
    relative = backend.take(table, ops.cast(codes, "int32"))
    flat = ops.reshape(relative * ops.expand_dims(scales, 1), (-1,))
    return ops.reshape(flat[: math.prod(shape)], shape)


@functools.cache
def _hyperparameters(cls: Any) -> frozenset[str]:
    return frozenset(inspect.signature(cls).parameters) - {"name", "learning_rate"}


class EightBit(Optimizer):
    r"""Mixin: the state of the optimizer it is combined with, in 8 bits.

    ``class Lion8bit(EightBit, Lion)`` is Lion with its state quantized: an update restores the
    slots, executes Lion's rule in float32 and quantizes the new slots. Blocks of 256 numbers share
    a float32 scale, their largest absolute value, and are stored as the nearest of 256 numbers of a
    dynamic scale (`code_values`): 1.016 bytes an element.

    Of a slot that is a mean of squares the root is stored: the rule uses the root, whose relative
    error is then that of a code, and numbers down to the square of the smallest code are kept. What
    is not 0 is not rounded to 0. A denominator that vanishes while its numerator does not would
    let a weight jump; here it can only be too large.

    Small tensors and variables whose path matches ``keep`` get the full-precision rule.

    Attributes:
        full_precision: The class whose rule this is; set by the subclass.
        full: An optimizer of that class, with the same hyperparameters.
        squares: Names of the slots that are means of squares.
        dithered: Names of the slots that are rounded up or down at random, so that updates
            smaller than the gaps between codes are not lost.
    """

    full_precision: type[Optimizer]
    full: Optimizer
    squares: frozenset[str] = frozenset({"velocity"})
    dithered: frozenset[str] = frozenset()

    def __init__(self, *args: Any, keep: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.keep = EMBEDDINGS if keep is None else check_pattern("keep", keep)
        config = {**self.get_config(), "learning_rate": 0.0, "name": None}
        for key in ("keep", "parameter_groups"):
            config.pop(key, None)
        self.full = self.full_precision.from_config(config)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        full, cls = vars(self).get("full"), cast(Any, self.full_precision)
        if full is not None and name in vars(full) and name in _hyperparameters(cls):
            setattr(full, name, value)  # its rule is the one that is executed

    def rule_for(self, variable: Any) -> Optimizer:
        """This rule for large tensors; full precision for small ones, float64 and ``keep``.

        Args:
            variable: One of the variables the optimizer is built with.

        Returns:
            This optimizer, or one of the class `full_precision`.
        """
        small = math.prod(tuple(variable.shape)) < SMALLEST_QUANTIZED
        wide = precision.working_dtype(variable) == "float64"
        return self.full if small or wide or re.search(self.keep, path_of(variable)) else self

    def slot_shapes(self, shape: tuple[int, ...]) -> dict[str, Any]:
        """Codes and scales in place of every slot of the variable's shape.

        Args:
            shape: Shape of the variable.

        Returns:
            Slot name -> slot.
        """
        blocks = -(-math.prod(shape) // BLOCK)
        slots: dict[str, Any] = {}
        for name, slot in self.full.slot_shapes(shape).items():
            if slot == shape:
                zero = int(np.searchsorted(code_values(name not in self.squares), 0.0))
                slots[f"{name}_codes"] = Slot((blocks, BLOCK), "uint8", zero)
                slots[f"{name}_scales"] = (blocks,)
            else:
                slots[name] = slot
        return slots

    @fused("eight_bit")
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
        shape = tuple(parameter.shape)
        wide = {}
        for name in self.full.slot_shapes(shape):
            if f"{name}_codes" not in slots:
                wide[name] = slots[name]
                continue
            square = name in self.squares
            value = restored(slots[f"{name}_codes"], slots[f"{name}_scales"], shape, not square)
            wide[name] = value * value if square else value
        parameter, wide = self.full.update(
            parameter, gradient, wide, step, learning_rate, weight_decay
        )
        new = {}
        for name, value in wide.items():
            if f"{name}_codes" not in slots:
                new[name] = value
                continue
            square = name in self.squares
            at = step if name in self.dithered else None
            codes, scales = quantized(ops.sqrt(value) if square else value, not square, at)
            new |= {f"{name}_codes": codes, f"{name}_scales": scales}
        return parameter, new

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor, as a serializable dictionary."""
        return {**super().get_config(), "keep": self.keep}
