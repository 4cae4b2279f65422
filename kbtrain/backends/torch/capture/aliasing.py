"""Alias analysis of a recorded graph: which memory each node uses, and where it is written."""

from __future__ import annotations

import functools
import operator
from collections import defaultdict
from typing import Any

import torch
from torch.fx import Graph, Node


def nodes_in(value: Any) -> list[Node]:
    """The nodes in an argument, which may be a node or a list of nodes."""
    if isinstance(value, Node):
        return [value]
    if isinstance(value, list | tuple):
        return [n for item in value for n in nodes_in(item)]
    return []


def aliases(node: Node, write: bool) -> list[Node]:
    """The arguments that ``node`` writes to (``write=True``), or returns a view of."""
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
    """Positions and names of the arguments that an operation views, and that it writes to."""
    views: list[tuple[int, str]] = []
    written: list[tuple[int, str]] = []
    for position, argument in enumerate(operation._schema.arguments):
        if argument.alias_info is not None:
            found = written if argument.alias_info.is_write else views
            found.append((position, argument.name))
    return views, written


def is_collective(node: Node) -> bool:
    """Whether all processes meet in an operation: it must run, once, in the recorded order."""
    return getattr(node.target, "namespace", "").startswith("_c10d")


class AliasAnalysis:
    """The owners of the memory that each node of a graph uses, and when it is written.

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
        """The nodes that allocated memory that ``node`` may use; itself, if it is not a view."""
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
