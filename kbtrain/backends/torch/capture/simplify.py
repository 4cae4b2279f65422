"""Semantics-preserving rewrites of a recorded graph.

Redundant operations are removed, assignments are moved to the end, and a bias is fused into its
product.

A recorded graph of ATen operations follows the Python program, with assignments to variables in
between. If every assignment can be delayed to the end, the rest is pure: it can be compiled as a
whole, and discarded if a check fails.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import Graph, Node

from kbtrain.backends.torch.capture.aliasing import (
    AliasAnalysis,
    aliases,
    is_collective,
    nodes_in,
)

aten = torch.ops.aten

ASSIGN = aten.copy_.default
MM = aten.mm.default
CONVOLUTION = aten.convolution.default
_VIEWS = (
    aten.view.default,
    aten.reshape.default,
    aten.permute.default,
)


def simplify(module: torch.nn.Module) -> None:
    """Remove no-ops from a recorded graph, fold constants, and merge common subexpressions.

    ``detach`` and a product with 1 are no-ops without gradients. Small tensors that depend only on
    shapes (zeros, ones, ranges and results computed from them) become constants. Of two equal
    operations with a small result, the second is removed.

    Args:
        module: A recorded step; changed in place.
    """
    graph = module.graph
    analysis = AliasAnalysis(graph)
    constants = {n: getattr(module, str(n.target)) for n in graph.nodes if n.op == "get_attr"}
    # An undeclared variable is a constant in the graph, but may be assigned elsewhere, and a tensor
    # that the step itself changes is none.
    constants = {
        n: t
        for n, t in constants.items()
        if not isinstance(t, torch.nn.Parameter) and not analysis.writes[n]
    }
    # Results of a step must not share memory: changing one must not change another.
    output = next(node for node in graph.nodes if node.op == "output")
    leaving = {owner for node in nodes_in(output.args[0]) for owner in analysis.owners(node)}
    folded: list[tuple[torch.Tensor, Node]] = []
    first: dict[Any, Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or any(analysis.writes[o] for o in analysis.owners(node)):
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
        elif (call := _call_of(node)) is not None and not analysis.owners(node) & leaving:
            earlier = first.get(call)
            if earlier is None or _is_written_since(node, earlier, analysis):
                first[call] = node
            else:
                _replace(node, earlier)


def _replace(node: Node, other: Node) -> None:
    node.replace_all_uses_with(other)
    node.graph.erase_node(node)


def _is_same(a: torch.Tensor, b: torch.Tensor) -> bool:
    like = (a.dtype, a.device, a.shape, a.stride()) == (b.dtype, b.device, b.shape, b.stride())
    # Compared as bytes, because 0 equals -0.
    return like and torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (a, b)))


def _call_of(node: Node) -> Any:
    """A key that is equal for equal operations; None for one that must not be removed.

    A large result is not merged, as it would have to be kept until its second use.
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
    return repr(value)  # 1, 1.0 and True are equal, but different arguments


def _is_written_since(node: Node, earlier: Node, analysis: AliasAnalysis) -> bool:
    """Whether memory that ``node`` reads was written after ``earlier``."""
    begin, end = analysis.position[earlier], analysis.position[node]
    return any(analysis.written_between(n, begin, end) for n in node.all_input_nodes)


def known_number(value: Any) -> bool | int | float | None:
    """The number that ``value`` is in every step; None if it is not a number or not constant."""
    if isinstance(value, torch.SymInt):  # may be known from a shape
        result: bool | int | float | None = value.node.maybe_as_int()
        return result
    return value if isinstance(value, bool | int | float) else None


def _write_out(node: Node, number: float) -> None:
    """Replace a node by the number it is known to be from shapes."""

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
    """The value of a node if it is the same in every step, else None."""
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
        if is_collective(node):
            return None  # all processes meet in it, whatever this one gives
        if torch.Tag.nondeterministic_seeded in node.target.tags:
            return None
        args = torch.fx.map_arg(node.args, lambda n: constants[n])
        value = node.target(*args, **torch.fx.map_arg(node.kwargs, lambda n: constants[n]))
        return value.clone() if isinstance(value, torch.Tensor) else None


