"""8-bit state on PyTorch: restored, used and quantized tile by tile, in the cache.

As it is written, such a rule makes some forty passes over main memory and reads its tables through
Keras. Here a tile of every slot is restored into a buffer, the kernel of the full-precision rule
updates the tile in place, and the buffers become codes again. Two codes are restored by one
look-up. Of a mean of squares the root is stored, but none is taken: the tables are of squares.

On a GPU with Triton a kernel does the same for all tensors (`triton_kernels.coded`).

The whole of it is one operation to PyTorch, ``optim::run_eight_bit``, so that it can be recorded as
a part of a captured training step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from optim.kernels.eight_bit_codes import (
    BLOCK,
    HASH_FACTORS,
    SMALLEST_SCALE,
    code_values,
    nearest,
    nearest_to_root,
    not_larger,
)
from optim.kernels.torch import custom_op
from optim.kernels.torch.custom_op import NumberedObjects, define_in_place, tile_width

# Elements of a tile for each thread: many enough to hide the calls, few enough for the caches.
_TILE = 131072
# Rows that threads can share. Half of a block is a multiple of it.
_ROWS = 64


class StoredSlot(NamedTuple):
    """Codes and scales of a slot, or of a tile of it, each seen in two ways.

    Attributes:
        codes: uint8, flat.
        pairs: The same as uint16.
        scales: float32, flat.
        column: The same, of shape (blocks, 1).
    """

    codes: torch.Tensor
    pairs: torch.Tensor
    scales: torch.Tensor
    column: torch.Tensor

    def tiles(self, width: int) -> list[StoredSlot]:
        """Cut into tiles of at most ``width`` elements, a multiple of `BLOCK`."""
        blocks = width // BLOCK
        sizes = width, width // 2, blocks, blocks
        parts = (whole.split(size) for whole, size in zip(self, sizes, strict=True))
        return [StoredSlot(*tile) for tile in zip(*parts, strict=True)]


class SlotBuffer:
    """Memory for restored numbers, seen in the ways in which it is used: a view costs a call.

    Args:
        memory: float32, flat, of a multiple of `BLOCK` elements.
    """

    def __init__(self, memory: torch.Tensor) -> None:
        self.values = memory
        self.blocks = memory.view(-1, BLOCK)
        self.bits = memory.view(torch.int32)
        self.pairs = memory.view(torch.float64)


class Codec:
    """Makes codes of buffers and buffers of codes.

    Args:
        indices: int32, flat: memory of the size of the buffers.
        found: The same again.
    """

    def __init__(self, indices: torch.Tensor, found: torch.Tensor) -> None:
        self._indices, self._found = indices, found
        self._half = indices[: indices.numel() // 2]
        self._wide = indices.view(torch.int64)
        self._in_threads = not custom_op.on_gpu(indices.device) and torch.get_num_threads() > 1
        self._absolute = found.view(torch.float32)
        self._absolute_blocks = self._absolute.view(-1, BLOCK)

    def restore(self, stored: StoredSlot, square: bool, out: SlotBuffer) -> None:
        """`optim.core.eight_bit.restored`, or its square, into a buffer.

        Args:
            stored: Codes and scales.
            square: Whether the codes are of a root without sign.
            out: As many elements as there are codes.
        """
        pairs = _table("pairs of squares" if square else "pairs", self._found.device)
        if self._in_threads:
            _gather(pairs, self._wide.copy_(stored.pairs), out.pairs)
        else:
            torch.index_select(pairs, 0, self._half.copy_(stored.pairs), out=out.pairs)
        out.blocks.mul_(stored.column.square() if square else stored.column)

    def quantize(
        self, x: SlotBuffer, square: bool, step: torch.Tensor | None, out: StoredSlot
    ) -> None:
        """`optim.core.eight_bit.quantized`, of the numbers or their roots, into codes and scales.

        Args:
            x: The numbers, which are used up.
            square: Whether the codes are of the root, without sign.
            step: float32 scalar for the random choice of a neighbour, None for the nearest code.
            out: As many codes as there are numbers.
        """
        found = self._found
        if square:
            largest = x.blocks.amax(1).clamp_min_(SMALLEST_SCALE)
            torch.sqrt(largest, out=out.scales)
            x.blocks.div_(largest.unsqueeze(1))
        else:
            torch.abs(x.values, out=self._absolute)
            torch.amax(self._absolute_blocks, 1, out=out.scales)
            x.blocks.div_(out.column.clamp_min(SMALLEST_SCALE))
        # The upper half of a negative zero or NaN is negative too: no index without the mask.
        upper = found if self._in_threads else self._indices
        torch.bitwise_right_shift(x.bits, 16, out=upper).bitwise_and_(0xFFFF)
        kind = "nearest to root" if square else "nearest" if step is None else "not larger"
        self._look_up(_table(kind, found.device), upper, found)
        found.add_(x.bits).bitwise_right_shift_(16)
        if not square:
            found.abs_()
        if step is not None:
            self._choose(x, step)
        out.codes.copy_(found)

    def _look_up(self, table: torch.Tensor, indices: torch.Tensor, out: torch.Tensor) -> None:
        """``table[indices]``; in threads there is memory for half of the indices at a time."""
        if not self._in_threads:
            torch.index_select(table, 0, indices, out=out)
            return
        for part, result in zip(indices.chunk(2), out.chunk(2), strict=True):
            _gather(table, self._wide.copy_(part), result)

    def _choose(self, x: SlotBuffer, step: torch.Tensor) -> None:
        """Add 1 to the codes below, at random, as often as the next one is near."""
        below, shifted, bits = self._found, self._indices, x.bits
        gaps = torch.empty(below.shape, dtype=torch.float64, device=below.device)
        self._look_up(_table("values and gaps", below.device), below, gaps)
        value, gap = gaps.view(torch.float32).view(-1, 2).unbind(1)
        share = x.values - value
        bits.bitwise_xor_(step.to(torch.int32) * HASH_FACTORS[0])
        for factor in HASH_FACTORS:
            torch.bitwise_right_shift(bits, 15, out=shifted).bitwise_and_((1 << 17) - 1)
            bits.bitwise_xor_(shifted).mul_(factor)
        bits.bitwise_right_shift_(9).bitwise_and_((1 << 23) - 1)
        below.add_(share > bits.to(torch.float32).mul_(2.0**-23).mul_(gap))


def _gather(table: torch.Tensor, indices: torch.Tensor, out: torch.Tensor) -> None:
    """``table[indices]`` as rows of a matrix: of a vector PyTorch looks up with one thread only."""
    rows = indices.view(_ROWS, -1)
    torch.gather(table.expand(_ROWS, -1), 1, rows, out=out.view(_ROWS, -1))


def _pairs(values: np.ndarray) -> np.ndarray:
    """The numbers of two codes that are neighbours in memory, for both as one integer."""
    result: np.ndarray = values[np.arange(1 << 16, dtype="uint16").view("uint8")].view("float64")
    return result


def _values_and_gaps() -> np.ndarray:
    values = code_values(True)
    return np.stack([values[:-1], np.diff(values)], 1).view("float64")[:, 0]


_MAKE: dict[str, Callable[[], np.ndarray]] = {
    "pairs": lambda: _pairs(code_values(True)),
    "pairs of squares": lambda: _pairs(np.square(code_values(False))),
    "nearest": lambda: nearest(True),
    "nearest to root": nearest_to_root,
    "not larger": lambda: not_larger(True),
    "values and gaps": _values_and_gaps,
}
_TABLES: dict[Any, torch.Tensor] = {}


def _table(kind: str, device: torch.device) -> torch.Tensor:
    key = kind, device
    if key not in _TABLES:
        _TABLES[key] = torch.tensor(_MAKE[kind](), device=device)
    return _TABLES[key]


@dataclass
class _FullPrecision:
    """What the operation needs besides tensors.

    Attributes:
        rule: The full-precision rule.
        kernel: What executes it in place over lists of tensors.
        slots: Name -> whether it is a mean of squares, and whether it is rounded at random.
    """

    rule: Any
    kernel: Callable[..., None]
    slots: dict[str, tuple[bool, bool]] = field(default_factory=dict)


def _update(
    full_precision: _FullPrecision,
    codec: Codec,
    tensors: tuple[torch.Tensor, torch.Tensor, tuple[StoredSlot, ...]],
    buffers: list[SlotBuffer],
    scalars: tuple[torch.Tensor, torch.Tensor, float],
) -> None:
    """One tile of one tensor."""
    parameter, gradient, stored = tensors
    size, wide = parameter.numel(), {}
    for (name, (square, _)), codes, buffer in zip(
        full_precision.slots.items(), stored, buffers, strict=True
    ):
        codec.restore(codes, square, buffer)
        wide[name] = [buffer.values if size == buffer.values.numel() else buffer.values[:size]]
    full_precision.kernel(full_precision.rule, [parameter], [gradient], wide, *scalars)
    for (square, dithered), codes, buffer in zip(
        full_precision.slots.values(), stored, buffers, strict=True
    ):
        codec.quantize(buffer, square, scalars[0] if dithered else None, codes)


# ---- one operation for PyTorch -------------------------------------------------------------------

_FULL_PRECISION: NumberedObjects[_FullPrecision] = NumberedObjects()


def _run(
    parameters: list[torch.Tensor],
    gradients: list[torch.Tensor],
    slots: list[torch.Tensor],
    step: torch.Tensor,
    learning_rate: torch.Tensor,
    weight_decay: float,
    full_precision: int,
) -> None:
    what = _FULL_PRECISION[full_precision]
    largest = max(math.ceil(p.numel() / BLOCK) * BLOCK for p in parameters)
    width = tile_width(_TILE, largest, step.device)
    integers = torch.empty(2, width, dtype=torch.int32, device=step.device)
    floats = torch.empty(len(what.slots), width, dtype=torch.float32, device=step.device)
    tools: dict[int, tuple[Codec, list[SlotBuffer]]] = {}
    count = len(parameters)
    for i, (parameter, gradient) in enumerate(zip(parameters, gradients, strict=True)):
        flat = parameter.view(-1).split(width), gradient.view(-1).split(width)
        stored = [
            StoredSlot(c.view(-1), c.view(-1).view(torch.uint16), s, s.unsqueeze(1)).tiles(width)
            for c, s in zip(slots[i :: 2 * count], slots[i + count :: 2 * count], strict=True)
        ]
        for tile in zip(*flat, zip(*stored, strict=True), strict=True):
            size = tile[2][0].codes.numel()
            if size not in tools:
                codec = Codec(*(memory[:size] for memory in integers))
                tools[size] = codec, [SlotBuffer(memory[:size]) for memory in floats]
            _update(what, tools[size][0], tile, tools[size][1], (step, learning_rate, weight_decay))


define_in_place(
    "run_eight_bit(Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[] slots, Tensor step, "
    "Tensor learning_rate, float weight_decay, int full_precision) -> ()",
    _run,
)


def run_eight_bit(
    kernel: Callable[..., None],
    rule: Any,
    parameters: list[torch.Tensor],
    gradients: list[torch.Tensor],
    slots: dict[str, list[torch.Tensor]],
    step: torch.Tensor,
    learning_rate: torch.Tensor,
    weight_decay: float,
) -> None:
    """Execute a rule with 8-bit state over lists of tensors, in place.

    Args:
        kernel: Executes the full-precision rule, in place.
        rule: An `optim.core.eight_bit.EightBit`, all of whose slots are codes and scales.
        parameters: float32, contiguous.
        gradients: float32, contiguous.
        slots: Slot name -> one tensor per parameter.
        step: float32 scalar.
        learning_rate: float32 scalar.
        weight_decay: A Python number.
    """
    names = [name.removesuffix("_codes") for name in slots if name.endswith("_codes")]

    def make() -> _FullPrecision:
        kinds = {name: (name in rule.squares, name in rule.dithered) for name in names}
        return _FullPrecision(rule.full, kernel, kinds)

    number = _FULL_PRECISION.number(rule, kernel, make)
    stored = [slot for n in names for part in ("codes", "scales") for slot in slots[f"{n}_{part}"]]
    torch.ops.optim.run_eight_bit(
        parameters, gradients, stored, step, learning_rate, weight_decay, number
    )
