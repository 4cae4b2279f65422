"""Which operations of a recorded step may trade places."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence

from torch.fx import Node

from kbtrain.backends.torch.capture.aliasing import AliasAnalysis, aliases


class Effects:
    """The memory that each operation reads and writes.

    Args:
        analysis: The analysis of the graph that they are in.
    """

    def __init__(self, analysis: AliasAnalysis) -> None:
        self._owners = analysis.owners
        self._known: dict[Node, tuple[set[Node], set[Node]]] = {}

    def of(self, node: Node) -> tuple[set[Node], set[Node]]:
        """The owners of the memory that a node reads, and of that which it writes or allocates."""
        if node not in self._known:
            read = {owner for source in node.all_input_nodes for owner in self._owners(source)}
            written = {o for target in aliases(node, write=True) for o in self._owners(target)}
            if node in self._owners(node) or node.target is operator.getitem:
                written = written | {node}
            self._known[node] = read, written
        return self._known[node]

    def conflict(self, first: Node, second: Node) -> bool:
        """Whether the second of two operations must stay behind the first."""
        (reads, writes), (later_reads, later_writes) = self.of(first), self.of(second)
        return (
            first in second.all_input_nodes
            or bool(writes & later_reads)
            or bool(writes & later_writes)
            or bool(reads & later_writes)
        )


class Waiting:
    """Operations that were put off, by the memory that they use.

    Args:
        effects: What they read and write.

    Attributes:
        nodes: The operations, in order.
    """

    def __init__(self, effects: Effects) -> None:
        self._effects = effects
        self._readers: dict[Node, dict[Node, None]] = defaultdict(dict)
        self._writers: dict[Node, dict[Node, None]] = defaultdict(dict)
        self.nodes: dict[Node, None] = {}

    def add(self, node: Node) -> None:
        """Put off an operation."""
        self.nodes[node] = None
        reads, writes = self._effects.of(node)
        for owner in reads:
            self._readers[owner][node] = None
        for owner in writes:
            self._writers[owner][node] = None

    def remove(self, node: Node) -> None:
        """Forget an operation, which has run."""
        del self.nodes[node]
        reads, writes = self._effects.of(node)
        for owner in reads:
            del self._readers[owner][node]
        for owner in writes:
            del self._writers[owner][node]

    def before(self, node: Node) -> list[Node]:
        """Those that must run before ``node``."""
        reads, writes = self._effects.of(node)
        found = {source: None for source in node.all_input_nodes if source in self.nodes}
        for owner in reads | writes:
            found |= self._writers[owner]
        for owner in writes:
            found |= self._readers[owner]
        return list(found)


def collected(
    operations: Sequence[Node],
    effects: Effects,
    kind_of: Callable[[Node], Hashable | None],
    is_free: Callable[[Node], bool],
) -> list[list[Node]]:
    """Put operations of equal kind together, each as late as its result is needed.

    Args:
        operations: The operations, in order.
        effects: What they read and write.
        kind_of: The kind of an operation; None for one that stays where it is.
        is_free: Whether an operation takes no time, as a view.

    Returns:
        Groups of operations of one kind that do not depend on each other, in an order with the
        same results; most are single operations.
    """
    waiting = Waiting(effects)
    order: list[list[Node]] = []
    groups: dict[Hashable, list[Node]] = {}
    key_of: dict[Node, Hashable] = {}
    level_of: dict[Node, int] = {}
    needs: dict[Node, list[Node]] = {}

    def run(node: Node) -> None:
        """Run the group of a node, after what it needs."""
        if node not in waiting.nodes:
            return
        group = groups.pop(key_of[node])
        for member in group:
            for other in needs.pop(member):
                run(other)
        for member in group:
            waiting.remove(member)
        order.append(group)

    for node in operations:
        before = waiting.before(node)
        kind = kind_of(node)
        if kind is None and before and is_free(node):
            kind = node
        if kind is None:
            for other in before:
                run(other)
            order.append([node])
            continue
        level = 1 + max((level_of[other] for other in before), default=0)
        key_of[node], level_of[node], needs[node] = (kind, level), level, before
        groups.setdefault((kind, level), []).append(node)
        waiting.add(node)
    for node in list(waiting.nodes):
        run(node)
    return order
