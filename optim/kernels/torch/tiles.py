"""A straight line of PyTorch calls on one tile of every tensor, without allocations.

Results go to the variables where nothing needs the old value any more, else to a few buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from optim.kernels.torch.codegen import Call, CallFusion, adam_

_WITH_OUT = {
    name: getattr(torch, name)
    for name in (
        *("add", "sub", "mul", "div", "sqrt", "rsqrt", "reciprocal", "neg", "abs", "sign"),
        *("maximum", "minimum", "where", "exp", "expm1", "log", "square", "pow", "clamp"),
        *("lerp", "addcmul", "addcdiv"),
    )
}
_NUMBERS_ALLOWED = ("add", "sub", "mul", "div", "lerp", "pow")


@dataclass
class TileFunction:
    """A function of tiles, scalars and buffers, and what it is to be given.

    Attributes:
        function: Called with the tiles, the scalars and the buffers; returns the sums.
        numbers: Scalars that it takes as Python numbers.
        tensors: Scalars that it takes as tensors.
        buffers: Number of buffers.
        sums: The nodes whose parts it returns.
    """

    function: Callable[..., Sequence[torch.Tensor]] = lambda *tiles: ()
    numbers: list[Node] = field(default_factory=list)
    tensors: list[Node] = field(default_factory=list)
    buffers: int = 0
    sums: list[Node] = field(default_factory=list)


class TileWriter:
    """Writes the source of a `TileFunction`.

    Args:
        joining: Makes the calls.
        on_cpu: Whether scalars are known to Python.
    """

    def __init__(self, fusion: CallFusion, on_cpu: bool) -> None:
        self._fusion = fusion
        self._on_cpu = on_cpu

    def tile(
        self, nodes: list[Node], inputs: dict[Any, str], places: list[tuple[Node, Any]]
    ) -> TileFunction:
        """The function that computes some nodes.

        Args:
            nodes: Wide nodes and sums, in order.
            inputs: Name of the argument that holds a node's value, in the order of the arguments.
            places: Pairs of a node and the input whose place its value takes.

        Returns:
            The function and what it needs.
        """
        self._tile = TileFunction()
        self._scope: dict[str, Any] = {}
        self._lines: list[str] = []
        self._inputs, self._names = inputs, dict(inputs)
        calls = self._fusion.calls(nodes, places)
        self._origin = {node: node for node in (*inputs, *nodes)}
        order = []
        for node, call in calls.items():
            if call.name == "same":
                self._origin[node] = self._origin[call.args[0]]
            else:
                order.append(node)
        self._targets = {self._origin[output]: place for output, place in places}
        self._last = self._last_uses(order, calls, places)
        self._free: list[str] = []
        for index, node in enumerate(order):
            self._write(index, node, calls[node])
        late = self._late(places)
        arguments = list(dict.fromkeys(inputs.values()))
        arguments += [f"n{i}" for i in range(len(self._tile.numbers))]
        arguments += [f"s{i}" for i in range(len(self._tile.tensors))]
        arguments += [f"b{i}" for i in range(self._tile.buffers)]
        result = "".join(f"{self._names[n]}, " for n in self._tile.sums)
        body = "\n    ".join([*self._lines, *late, f"return ({result})"])
        exec(f"def tile({', '.join(arguments)}):\n    {body}", self._scope)
        self._tile.function = self._scope["tile"]
        return self._tile

    def _last_uses(
        self, order: list[Node], calls: dict[Node, Call], places: list[tuple[Node, Any]]
    ) -> dict[Node, int]:
        last: dict[Node, int] = {}
        # What the fused step adds to may be in the place of its result already.
        self._chained: dict[Node, Node] = {}
        used = [self._origin[a] for call in calls.values() for a in call.args if a in self._origin]
        for index, node in enumerate(order):
            for argument in calls[node].args:
                if self._fusion.wide(argument):
                    last[self._origin[argument]] = index
            if calls[node].name == "adam" and len(calls[node].args) == 4:
                base = self._origin[calls[node].args[3]]
                if used.count(base) == 1:
                    self._chained[base] = node
        for output, place in places:  # an old value that moves to another variable at the end
            if self._origin[output] is not place and self._origin[output] in self._inputs:
                last[self._origin[output]] = len(order)
        return last

    def _write(self, index: int, node: Node, call: Call) -> None:
        if call.name in ("sum", "dot"):
            names = [self._names[self._origin[a]] for a in call.args]
            self._names[node] = f"r{len(self._tile.sums)}"
            self._tile.sums.append(node)
            self._scope[call.name] = getattr(torch, call.name)
            self._lines.append(f"{self._names[node]} = {call.name}({', '.join(names)})")
            self._release(index, call)
            return
        arguments = self._arguments(call)
        if call.name == "adam":
            out = self._out(index, node)
            self._lines += self._adam(index, call, out, arguments)
            self._release(index, call)
        else:
            self._release(index, call)
            out = self._out(index, node)
            self._lines.append(self._line(call, index, out, arguments))
        self._names[node] = out

    def _out(self, index: int, node: Node) -> str:
        """Where a value goes: the variable's place if its old value has been used, or a buffer."""
        place = self._targets.get(node)
        for candidate in (place, self._targets.get(self._chained.get(node))):
            if candidate is not None and self._last.get(candidate, -1) <= index:
                result: str = self._names[candidate]
                return result
        if place is not None:
            # Kept until the end: the variable's old value is still needed.
            self._last[node] = 1 << 30
        return self._buffer()

    def _buffer(self) -> str:
        if self._free:
            return self._free.pop()
        self._tile.buffers += 1
        return f"b{self._tile.buffers - 1}"

    def _release(self, index: int, call: Call) -> None:
        for argument in {self._origin[a] for a in call.args if self._fusion.wide(a)}:
            if self._last[argument] == index and self._names[argument].startswith("b"):
                self._free.append(self._names[argument])

    def _adam(self, index: int, call: Call, out: str, arguments: list[str]) -> list[str]:
        """The fused step: adds to ``out``, in place, and changes the means in place."""
        mean, x, velocity, *rest = arguments
        base, numbers = (rest[0], rest[1:]) if len(call.args) == 4 else (None, rest)
        lines = []
        if base is None:
            lines.append(f"{out}.zero_()")
        elif base != out:
            lines.append(f"{out}.copy_({base})")
        if "share_1" not in call.numbers:
            node = self._origin[call.args[0]]
            if not mean.startswith("b") or self._last[node] != index or mean == x:
                # The kernel writes to it, if only the value that is there.
                own = self._buffer()
                self._free.append(own)
                lines.append(f"{own}.copy_({mean})")
                mean = own
        self._scope["adam_"] = adam_
        return [*lines, f"adam_({', '.join([out, mean, x, velocity, *numbers])})"]

    def _late(self, places: list[tuple[Node, Any]]) -> list[str]:
        """Copies into variables whose old value was needed to the end."""
        overwritten = {place for _, place in places}
        late = []
        for output, place in places:
            origin = self._origin[output]
            value = self._names.get(origin)
            if value is None or value == self._names[place]:  # None: changed by the fused step
                continue
            if origin in overwritten:  # two variables may even change places
                value = f"b{self._tile.buffers}"
                self._tile.buffers += 1
                self._lines.append(f"{value}.copy_({self._names[origin]})")
            late.append(f"{self._names[place]}.copy_({value})")
        return late

    def _arguments(self, call: Call) -> list[str]:
        parts = []
        for position, value in enumerate(call.args):
            if self._fusion.wide(value):
                parts.append(self._names[self._origin[value]])
            elif position and call.name in _NUMBERS_ALLOWED:
                parts.append(self._as_number(value))
            else:
                parts.append(self._as_tensor(value))
        for key, value in call.numbers.items():
            sign, factor = value if isinstance(value, tuple) else (1, value)
            parts.append(f"{key}={'-' if sign < 0 else ''}{self._as_number(factor)}")
        return parts

    def _as_number(self, value: Any) -> str:
        if not isinstance(value, Node):
            return repr(value)
        if not self._on_cpu:
            return self._as_tensor(value)
        return f"n{_position(self._tile.numbers, value)}"

    def _as_tensor(self, value: Any) -> str:
        if not isinstance(value, Node):
            return repr(value)
        return f"s{_position(self._tile.tensors, value)}"

    def _line(self, call: Call, index: int, out: str, arguments: list[str]) -> str:
        if call.name in _WITH_OUT:
            self._scope[call.name] = _WITH_OUT[call.name]
            return f"{call.name}({', '.join(arguments)}, out={out})"
        self._scope[f"f{index}"] = call.function
        return f"{out}.copy_(f{index}({', '.join(arguments)}))"


def _position(nodes: list[Node], node: Node) -> int:
    if node not in nodes:
        nodes.append(node)
    return nodes.index(node)
