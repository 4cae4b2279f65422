"""Starts each collective operation as soon as what it sends has been computed.

A step is recorded with all reductions after the last gradient, though the gradients of the last
layers are computed first: the network would be idle during the backward pass, and the processor
during the reductions.
"""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch.fx import Node

from kbtrain.backends.torch.capture.aliasing import AliasAnalysis, aliases, is_collective

aten = torch.ops.aten

_COPIES = (
    aten.cat.default,
    aten.clone.default,
    aten.stack.default,
    aten._to_copy.default,
    aten._unsafe_view.default,
)


def start_early(nodes: Sequence[Node], analysis: AliasAnalysis) -> list[Node]:
    """Move collective operations, and what prepares their tensors, to the earliest place.

    They stay in their order, which must be the same on all processes, whatever the shapes of the
    tensors in between are. Waiting for a result stays where it was recorded, before its first use.

    Args:
        nodes: Operations without side effects on the state, in their recorded order.
        analysis: The analysis of their graph.

    Returns:
        The operations in a new order.
    """
    place = {node: i for i, node in enumerate(nodes)}
    positions = [analysis.position[node] for node in nodes]
    where = dict(place)  # the node after which a node will run, itself if it is not moved
    moved: dict[int, list[Node]] = defaultdict(list)
    previous = -1
    for start in nodes:
        if not is_collective(start) or _is_wait(start):
            continue
        chain = _preparation(start, where)
        inside = set(chain)
        sources = {s for node in chain for s in node.all_input_nodes if s not in inside}
        goal = max([previous, *(where[s] for s in sources if s in where)])
        goal = max([goal, *(_last_conflict(node, inside, positions, analysis) for node in chain)])
        if goal < place[start]:
            for node in chain:
                if place[node] > goal:
                    moved[goal].append(node)
                    where[node] = goal
        previous = where[start]
    order = list(moved[-1])
    for i, node in enumerate(nodes):
        if where[node] == i:
            order.append(node)
        order += moved.get(i, [])
    return order


def _is_wait(node: Node) -> bool:
    return node.target is torch.ops._c10d_functional.wait_tensor.default


def _preparation(start: Node, where: dict[Node, int]) -> list[Node]:
    """The operation with the cheap ones before it that need not stay in place, in order."""
    found = {start}
    waiting = [start]
    while waiting:
        for source in waiting.pop().all_input_nodes:
            if source in where and source not in found and _is_cheap(source):
                found.add(source)
                waiting.append(source)
    return [node for node in where if node in found]


def _is_cheap(node: Node) -> bool:
    if is_collective(node) or not isinstance(node.target, torch._ops.OpOverload):
        return False
    if aliases(node, write=True):
        return False
    pointwise = torch.Tag.pointwise in node.target.tags
    return pointwise or node.target in _COPIES or bool(aliases(node, write=False))


def _last_conflict(
    node: Node, chain: set[Node], positions: Sequence[int], analysis: AliasAnalysis
) -> int:
    """Index of the last operation before ``node`` that it must not move across; -1 if none."""
    own = analysis.position[node]
    used = {owner for n in [node, *node.all_input_nodes] for owner in analysis.owners(n)}
    written = {owner for t in aliases(node, write=True) for owner in analysis.owners(t)}
    writes = [i for owner in used for i in analysis.writes[owner] if i < own]
    if not written <= chain:  # others may read the memory before it is overwritten
        writes.append(own - 1)
    return bisect.bisect_right(positions, max(writes, default=-1)) - 1
