"""Predicated updates on a GPU, without a copy of the state.

Reading a flag would stall the queue of a GPU, so ``run_if`` keeps the old values, runs the update
and selects, which takes a dozen passes over the model and its optimizer. torch's fused optimizers
can read a flag on the device; state that only they change needs no copy.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.fx import Graph, Node
from torch.overrides import TorchFunctionMode

from kbtrain.backends.torch.capture.aliasing import AliasAnalysis
from kbtrain.backends.torch.capture.simplify import ASSIGN

aten = torch.ops.aten

_FUNCTIONS = {torch._fused_adam_, torch._fused_adamw_, torch._fused_sgd_, torch._fused_adagrad_}


class FlaggedOptimizers(TorchFunctionMode):  # type: ignore[misc]
    """Context in which fused optimizers change nothing if ``condition`` is false.

    Args:
        condition: A boolean scalar on the device.
    """

    def __init__(self, condition: torch.Tensor) -> None:
        super().__init__()
        self._skip = torch.logical_not(condition).float()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _FUNCTIONS and kwargs.get("found_inf") is None:
            kwargs = {**kwargs, "found_inf": self._skip}
        return func(*args, **kwargs)


def drop_selections(graph: Graph) -> None:
    """Remove ``x.copy_(where(condition, x, old))`` where predicated kernels make it redundant.

    This holds if only operations whose ``found_inf`` is this condition have written to ``x`` since
    ``old = x.clone()``.

    Args:
        graph: A recorded graph; changed in place.
    """
    analysis = AliasAnalysis(graph)
    nodes = list(graph.nodes)
    for node in nodes:
        if (found := selection(node, analysis)) is None:
            continue
        writers = [nodes[i] for i in analysis.writes[found.owner]]
        writers = [w for w in writers if analysis.position[w] > analysis.position[found.old]]
        if all(w is node or _is_flagged(w, found.condition) for w in writers):
            selected = node.args[1]
            for unused in (node, selected, found.old):
                if not unused.users:
                    graph.erase_node(unused)


class Selection(NamedTuple):
    """An assignment ``x.copy_(where(condition, x, old))``.

    Attributes:
        owner: The node of ``x``.
        condition: The condition.
        old: The copy of ``x`` from before.
    """

    owner: Node
    condition: Node
    old: Node


def selection(node: Node, analysis: AliasAnalysis) -> Selection | None:
    """The selection that a node is, if it is one.

    Args:
        node: Any node of a recorded graph.
        analysis: The analysis of the graph.
    """
    if node.target is not ASSIGN or node.args[1].target is not aten.where.self:
        return None
    variable, (condition, new, old) = _origin(node.args[0]), node.args[1].args
    if getattr(old, "target", None) is not aten.clone.default:
        return None
    if len(analysis.owners(variable)) != 1 or not (
        variable is _origin(new) is _origin(old.args[0])
    ):
        return None
    return Selection(next(iter(analysis.owners(variable))), condition, old)


def _origin(node: Node) -> Node:
    """The node behind identity views."""
    while node.target is aten.detach.default:
        node = node.args[0]
    return node


def _is_flagged(node: Node, condition: Node) -> bool:
    """Whether a node changes nothing unless ``condition`` is true."""
    skip = node.kwargs.get("found_inf")
    if skip is None or not isinstance(skip, Node):
        return False
    negated = skip.args[0] if skip.target is aten._to_copy.default else skip
    return negated.target is aten.logical_not.default and negated.args[0] is condition
