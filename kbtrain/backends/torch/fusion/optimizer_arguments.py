"""The factor of the gradients and the flag of the step as arguments of fused optimizers.

Clipping multiplies all gradients by one number, which is a pass over them, and an update that must
not happen is undone by selecting the old state, which is a dozen. Operations with such arguments
divide by ``grad_scale`` as they read a gradient, and change nothing where ``found_inf`` is 1.

The flag is for operations that change nothing but state, as the kernels that ``optim`` makes of
rules. PyTorch's fused optimizers write gradients too, which no selection restores; they get the
flag where they are called (``capture.predication``).
"""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch.fx import Graph, Node

from kbtrain.backends.torch.capture.aliasing import AliasAnalysis, aliases, nodes_in
from kbtrain.backends.torch.capture.predication import selection

aten = torch.ops.aten

_LINEAR = (aten.clone.default, aten._to_copy.default)
"""Copies, which a factor passes through as it does through views."""


def _takes(node: Node, argument: str) -> bool:
    """Whether an operation has such an argument, and was not given one."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None or node.kwargs.get(argument) is not None:
        return False
    return any(each.name == argument for each in schema.arguments)


def _gradients(node: Node) -> list[Node]:
    """The gradients that a fused optimizer is given."""
    names = [each.name for each in node.target._schema.arguments]
    (place,) = (i for i, name in enumerate(names) if name in ("grads", "gradients"))
    return nodes_in(node.args[place])


def pass_flags(graph: Graph) -> None:
    """Give ``found_inf`` to operations all of whose changes are selected by one condition.

    They are between the copies of the old state and the selections; what has changed the same
    variables before or after is not undone.

    The selections are then redundant (``predication.drop_selections``).

    Args:
        graph: A recorded graph; changed in place.
    """
    analysis = AliasAnalysis(graph)
    at = analysis.position
    selections: dict[Node, list[tuple[int, int, Node]]] = {}
    for node in graph.nodes:
        if (found := selection(node, analysis)) is not None:
            selections.setdefault(found.owner, []).append(
                (at[found.old], at[node], found.condition)
            )
    skip_of: dict[Node, Node] = {}
    for node in list(graph.nodes):
        if not _takes(node, "found_inf"):
            continue
        written = {o for target in aliases(node, write=True) for o in analysis.owners(target)}
        conditions = {
            next((c for old, new, c in selections.get(owner, ()) if old < at[node] < new), None)
            for owner in written
        }
        condition = next(iter(conditions), None)
        if condition is None or len(conditions) > 1 or at[condition] > at[node]:
            continue
        if condition not in skip_of:
            with graph.inserting_after(condition):
                skip = graph.call_function(aten.logical_not.default, (condition,))
            skip.meta["val"] = condition.meta["val"]
            with graph.inserting_after(skip):
                number = graph.call_function(
                    aten._to_copy.default, (skip,), {"dtype": torch.float32}
                )
            number.meta["val"] = condition.meta["val"].float()
            skip_of[condition] = number
        node.kwargs = {**node.kwargs, "found_inf": skip_of[condition]}


def pass_factors(graph: Graph) -> None:
    """Give ``grad_scale`` to optimizers whose gradients are used for nothing else.

    Args:
        graph: A recorded graph; changed in place.
    """
    analysis = AliasAnalysis(graph)
    for node in list(graph.nodes):
        if node.target is aten._foreach_mul_.Tensor:
            _pass_factor(node, analysis)


def _pass_factor(product: Node, analysis: AliasAnalysis) -> None:
    gradients, factor = product.args
    value = factor.meta["val"]
    if value.dtype is not torch.float32 or value.dim():
        return
    readers = {gradient: set(_readers(gradient, product, analysis)) for gradient in gradients}
    source_of = {
        end: gradient for gradient in gradients for end in _copies(gradient, product, analysis)
    }
    optimizers = {reader for found in readers.values() for reader in found}
    taken: set[Node] = set()
    scale = None
    for optimizer in sorted(optimizers, key=analysis.position.__getitem__):
        if not _takes(optimizer, "grad_scale"):
            continue
        sources = [source_of.get(each) for each in _gradients(optimizer)]
        if not all(source and readers[source] == {optimizer} for source in sources):
            continue
        if scale is None:
            with product.graph.inserting_before(product):
                scale = product.graph.call_function(aten.reciprocal.default, (factor,))
            scale.meta["val"] = value
        optimizer.kwargs = {**optimizer.kwargs, "grad_scale": scale}
        taken.update(source for source in sources if source is not None)
    left = [gradient for gradient in gradients if gradient not in taken]
    if left:
        product.args = (left, factor)
    else:
        product.graph.erase_node(product)


def _copies(gradient: Node, product: Node, analysis: AliasAnalysis) -> Iterator[Node]:
    """A gradient after it was multiplied, its views and its copies."""
    root = _root(gradient)
    waiting = [] if root is None else [root]
    seen = set()
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        for user in node.users:
            is_later = analysis.position[user] > analysis.position[product]
            if _is_view(user) or (is_later and user.target in _LINEAR):
                waiting.append(user)


def _root(node: Node) -> Node | None:
    """The result that a node is a view of; None if it is no result of its own."""
    while _is_view(node):
        (node, *others) = aliases(node, write=False)
        if others:
            return None
    made_by = nodes_in(node.args[0])[0] if node.target is operator.getitem else node
    shares = aliases(made_by, write=False) or aliases(made_by, write=True)
    return None if shares or made_by.op != "call_function" else node


def _is_view(node: Node) -> bool:
    return bool(aliases(node, write=False)) and not aliases(node, write=True)


def _readers(gradient: Node, product: Node, analysis: AliasAnalysis) -> Iterator[Node]:
    """What uses a gradient after it was multiplied; the product itself if that is not known."""
    copies = set(_copies(gradient, product, analysis))
    if not copies:
        yield product
    for node in copies:
        for user in node.users:
            if analysis.position[user] > analysis.position[product] and user not in copies:
                yield user
