"""Everything that a step computes of scalars, in one kernel.

Loss, clipping factor, finite check, learning rate, counts: some forty operations on single numbers,
each of which is a kernel of its own. In the order of a record they are put off until one of their
results is needed. What has come together then is one call.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence

import torch
from torch.fx import Node

from kbtrain.backends.torch import fusion
from kbtrain.backends.torch.capture.aliasing import AliasAnalysis
from kbtrain.backends.torch.fusion.order import Effects, Waiting
from kbtrain.backends.torch.fusion.scalar_kernel import Scalars, is_supported

aten = torch.ops.aten


def fuse_scalars(operations: Sequence[Node], constants: dict[Node, torch.Tensor]) -> list[Node]:
    """Put operations on scalars into few kernels.

    Args:
        operations: Operations that do not wait for the device, in order.
        constants: Nodes that are constant tensors, with these tensors.

    Returns:
        Operations with the same results, in order.
    """
    graph = operations[0].graph
    analysis = AliasAnalysis(graph)
    effects = Effects(analysis)
    # A tensor on the device may be changed by anyone who has it; a kernel reads it there.
    numbers = {
        node: tensor
        for node, tensor in constants.items()
        if not tensor.dim() and tensor.device.type != fusion.KIND and not analysis.writes[node]
    }
    values = [node.meta.get("val") for node in operations]
    devices = [v.device for v in values if torch.is_tensor(v) and v.device.type == fusion.KIND]
    if not devices:
        return list(operations)

    def is_scalar(node: Node) -> bool:
        return is_supported(node, devices[0], numbers)

    waiting = Waiting(effects)
    order: list[Node] = []

    def run() -> None:
        group = list(waiting.nodes)
        for node in group:
            waiting.remove(node)
        order.extend(_fused(group, numbers))

    for node in _assignments_early(operations, effects, is_scalar):
        before = waiting.before(node)
        if is_scalar(node) and not any(map(_is_assignment, before)):
            waiting.add(node)
            continue
        if before:
            run()
        if is_scalar(node):
            waiting.add(node)
        else:
            order.append(node)
    run()
    return order


def _assignments_early(
    operations: Sequence[Node], effects: Effects, is_scalar: Callable[[Node], bool]
) -> list[Node]:
    """Counters are assigned last, behind the optimizer; here, as soon as nothing needs the old."""
    order: list[Node] = []
    for node in operations:
        place = len(order)
        if is_scalar(node):
            while place and not is_scalar(order[place - 1]):
                if effects.conflict(order[place - 1], node):
                    break
                place -= 1
            if not place:
                place = len(order)  # it waits for nothing, so it need not move
        order.insert(place, node)
    return order


def _is_assignment(node: Node) -> bool:
    return node.target is aten.copy_.default


def _fused(group: list[Node], numbers: dict[Node, torch.Tensor]) -> list[Node]:
    """One node for a group of operations, and one for each of its results."""
    if len(group) < 2:
        return group
    inside = set(group)
    written = [node.args[0] for node in group if _is_assignment(node)]
    inputs = [s for node in group for s in node.all_input_nodes if s not in inside]
    inputs = [node for node in dict.fromkeys(inputs) if node not in numbers]
    results = [
        node
        for node in group
        if not _is_assignment(node) and any(user not in inside for user in node.users)
    ]
    graph = group[0].graph
    scalars = Scalars(group, inputs, results, list(dict.fromkeys(written)), numbers)
    with graph.inserting_before(group[0]):
        joined = graph.call_function(scalars, tuple(inputs))
    joined.meta["val"] = [node.meta["val"] for node in results]
    with graph.inserting_after(group[-1]):
        parts = [graph.call_function(operator.getitem, (joined, i)) for i in range(len(results))]
    for node, part in zip(results, parts, strict=True):
        part.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(part, delete_user_cb=lambda user: user not in inside)
    for node in reversed(group):
        if _is_assignment(node):
            node.replace_all_uses_with(node.args[0])
        graph.erase_node(node)
    return [joined, *parts]
