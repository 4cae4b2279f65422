"""8-bit slots in the kernels of a rule: read as numbers, stored as codes and scales.

The full-precision rule is what is recorded; where it reads a slot, a kernel looks its codes up, and
where it stores one, the kernel finds the scale of every 256 numbers and their codes. Tables of
codes are one tensor for a device. A group of tensors can have members whose state is float32 (small
tensors, embeddings), so that these need no kernels of their own: the number ``c1`` says which.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
from optim.kernels.torch.triton_kernels.text import function

CODED = "c1"
"""The number that is not 0 for tensors whose slots are codes."""

BYTES = 1 + 4 / BLOCK
"""Of an element of a slot."""


@dataclass(frozen=True)
class Coding:
    """Which slots of a rule are codes.

    Attributes:
        squares: Means of squares, of which the codes are of the root.
        dithered: Those that are rounded up or down at random.
    """

    squares: frozenset[str] = frozenset()
    dithered: frozenset[str] = frozenset()


def coding_of(rule: Any) -> Coding | None:
    """How the state of an optimizer is coded; None for one with float32 state.

    Args:
        rule: The optimizer.
    """
    if getattr(type(rule).update, "fused", None) != "eight_bit":
        return None
    return Coding(rule.squares, rule.dithered)


def names_of(slots: Sequence[str]) -> tuple[str, ...]:
    """The names of codes and scales of some slots, in the order of the table."""
    return tuple(f"{name}_{part}" for name in slots for part in ("codes", "scales"))


# ---- tables of codes -----------------------------------------------------------------------------


def _tables() -> dict[str, np.ndarray]:
    signed, unsigned = code_values(True), np.square(code_values(False))
    return {
        "values": signed.view("int32"),
        "squares": unsigned.view("int32"),
        "nearest": nearest(True),
        "nearest to root": nearest_to_root(),
        "not larger": not_larger(True),
    }


_LOOKUPS: dict[torch.device, torch.Tensor] = {}


def lookup_on(device: torch.device) -> torch.Tensor:
    """All tables on a device, as one int32 tensor that is never freed."""
    if device not in _LOOKUPS:
        _LOOKUPS[device] = torch.tensor(np.concatenate([*_tables().values()]), device=device)
    return _LOOKUPS[device]


def _offsets() -> dict[str, int]:
    found, at = {}, 0
    for name, table in _tables().items():
        found[name] = at
        at += len(table)
    return found


# ---- text ----------------------------------------------------------------------------------------


def functions() -> list[str]:
    """The functions ``restored`` and ``store_coded`` that the lines below call."""
    at = _offsets()
    whole = f"(size + {BLOCK - 1}) // {BLOCK} * {BLOCK}"
    restored = function(
        "restored",
        "codes_at, scales_at, lookup, size, SQUARE: tl.constexpr, MASKED: tl.constexpr, "
        "BLOCK: tl.constexpr",
        [
            "lanes = tl.arange(0, BLOCK)",
            "if MASKED:",
            f"    coded = lanes < {whole}",
            "    codes = tl.load(codes_at + lanes, mask=coded, other=0).to(tl.int32)",
            f"    scales = tl.load(scales_at + lanes // {BLOCK}, mask=coded, other=0.0)",
            "else:",
            "    codes = tl.load(codes_at + lanes).to(tl.int32)",
            f"    scales = tl.load(scales_at + lanes // {BLOCK})",
            "if SQUARE:",
            f"    bits = tl.load(lookup + {at['squares']} + codes)",
            "    scales = scales * scales",
            "else:",
            f"    bits = tl.load(lookup + {at['values']} + codes)",
            "return bits.to(tl.float32, bitcast=True) * scales",
        ],
    )
    hashed = [
        line
        for factor in HASH_FACTORS
        for line in (
            "    noise = noise ^ ((noise >> 15) & 131071)",
            f"    noise = noise * tl.full((), {factor}, tl.int32)",
        )
    ]
    store = function(
        "store_coded",
        "codes_at, scales_at, lookup, value, step, size, SQUARE: tl.constexpr, "
        "DITHERED: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr",
        [
            "lanes = tl.arange(0, BLOCK)",
            "if MASKED:",
            "    value = tl.where(lanes < size, value, 0.0)",
            f"rows = tl.reshape(value, (BLOCK // {BLOCK}, {BLOCK}))",
            "largest = tl.max(tl.abs(rows), axis=1)",
            # A maximum of a block passes over what is not a number.
            "odd = tl.max((rows != rows).to(tl.int32), axis=1)",
            'largest = tl.where(odd != 0, float("nan"), largest)',
            f"divisor = tl.where(largest < {SMALLEST_SCALE}, {SMALLEST_SCALE}, largest)",
            "scales = largest",
            "if SQUARE:",
            "    scales = tl.sqrt_rn(divisor)",
            "shared = tl.broadcast_to(tl.expand_dims(divisor, 1), rows.shape)",
            "relative = tl.reshape(tl.div_rn(rows, shared), (BLOCK,))",
            "bits = relative.to(tl.int32, bitcast=True)",
            "upper = (bits >> 16) & 65535",
            "if SQUARE:",
            f"    entry = tl.load(lookup + {at['nearest to root']} + upper)",
            "elif DITHERED:",
            f"    entry = tl.load(lookup + {at['not larger']} + upper)",
            "else:",
            f"    entry = tl.load(lookup + {at['nearest']} + upper)",
            "found = tl.abs((entry + bits) >> 16)",
            "if DITHERED:",
            f"    low = tl.load(lookup + {at['values']} + found).to(tl.float32, bitcast=True)",
            f"    high = tl.load(lookup + {at['values'] + 1} + found)",
            "    gap = high.to(tl.float32, bitcast=True) - low",
            f"    noise = bits ^ (step.to(tl.int32) * tl.full((), {HASH_FACTORS[0]}, tl.int32))",
            *hashed,
            "    noise = (noise >> 9) & 8388607",
            f"    share = noise.to(tl.float32) * {2.0**-23!r} * gap",
            "    found = found + (relative - low > share).to(tl.int32)",
            f"every = tl.arange(0, BLOCK // {BLOCK})",
            "if MASKED:",
            f"    tl.store(codes_at + lanes, found.to(tl.uint8), mask=lanes < {whole})",
            f"    tl.store(scales_at + every, scales, mask=every * {BLOCK} < size)",
            "else:",
            "    tl.store(codes_at + lanes, found.to(tl.uint8))",
            "    tl.store(scales_at + every, scales)",
        ],
    )
    return [restored, store]


def pointers(i: int, row: int, lookup_row: int) -> list[str]:
    """Lines that find codes and scales of a slot, or its numbers."""
    codes, scales, at = f"codes{i}", f"scales{i}", f"at{i}"
    load = "tl.load(table + {} * n + t).to(tl.pointer_type({}))"
    lines = [
        f"{codes} = {load.format(row, 'tl.uint8')}",
        f"{scales} = {load.format(row + 1, 'tl.float32')}",
        f"{at} = {load.format(row, 'tl.float32')}",
        f"lookup = {load.format(lookup_row, 'tl.int32')}",
    ]
    aligned = [f"    {name} = tl.multiple_of({name}, 16)" for name in (codes, scales, at)]
    begin = [f"{codes} = {codes} + begin", f"{at} = {at} + begin"]
    return [*lines, "if ALIGNED:", *aligned, *begin, f"{scales} = {scales} + begin // {BLOCK}"]


def read(i: int, square: bool, masked: bool) -> list[str]:
    """Lines that read a slot into ``x{i}``, after `pointers`."""
    mask = ", mask=inside, other=0.0" if masked else ""
    return [
        f"if {CODED} != 0.0:",
        f"    x{i} = restored(codes{i}, scales{i}, lookup, size, {square}, {masked}, BLOCK)",
        "else:",
        f"    x{i} = tl.load(at{i} + lanes{mask})",
    ]


def stored(i: int, value: str, square: bool, step: str, masked: bool) -> list[str]:
    """Lines that store a slot, rounded at random if ``step`` is the name of its step."""
    kind = f"{square}, {bool(step)}, {masked}, BLOCK"
    mask = ", mask=inside" if masked else ""
    return [
        f"if {CODED} != 0.0:",
        f"    store_coded(codes{i}, scales{i}, lookup, {value}, {step or '0.0'}, size, {kind})",
        "else:",
        f"    tl.store(at{i} + lanes, {value}{mask})",
    ]
