"""Rewrites of a recorded graph that keep its meaning.

Operations without a use are left out, assignments moved to the end, a bias put inside its product.

A graph of ATen operations, as ``make_fx`` records it, is in the order of the Python program, with
assignments to variables in between. Where every assignment can wait until the end, everything
else has no effect, can be compiled as one, and can be thrown away if a check fails.
"""

from __future__ import annotations

import functools
import math
import operator
from collections import defaultdict
from typing import Any

import torch
from torch.fx import Graph, Node

aten = torch.ops.aten

ASSIGN = aten.copy_.default
MM = aten.mm.default
CONVOLUTION = aten.convolution.default
_VIEWS = (
    aten.view.default,
    aten.reshape.default,
    aten.permute.default,
)


def nodes_in(value: Any) -> list[Node]:
    """The nodes in an argument: itself, or those of a list."""
    if isinstance(value, Node):
        return [value]
    if isinstance(value, list | tuple):
        return [n for item in value for n in nodes_in(item)]
    return []


def aliases(node: Node, write: bool) -> list[Node]:
    """The nodes among the arguments that ``node`` writes to, or returns a view of."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return []
    found: list[Node] = []
    for position, name in _shared(node.target)[write]:
        if position < len(node.args):
            found += nodes_in(node.args[position])
        elif name in node.kwargs:
            found += nodes_in(node.kwargs[name])
    return found


@functools.cache
def _shared(operation: Any) -> tuple[list[tuple[int, str]], list[tuple[int, str]]]:
    """Position and name of the arguments that an operation returns a view of, or writes to."""
    views: list[tuple[int, str]] = []
    written: list[tuple[int, str]] = []
    for position, argument in enumerate(operation._schema.arguments):
        if argument.alias_info is not None:
            found = written if argument.alias_info.is_write else views
            found.append((position, argument.name))
    return views, written


class Memory:
    """Whose memory each node of a graph has, and when it is written.

    Args:
        graph: The graph, before any rewrite.
    """

    def __init__(self, graph: Graph) -> None:
        self.position = {node: i for i, node in enumerate(graph.nodes)}
        self._owners: dict[Node, frozenset[Node]] = {}
        self.writes: dict[Node, list[int]] = defaultdict(list)
        self.views: dict[Node, list[Node]] = defaultdict(list)
        for node in graph.nodes:
            for owner in self.owners(node):
                if owner is not node:
                    self.views[owner].append(node)
            for target in aliases(node, write=True):
                for owner in self.owners(target):
                    self.writes[owner].append(self.position[node])

    def owners(self, node: Node) -> frozenset[Node]:
        """The nodes that allocated the memory that ``node`` may use: itself, if it is no view."""
        if node not in self._owners:
            sources = aliases(node, write=False) + aliases(node, write=True)
            if node.target is operator.getitem:
                sources = nodes_in(node.args[0])
            owners = frozenset(o for s in sources for o in self.owners(s))
            self._owners[node] = owners or frozenset([node])
        return self._owners[node]

    def written_between(self, node: Node, first: int, last: float) -> bool:
        """Whether the memory of ``node`` is written after ``first`` and before ``last``."""
        return any(first < i < last for o in self.owners(node) for i in self.writes[o])

    def written_after(self, node: Node, position: int) -> bool:
        """Whether the memory of ``node`` is written after ``position``."""
        return self.written_between(node, position, float("inf"))


def simplify(module: torch.nn.Module) -> None:
    """Leave out what does nothing in a recorded graph, and compute once what is always the same.

    ``detach`` means nothing without gradients, nor does a product with 1. Small tensors that
    depend on shapes alone (zeros, ones, ranges, and what is computed from them) become constants.
    Of two operations with the same small result the second is left out.

    Args:
        module: A recorded step; changed in place.
    """
    graph = module.graph
    memory = Memory(graph)
    constants = {n: getattr(module, str(n.target)) for n in graph.nodes if n.op == "get_attr"}
    # A variable that the step does not know of is a constant to the record, but may be assigned.
    constants = {n: t for n, t in constants.items() if not isinstance(t, torch.nn.Parameter)}
    # Two results of a step are two tensors: what is done to one does not happen to the other.
    output = next(node for node in graph.nodes if node.op == "output")
    leaving = {owner for node in nodes_in(output.args[0]) for owner in memory.owners(node)}
    folded: list[tuple[torch.Tensor, Node]] = []
    first: dict[Any, Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or any(memory.writes[o] for o in memory.owners(node)):
            continue
        if (number := known_number(node.meta.get("val"))) is not None:
            _write_out(node, number)
            continue
        if node.target is aten.detach.default or _is_times_one(node):
            _replace(node, node.args[0])
        elif (value := _constant(node, constants)) is not None:
            equal = next((other for held, other in folded if _is_same(held, value)), None)
            if equal is None:
                name = f"folded_{node.name}"
                module.register_buffer(name, value, persistent=False)
                with graph.inserting_before(node):
                    equal = graph.get_attr(name)
                equal.meta["val"] = node.meta["val"]
                constants[equal] = value
                folded.append((value, equal))
            _replace(node, equal)
        elif (call := _call_of(node)) is not None and not memory.owners(node) & leaving:
            earlier = first.get(call)
            if earlier is None or _is_written_since(node, earlier, memory):
                first[call] = node
            else:
                _replace(node, earlier)


def _replace(node: Node, other: Node) -> None:
    node.replace_all_uses_with(other)
    node.graph.erase_node(node)


def _is_same(a: torch.Tensor, b: torch.Tensor) -> bool:
    like = (a.dtype, a.device, a.shape, a.stride()) == (b.dtype, b.device, b.shape, b.stride())
    # By their bytes: 0 and -0 are equal.
    return like and torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (a, b)))


def _call_of(node: Node) -> Any:
    """An operation and its arguments, equal for equal ones; None where it may not be left out.

    A large result would have to be kept until its second use.
    """
    operation, held = node.target, node.meta.get("val")
    if not isinstance(operation, torch._ops.OpOverload) or operation.namespace != "aten":
        return None
    if not isinstance(held, torch.Tensor) or held.numel() > _LARGEST_CONSTANT:
        return None
    if operation._schema.is_mutable or torch.Tag.nondeterministic_seeded in operation.tags:
        return None
    return operation, _hashable(node.args), _hashable(node.kwargs)


def _hashable(value: Any) -> Any:
    if isinstance(value, Node):
        return value
    if isinstance(value, dict):
        return tuple((key, _hashable(item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return tuple(map(_hashable, value))
    return repr(value)  # 1, 1.0 and True are equal, and not the same argument


def _is_written_since(node: Node, earlier: Node, memory: Memory) -> bool:
    """Whether what ``node`` reads has been changed since ``earlier`` has read it."""
    begin, end = memory.position[earlier], memory.position[node]
    return any(memory.written_between(n, begin, end) for n in node.all_input_nodes)


def known_number(value: Any) -> bool | int | float | None:
    """The number that ``value`` is in every step; None if it is none, or is read from a tensor."""
    if isinstance(value, torch.SymInt):  # a shape may have told what it is
        result: bool | int | float | None = value.node.maybe_as_int()
        return result
    return value if isinstance(value, bool | int | float) else None


def _write_out(node: Node, number: float) -> None:
    """Give the users of a node the number it is known to be (one that follows from shapes)."""

    def literal(other: Node) -> Any:
        return number if other is node else other

    for user in list(node.users):
        user.args = torch.fx.map_arg(user.args, literal)
        user.kwargs = torch.fx.map_arg(user.kwargs, literal)
    node.graph.erase_node(node)


def _is_times_one(node: Node) -> bool:
    if node.target is not aten.mul.Tensor or not isinstance(node.args[1], float):
        return False
    return node.args[1] == 1.0 and node.args[0].meta["val"].dtype == node.meta["val"].dtype


_LIKE = {
    aten.ones_like.default: torch.ones,
    aten.zeros_like.default: torch.zeros,
}
_MAKERS = (aten.scalar_tensor.default, aten.full.default, aten.zeros.default, aten.ones.default)
_LARGEST_CONSTANT = 4096


def _constant(node: Node, constants: dict[Node, torch.Tensor]) -> torch.Tensor | None:
    """The value of a node that has the same one in every step; None for the others."""
    held = node.meta.get("val")
    if not isinstance(held, torch.Tensor) or held.numel() > _LARGEST_CONSTANT:
        return None
    with torch.no_grad():
        if node.target in _LIKE:
            return _LIKE[node.target](held.shape, dtype=held.dtype, device=held.device)
        inputs = node.all_input_nodes
        if not (node.target in _MAKERS or (inputs and all(n in constants for n in inputs))):
            return None
        if not isinstance(node.target, torch._ops.OpOverload) or node.target._schema.is_mutable:
            return None
        if torch.Tag.nondeterministic_seeded in node.target.tags:
            return None
        args = torch.fx.map_arg(node.args, lambda n: constants[n])
        value = node.target(*args, **torch.fx.map_arg(node.kwargs, lambda n: constants[n]))
        return value.clone() if isinstance(value, torch.Tensor) else None


def delay_assignments(graph: Graph) -> None:
    """Move assignments to the graph's inputs behind everything else.

    Later reads of an input read the assigned value instead. An input is left as it is where a view
    of it outlives an assignment, and assigned early where another operation changes it in place.

    Args:
        graph: A recorded graph; changed in place.
    """
    memory = Memory(graph)
    fixed = _fixed_inputs(graph, memory)
    values: dict[Node, Node] = {}

    def read_values(node: Node) -> None:
        for old, new in values.items():
            node.replace_input_with(old, new)

    for node in list(graph.nodes):
        with graph.inserting_before(node):
            if node.op == "output":
                read_values(node)
                for target, value in values.items():
                    graph.call_function(ASSIGN, (target, value))
            elif _is_assignment(node) and node.args[0] not in fixed:
                target, value = node.args
                value = values.get(value, value)
                values[target] = _unchanging(graph, target, value, memory.position[node], memory)
                node.replace_all_uses_with(values[target])
                graph.erase_node(node)
            else:
                changed = {o for t in aliases(node, write=True) for o in memory.owners(t)}
                for target in [t for t in values if t in changed]:
                    graph.call_function(ASSIGN, (target, values.pop(target)))
                read_values(node)


def _is_assignment(node: Node) -> bool:
    return node.target is ASSIGN and node.args[0].op == "placeholder"


def _fixed_inputs(graph: Graph, memory: Memory) -> set[Node]:
    """Inputs whose assignments have to stay where they are: a view shows them to others."""
    fixed: set[Node] = set()
    for node in graph.nodes:
        for target in aliases(node, write=True):
            fixed |= memory.owners(target) - {target}
        if not _is_assignment(node):
            continue
        now = memory.position[node]
        for view in memory.views[node.args[0]]:
            before = memory.position[view] < now and not _is_assignment(view)
            if before and any(memory.position[user] > now for user in view.users):
                fixed.add(node.args[0])
    return fixed


def _unchanging(graph: Graph, target: Node, value: Node, position: int, memory: Memory) -> Node:
    """What ``target`` holds after an assignment, as a node that nothing changes any more."""
    held, given = target.meta["val"], value.meta["val"]
    if held.shape != given.shape or held.dtype != given.dtype:
        value = graph.call_function(aten.copy.default, (target, value))
    elif memory.written_after(value, position):
        value = graph.call_function(aten.clone.default, (value,))
    value.meta.setdefault("val", held)
    return value


def fuse_bias(graph: Graph) -> None:
    """Give a bias to the product or convolution before it, as hand-written PyTorch does.

    ``x @ w + b`` reads and writes the result twice, ``addmm`` once.

    Args:
        graph: A recorded graph; changed in place.
    """
    memory = Memory(graph)
    for node in list(graph.nodes):
        if node.target is not aten.add.Tensor or node.kwargs:
            continue
        shaped, bias = node.args
        if isinstance(shaped, Node) and isinstance(bias, Node):
            _fuse(graph, node, shaped, bias, memory)


def _fuse(graph: Graph, add: Node, shaped: Node, bias: Node, memory: Memory) -> None:
    """Replace ``add(shaped, bias)`` if ``shaped`` is a view of a product used only here."""
    product = shaped.args[0] if shaped.target in _VIEWS else shaped
    if not isinstance(product, Node) or product.target not in (MM, CONVOLUTION):
        return
    if list(shaped.users) != [add] or (product is not shaped and list(product.users) != [shaped]):
        return
    flat = bias.args[0] if bias.target is aten.view.default else bias
    channels = _channels(shaped, product)
    if channels is None or not isinstance(flat, Node):
        return
    held, given = flat.meta["val"], bias.meta["val"]
    begin, end = memory.position[product], memory.position[add]
    fits = (
        given.numel() == held.numel() == math.prod(channels)
        and tuple(given.shape)[-len(channels) :] == channels
        and shaped.meta["val"].shape == add.meta["val"].shape
        and held.is_contiguous()
        and held.dtype == add.meta["val"].dtype == product.meta["val"].dtype
    )
    if not fits or any(
        memory.written_between(n, begin, end) for n in [*product.all_input_nodes, flat]
    ):
        return
    with graph.inserting_before(add):
        if held.dim() != 1:
            flat = graph.call_function(aten.view.default, (flat, [held.numel()]))
            flat.meta["val"] = held.view(-1)
        if product.target is MM:
            fused = graph.call_function(aten.addmm.default, (flat, *product.args))
        else:
            arguments = (*product.args[:2], flat, *product.args[3:])
            fused = graph.call_function(CONVOLUTION, arguments)
        fused.meta["val"] = product.meta["val"]
        result = fused
        if product is not shaped:
            result = graph.call_function(shaped.target, (fused, *shaped.args[1:]))
            result.meta["val"] = shaped.meta["val"]
    add.replace_all_uses_with(result)
    for node in dict.fromkeys((add, shaped, product)):
        graph.erase_node(node)


def _channels(shaped: Node, product: Node) -> tuple[int, ...] | None:
    """The last axes of ``shaped`` that the channels of a product lie along; None if unclear."""
    shape = tuple(shaped.meta["val"].shape)
    if product.target is CONVOLUTION:
        last_axis = shaped.target is aten.permute.default and shaped.args[1][-1] == 1
        return shape[-1:] if product.args[2] is None and last_axis else None
    if shaped.target is aten.permute.default or not shaped.meta["val"].is_contiguous():
        return None
    width = product.meta["val"].shape[-1]
    for axes in range(1, len(shape) + 1):
        if math.prod(shape[-axes:]) == width:
            return shape[-axes:]
    return None
