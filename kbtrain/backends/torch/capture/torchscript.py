"""A recorded graph of operations without effects as a function of the TorchScript interpreter.

The interpreter runs the operations one after the other in C++, without Python, and frees each
tensor after its last use. The function is written down operation by operation; `torch.jit.trace`
would run the graph once for that, holding on to every intermediate tensor until the end, and the
interpreter's own passes would take it apart again (a product with a bias into two operations).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.fx import Node


class NotScriptable(Exception):
    """The graph has something that TorchScript has no word for; the message says what."""


class Part(NamedTuple):
    """A part of a recorded graph, as a function.

    Attributes:
        inputs: What it is given.
        constants: Nodes that stand for tensors, with these.
        nodes: The operations, in order.
        results: What it returns, as a tuple.
    """

    inputs: list[Node]
    constants: dict[Node, torch.Tensor]
    nodes: list[Node]
    results: list[Node]


def to_script(part: Part) -> Callable[..., Any]:
    """Compile a function.

    Args:
        part: Its operations, those of ATen or registered ones.

    Returns:
        A function of the inputs that returns a tuple of tensors.

    Raises:
        NotScriptable: There is an operation or an argument that cannot be expressed.
    """
    writer = _Writer()
    constants = list(part.constants.values())
    for node in [*part.inputs, *part.constants]:
        writer.values[node] = writer.graph.addInput(node.name)
    try:
        for node in part.nodes:
            writer.operation(node)
        writer.finish(part.results)
    except (RuntimeError, TypeError) as error:  # torch's own: a constant of an unknown kind, say
        raise NotScriptable(str(error).strip().splitlines()[-1]) from error
    function = torch._C._create_function_from_graph("step", writer.graph)

    def run(*given: torch.Tensor) -> Any:
        before = torch._C._get_graph_executor_optimize()
        torch._C._set_graph_executor_optimize(False)  # run what is written, as it is written
        try:
            return function(*given, *constants)
        finally:
            torch._C._set_graph_executor_optimize(before)

    return run


class _Writer:
    """Writes TorchScript's own graph.

    Attributes:
        graph: What has been written.
        values: What each node of the recorded graph became; a tuple where it has several results.
    """

    def __init__(self) -> None:
        self.graph = torch._C.Graph()
        self.values: dict[Node, Any] = {}

    def operation(self, node: Node) -> None:
        """Write one operation, or pick one of the results of another."""
        if node.target is operator.getitem:
            source, index = node.args
            self.values[node] = self.values[source][index]
            return
        if not isinstance(node.target, torch._ops.OpOverload):
            raise NotScriptable(f"{node.target} is no operation of torch's library")
        schema = node.target._schema
        given = list(_arguments(node))
        inputs = [self._value(*pair) for pair in given]
        written = self.graph.create(schema.name, inputs, len(schema.returns))
        self.graph.insertNode(written)
        self._check(node, written.schema(), given)
        results = list(written.outputs())
        for result, declared in zip(results, schema.returns, strict=True):
            result.setType(declared.type)
        if len(results) != 1:
            self.values[node] = tuple(results)
        elif isinstance(schema.returns[0].type, torch._C.ListType):
            self.values[node] = self._unpack(results[0], len(node.meta["val"]))
        else:
            self.values[node] = results[0]

    def _check(self, node: Node, found: str, given: list[tuple[Any, Any]]) -> None:
        """Whether TorchScript finds the same operation by name and types of the arguments."""
        name, parenthesis, _ = str(node.target._schema).partition("(")
        wanted = name + parenthesis
        if any(
            isinstance(value, int | float) and kind.kind() == "TensorType" for value, kind in given
        ):
            wanted = name.partition(".")[0] + "."  # the form for a number, which means the same
        if not found.startswith(wanted):
            raise NotScriptable(f"{node.target} is taken for {found}")

    def finish(self, results: Sequence[Node]) -> None:
        """Write the end: a tuple of results."""
        values = [self.values[node] for node in results]
        kind = torch._C.TupleType([value.type() for value in values])
        self.graph.registerOutput(self._put("prim::TupleConstruct", values, kind))

    def _put(self, name: str, inputs: list[Any], kind: Any) -> Any:
        node = self.graph.create(name, inputs, 1)
        self.graph.insertNode(node)
        node.output().setType(kind)
        return node.output()

    def _unpack(self, value: Any, length: int) -> tuple[Any, ...]:
        node = self.graph.create("prim::ListUnpack", [value], length)
        self.graph.insertNode(node)
        return tuple(node.outputs())

    def _value(self, value: Any, declared: Any) -> Any:
        """An argument: a node, a list with nodes in it, or a constant."""
        if isinstance(value, Node):
            return self.values[value]
        if isinstance(value, list | tuple):
            if not value or any(isinstance(item, Node) for item in value):
                inner = declared.getElementType()
                items = [self._value(item, inner) for item in value]
                return self._put("prim::ListConstruct", items, torch._C.ListType(inner))
            return self.graph.insertConstant(list(value))
        return self.graph.insertConstant(_FORMATS.get(value, value))


_FORMATS = {
    torch.contiguous_format: 0,
    torch.preserve_format: 1,
    torch.channels_last: 2,
    torch.channels_last_3d: 3,
}
"""Memory formats by their numbers in TorchScript."""


def _arguments(node: Node) -> Iterator[tuple[Any, Any]]:
    """All arguments of an operation with their declared types, defaults included."""
    for i, argument in enumerate(node.target._schema.arguments):
        if i < len(node.args) and not argument.kwarg_only:
            yield node.args[i], argument.type
        else:
            yield node.kwargs.get(argument.name, argument.default_value), argument.type
