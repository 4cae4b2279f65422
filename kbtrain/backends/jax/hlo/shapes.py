"""Shapes as XLA prints them: ``f32[8,128]{1,0:T(8,128)S(1)}``, and tuples of these."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

_ARRAY = re.compile(r"\b([a-z]+)(\d*)([a-z0-9]*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_SPACE = re.compile(r"S\((\d+)\)")
_BRACKETS = {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}
_DEVICE, _HOST = "0", "5"


@dataclass(frozen=True)
class Array:
    """An array in a shape.

    Attributes:
        bytes: Its size.
        elements: The number of its elements.
        space: The memory that its layout names: "0" is that of the device.
    """

    bytes: int
    elements: int
    space: str

    @property
    def on_chip(self) -> bool:
        """Whether a TPU holds it in the memory of the chip, which costs no memory traffic."""
        return self.space not in (_DEVICE, _HOST)


def arrays(shape: str) -> Iterator[Array]:
    """The arrays of a shape; tokens and other things without elements are left out."""
    for name, width, _, dimensions, layout in _ARRAY.findall(shape):
        bits = 8 if name == "pred" else int(width or 0)  # f8e4m3fn: 8, c64: 64, s4: 4
        if bits:
            sizes = (int(each.lstrip("<=")) for each in dimensions.split(",") if each)
            elements = math.prod(sizes)
            space = _SPACE.search(layout)
            yield Array(-(-elements * bits // 8), elements, space[1] if space else _DEVICE)


def parts(shape: str) -> list[str]:
    """The elements of a tuple; one for another shape."""
    if not shape.startswith("("):
        return [shape]
    found, depth, begin = [], 0, 1
    for i, character in enumerate(shape):
        depth += _BRACKETS.get(character, 0)
        if (character == "," and depth == 1) or depth == 0:
            found.append(shape[begin:i].strip())
            begin = i + 1
    return found


def result_of(operation: str, shape: str) -> str:
    """The shape of what an operation makes.

    What an operation that only starts something returns are also its operands, and contexts:
    ``(result, operand, context)`` of a copy, and ``(operands, results, contexts)`` of others. An
    all-reduce has its results alone.
    """
    if not operation.endswith("-start") or operation == "all-reduce-start":
        return shape
    each = parts(shape)
    place = 0 if operation == "copy-start" else 1
    return each[place] if place < len(each) else shape
