"""Generates one Python function that calls the operations of a recorded step in order.

There is one line per operation; multiple results are unpacked in the same line, and each tensor is
deleted after its last use. The cost in Python is the dispatch of an operation:
``torch.ops.aten.mm.default`` parses its arguments on each call, which takes two microseconds, where
``torch.mm`` takes one and a half. So a line calls the public PyTorch function that dispatches to
the operation, if there is one.
"""

from __future__ import annotations

import functools
import math
import operator
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.fx import Node
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


class FunctionSource:
    """The source code of a function of tensors, and the objects that it refers to.

    Args:
        arguments: The arguments of the function.
        constants: Nodes that represent constant tensors, with these tensors.
        last: The last user of each node; results without an entry are never deleted.
    """

    def __init__(
        self,
        arguments: Sequence[Node],
        constants: dict[Node, torch.Tensor],
        last: dict[Node, Node],
    ) -> None:
        self._lines: list[str] = []
        self._objects: dict[str, Any] = {}
        self._names: dict[Node, str] = {}
        self._dying: dict[Node, list[Node]] = {}
        for node, user in last.items():
            self._dying.setdefault(user, []).append(node)
        self._arguments = [self._name(node) for node in arguments]
        for node, tensor in constants.items():
            self._names[node] = self._object(tensor)

    def operation(self, node: Node) -> None:
        """Emit one operation."""
        if node.target is not operator.getitem or node not in self._names:
            self._call(node)
        dead = [self._names[n] for n in self._dying.get(node, ()) if n in self._names]
        if dead:
            self._lines.append(f"del {', '.join(dead)}")

    def call(self, function: Callable[..., Any], nodes: Sequence[Node]) -> None:
        """Emit a call of any function."""
        self._lines.append(f"{self._object(function)}({self._list(nodes)})")

    def assign(self, results: Sequence[Node], function: Any, nodes: Sequence[Node]) -> None:
        """Emit a call of a function that returns a tuple."""
        targets = "".join(f"{self._name(node)}, " for node in results)
        call = f"{self._object(function)}({self._list(nodes)})"
        self._lines.append(f"{targets}= {call}" if targets else call)

    def compile(self, results: Sequence[Node]) -> Callable[..., list[Any]]:
        """Compile the function, which returns a list."""
        lines = [*self._lines, f"return [{self._list(results)}]"]
        head = f"def program({', '.join(self._arguments)}):"
        code = compile("\n    ".join([head, *lines]), "<captured step>", "exec")
        scope = dict(self._objects)
        exec(code, scope)
        result: Callable[..., list[Any]] = scope["program"]
        return result

    def _call(self, node: Node) -> None:
        function, args, kwargs = public_call(node)
        parts = [self._value(argument) for argument in args]
        parts += [f"{key}={self._value(value)}" for key, value in kwargs.items()]
        call = f"{self._object(function)}({', '.join(parts)})"
        items = {user.args[1]: user for user in node.users if user.target is operator.getitem}
        if items and len(items) == len(node.users):
            places = [items.get(i) for i in range(len(node.meta["val"]))]
            names = ["_" if item is None else self._name(item) for item in places]
            self._lines.append(f"{', '.join(names)}, = {call}")
            if None in places:
                self._lines.append("del _")
        else:
            self._lines.append(f"{self._name(node)} = {call}" if node.users else call)

    def _name(self, node: Node) -> str:
        return self._names.setdefault(node, f"v{len(self._names)}")

    def _object(self, value: Any) -> str:
        name = f"c{len(self._objects)}"
        self._objects[name] = value
        return name

    def _list(self, nodes: Sequence[Node]) -> str:
        return ", ".join(self._names[node] for node in nodes)

    def _value(self, value: Any) -> str:
        if isinstance(value, Node):
            return self._names[value]
        if isinstance(value, list | tuple):
            items = [self._value(item) for item in value]
            if items and all(type(item) is int for item in value):  # a literal in the code
                return f"({', '.join(items)},)"
            return f"[{', '.join(items)}]"
        if value is None or type(value) in (bool, int, str):
            return repr(value)
        if type(value) is float and math.isfinite(value):
            return repr(value)
        return self._object(value)


# --- dispatch of an operation ---------------------------------------------------------------------

_CONVERSIONS = {
    torch.float32: torch.Tensor.float,
    torch.float64: torch.Tensor.double,
    torch.float16: torch.Tensor.half,
    torch.bfloat16: torch.Tensor.bfloat16,
    torch.int64: torch.Tensor.long,
    torch.int32: torch.Tensor.int,
    torch.bool: torch.Tensor.bool,
}
_COMPOSITE = {  # decomposed before a dispatch mode can see them
    aten.reshape.default: torch.reshape,
    aten.contiguous.default: torch.Tensor.contiguous,
}

_Call = tuple[Callable[..., Any], Sequence[Any], dict[str, Any]]


def public_call(node: Node) -> _Call:
    """The function to call for a node, with its arguments.

    This is an equivalent public function if there is one, else the operation itself. Operations
    that create tensors are kept, because the public functions use the default device and dtype.
    """
    operation, args, kwargs = node.target, node.args, dict(node.kwargs)
    plain = operation, args, kwargs
    if not isinstance(operation, torch._ops.OpOverload) or operation.namespace != "aten":
        return plain
    values = [source.meta.get("val") for source in node.all_input_nodes]
    if not values or not all(isinstance(value, torch.Tensor) for value in values):
        return plain
    if operation in _COMPOSITE:
        return _COMPOSITE[operation], args, kwargs
    if operation is aten._to_copy.default and list(kwargs) == ["dtype"]:
        dtype = kwargs["dtype"]
        if dtype in _CONVERSIONS and values[0].dtype != dtype:
            return _CONVERSIONS[dtype], args, {}
    given = torch.fx.map_arg((args, kwargs), lambda n: n.meta["val"])
    for function in _candidates(operation._schema.name.partition("::")[2]):
        if _leads_to(function, operation, *given):
            return function, args, kwargs
    return plain


@functools.cache
def _candidates(name: str) -> list[Callable[..., Any]]:
    places = [(torch, name), (torch.Tensor, name), (torch.nn.functional, name)]
    if name.startswith("linalg_"):
        places.append((torch.linalg, name.removeprefix("linalg_")))
    found = [getattr(place, name, None) for place, name in places]
    in_c = (types.BuiltinFunctionType, types.MethodDescriptorType)
    return [function for function in found if isinstance(function, in_c)]


class _Dispatched(Exception):
    """The first operation that is dispatched, and its arguments."""


class _Stop(TorchDispatchMode):  # type: ignore[misc]
    """Stops at the first operation before it runs."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise _Dispatched(func, args, kwargs or {})


def _leads_to(function: Callable[..., Any], operation: Any, args: Any, kwargs: Any) -> bool:
    """Whether a function call dispatches to this operation with the same arguments."""
    try:
        with _Stop():
            function(*args, **kwargs)
    except _Dispatched as stopped:
        found, found_args, found_kwargs = stopped.args
        wanted = _arguments(operation, args, kwargs)
        return found is operation and all(
            map(_is_same, wanted, _arguments(operation, found_args, found_kwargs))
        )
    except Exception:  # any error means that it takes other arguments
        return False
    return False


def _arguments(operation: Any, args: Any, kwargs: Any) -> Iterator[Any]:
    for i, argument in enumerate(operation._schema.arguments):
        given = i < len(args) and not argument.kwarg_only
        yield args[i] if given else kwargs.get(argument.name, argument.default_value)


def _is_same(a: Any, b: Any) -> bool:
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_is_same, a, b))
    return a is b if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor) else bool(a == b)