def delay_assignments(graph: Graph) -> None:
    """Move assignments to the graph's inputs to the end.

    Later reads of an input use the assigned value instead. Assignments to an input stay in place if
    a view of it outlives them, and are done early if another operation changes it in place.

    Args:
        graph: A recorded graph; changed in place.
    """
    _assign_to_inputs(graph)
    analysis = AliasAnalysis(graph)
    fixed = _fixed_inputs(graph, analysis)
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
                values[target] = _unchanging(
                    graph, target, value, analysis.position[node], analysis
                )
                node.replace_all_uses_with(values[target])
                graph.erase_node(node)
            else:
                changed = {o for t in aliases(node, write=True) for o in analysis.owners(t)}
                for target in [t for t in values if t in changed]:
                    graph.call_function(ASSIGN, (target, values.pop(target)))
                read_values(node)


def _assign_to_inputs(graph: Graph) -> None:
    """Let a repeated assignment name its input, in place of the result of the one before it."""
    for node in graph.nodes:
        if node.target is ASSIGN:
            target = node.args[0]
            while target.target is ASSIGN:
                target = target.args[0]
            if target.op == "placeholder":
                node.args = (target, *node.args[1:])


def _is_assignment(node: Node) -> bool:
    return node.target is ASSIGN and node.args[0].op == "placeholder"


def _fixed_inputs(graph: Graph, analysis: AliasAnalysis) -> set[Node]:
    """Inputs whose assignments must stay in place, because they are visible through a view."""
    fixed: set[Node] = set()
    for node in graph.nodes:
        for target in aliases(node, write=True):
            fixed |= analysis.owners(target) - {target}
        if not _is_assignment(node):
            continue
        now = analysis.position[node]
        for view in analysis.views[node.args[0]]:
            before = analysis.position[view] < now and not _is_assignment(view)
            if before and any(analysis.position[user] > now for user in view.users):
                fixed.add(node.args[0])
    return fixed


def _unchanging(
    graph: Graph, target: Node, value: Node, position: int, analysis: AliasAnalysis
) -> Node:
    """The value of ``target`` after an assignment, as a node that is not changed afterwards."""
    held, given = target.meta["val"], value.meta["val"]
    if held.shape != given.shape or held.dtype != given.dtype:
        value = graph.call_function(aten.copy.default, (target, value))
    elif analysis.written_after(value, position):
        value = graph.call_function(aten.clone.default, (value,))
    value.meta.setdefault("val", held)
    return value


def fuse_bias(graph: Graph) -> None:
    """Fuse a bias into the preceding product or convolution, as hand-written PyTorch does.

    ``x @ w + b`` reads and writes the result twice, ``addmm`` once.

    Args:
        graph: A recorded graph; changed in place.
    """
    analysis = AliasAnalysis(graph)
    for node in list(graph.nodes):
        if node.target is not aten.add.Tensor or node.kwargs:
            continue
        shaped, bias = node.args
        if isinstance(shaped, Node) and isinstance(bias, Node):
            _fuse(graph, node, shaped, bias, analysis)


def _fuse(graph: Graph, add: Node, shaped: Node, bias: Node, analysis: AliasAnalysis) -> None:
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
    begin, end = analysis.position[product], analysis.position[add]
    fits = (
        given.numel() == held.numel() == math.prod(channels)
        and tuple(given.shape)[-len(channels) :] == channels
        and shaped.meta["val"].shape == add.meta["val"].shape
        and held.is_contiguous()
        and held.dtype == add.meta["val"].dtype == product.meta["val"].dtype
    )
    if not fits or any(
        analysis.written_between(n, begin, end) for n in [*product.all_input_nodes, flat]
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
    """The trailing axes of ``shaped`` that hold the channels of a product; None if unknown."""
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
