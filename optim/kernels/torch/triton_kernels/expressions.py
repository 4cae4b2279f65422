"""ATen operations of a recorded rule as expressions of Triton's language.

Division and square roots round to the nearest number, as in PyTorch's own kernels; this costs no
time, because the kernels wait for memory anyway. Functions that Triton only approximates in float32
(exponentials, logarithms) are computed in float64. Maximum and minimum pass a NaN on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.fx import Node

from optim.kernels.torch.codegen import SAME, name_of
from optim.kernels.torch.recording import RecordedRule
from optim.kernels.torch.triton_kernels.text import literal


class Untranslatable(Exception):
    """A rule has an operation that is not written for Triton here."""


def _wide(function: str) -> Callable[[str], str]:
    """A function of x that is computed in float64."""
    return lambda x: f"{function.format(f'({x}).to(tl.float64)')}.to(tl.float32)"


def _larger(x: str, y: str) -> str:
    return f"tl.maximum({x}, {y}, propagate_nan=tl.PropagateNan.ALL)"


def _smaller(x: str, y: str) -> str:
    return f"tl.minimum({x}, {y}, propagate_nan=tl.PropagateNan.ALL)"


def _clamp(x: str, low: str = "None", high: str = "None") -> str:
    x = x if low == "None" else _larger(x, low)
    return x if high == "None" else _smaller(x, high)


_FUNCTIONS: dict[str, Callable[..., str]] = {
    "add": lambda x, y, alpha="1.0": f"{x} + {y}" if alpha == "1.0" else f"{x} + {y} * {alpha}",
    "sub": lambda x, y, alpha="1.0": f"{x} - {y}" if alpha == "1.0" else f"{x} - {y} * {alpha}",
    "rsub": lambda x, y, alpha="1.0": f"{y} - {x}" if alpha == "1.0" else f"{y} - {x} * {alpha}",
    "mul": lambda x, y: f"{x} * {y}",
    "div": lambda x, y: f"tl.div_rn({x}, {y})",
    "neg": lambda x: f"-{x}",
    "abs": lambda x: f"tl.abs({x})",
    "sign": lambda x: f"tl.where({x} > 0.0, 1.0, tl.where({x} < 0.0, -1.0, 0.0))",
    "square": lambda x: f"{x} * {x}",
    "sqrt": lambda x: f"tl.sqrt_rn({x})",
    "rsqrt": lambda x: f"tl.div_rn(1.0, tl.sqrt_rn({x}))",
    "reciprocal": lambda x: f"tl.div_rn(1.0, {x})",
    "exp": _wide("tl.exp({0})"),
    "expm1": _wide("(tl.exp({0}) - 1.0)"),
    "log": _wide("tl.log({0})"),
    "log1p": _wide("tl.log(1.0 + {0})"),
    "maximum": _larger,
    "minimum": _smaller,
    "clamp": _clamp,
    "clamp_min": _larger,
    "clamp_max": _smaller,
    "where": lambda c, x, y: f"tl.where({c}, {x}, {y})",
    "gt": lambda x, y: f"{x} > {y}",
    "ge": lambda x, y: f"{x} >= {y}",
    "lt": lambda x, y: f"{x} < {y}",
    "le": lambda x, y: f"{x} <= {y}",
    "eq": lambda x, y: f"{x} == {y}",
    "ne": lambda x, y: f"{x} != {y}",
    "logical_and": lambda x, y: f"{x} & {y}",
    "logical_or": lambda x, y: f"{x} | {y}",
    "logical_not": lambda x: f"{x} == 0",
    "isnan": lambda x: f"{x} != {x}",
    "isfinite": lambda x: f"tl.abs({x}) <= 3.4028234663852886e38",
    "lerp": lambda x, y, share: f"{x} + {share} * ({y} - {x})",
    "addcmul": lambda x, y, z, value="1.0": f"{x} + {value} * {y} * {z}",
    "addcdiv": lambda x, y, z, value="1.0": f"{x} + {value} * tl.div_rn({y}, {z})",
    "zeros_like": lambda x: "tl.full((), 0.0, tl.float32)",
    "ones_like": lambda x: "tl.full((), 1.0, tl.float32)",
    "full_like": lambda x, value: f"tl.full((), {value}, tl.float32)",
}


_ARGUMENTS = {"alpha": "alpha", "value": "value"}
"""Arguments with a name, and their names here."""

_OF_RESULTS = ("dtype", "layout", "device", "pin_memory", "memory_format")
"""Arguments that say what the result is like, which its record says too."""


class Constants:
    """The numbers in a rule's source: ``c0``, ``c1`` and so on until it is known which are equal.

    Tensors with other numbers (another decay, another multiple of the learning rate) can then be
    updated by the same kernel. Which number an operation has is found again by its node.

    Args:
        first: The numbers that are not in the graph.
    """

    def __init__(self, first: Iterable[float] = ()) -> None:
        self.values = list(first)
        self._names: dict[Any, str] = {}

    def name(self, place: Any, value: float) -> str:
        """The name of a number.

        Args:
            place: Where it is: the node and the position among its arguments.
            value: The number.
        """
        if place not in self._names:
            self.values.append(float(value))
            self._names[place] = f"c{len(self.values) - 1}"
        return self._names[place]


class Lines:
    """Lines of a kernel that compute nodes of a rule.

    Args:
        recorded: The rule.
        constants: Its numbers.
        names: Node -> the name of its value, of those that are there already.
    """

    def __init__(
        self, recorded: RecordedRule, constants: Constants, names: dict[Node, str]
    ) -> None:
        self._recorded, self._constants = recorded, constants
        self.names = dict(names)
        self.lines: list[str] = []

    def compute(self, wanted: Iterable[Node]) -> None:
        """Write what some nodes need, each once."""
        missing = needed_by(wanted, stop=self.names)
        for node in self._recorded.computed:
            if node in missing:
                self._write(node)

    def value(self, node: Any) -> str:
        """The name of a node's value, once it is computed."""
        if node in self._recorded.constants:
            if node not in self._recorded.numbers:
                raise Untranslatable("it has a constant of more than one element")
            return self._constants.name(node, self._recorded.numbers[node])
        return str(self.names[node])

    def _write(self, node: Node) -> None:
        name = name_of(node)
        if node.meta["val"].dtype not in (torch.float32, torch.bool):
            raise Untranslatable(f"{node.target} computes in {node.meta['val'].dtype}")
        if name in SAME:
            self.names[node] = self.value(node.args[0])
            return
        self.names[node] = f"{'t' if self._recorded.is_wide[node] else 's'}_{node.name}"
        self.lines.append(f"{self.names[node]} = {self._expression(name, node)}")

    def _expression(self, name: str, node: Node) -> str:
        if name == "_to_copy":
            kind = "tl.int1" if node.meta["val"].dtype is torch.bool else "tl.float32"
            return f"({self._argument(node, 0, node.args[0])}).to({kind})"
        args = [self._argument(node, i, value) for i, value in enumerate(node.args)]
        if name == "pow":
            return self._power(node, args)
        if name not in _FUNCTIONS:
            raise Untranslatable(f"{node.target} is not among the operations")
        kwargs = {}
        for key, value in node.kwargs.items():
            if key in _ARGUMENTS:
                if value != 1:
                    kwargs[_ARGUMENTS[key]] = self._argument(node, key, value)
            elif key not in _OF_RESULTS and value is not None:
                raise Untranslatable(f"{node.target} has the argument {key}={value!r}")
        return str(_FUNCTIONS[name](*args, **kwargs))

    def _argument(self, node: Node, place: Any, value: Any) -> str:
        if isinstance(value, Node):
            return self.value(value)
        if value is None:
            return "None"
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise Untranslatable(f"{node.target} has the argument {value!r}")
        if not math.isfinite(value):
            return literal(value)
        return self._constants.name((node, place), value)

    def _power(self, node: Node, args: list[str]) -> str:
        exponent = node.args[1]
        if isinstance(exponent, Node) or not isinstance(node.args[0], Node):
            raise Untranslatable("its exponent or its base is not a number")
        x = args[0]
        if exponent == 2:
            return f"{x} * {x}"
        if exponent == 0.5:
            return f"tl.sqrt_rn({x})"
        if not exponent:
            return "tl.full((), 1.0, tl.float32)"
        power = f"tl.exp(tl.log(tl.abs({x}).to(tl.float64)) * {args[1]}).to(tl.float32)"
        if float(exponent).is_integer():
            return f"tl.where({x} < 0.0, {'-' if exponent % 2 else ''}{power}, {power})"
        return f"tl.where({x} < 0.0, float('nan'), {power})"


def needed_by(wanted: Iterable[Node], stop: Iterable[Node]) -> set[Node]:
    """Some nodes and all that they depend on, not further than the nodes of ``stop``."""
    ends, found, rest = set(stop), set(), list(wanted)
    while rest:
        node = rest.pop()
        if node not in found and node not in ends:
            found.add(node)
            rest += node.all_input_nodes
    return found
