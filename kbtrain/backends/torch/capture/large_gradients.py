"""Gradients of large embeddings in memory that is reused across steps.

The gradient of a table is zero except for the rows that a batch looks up. Its memory is too large
for the allocator to cache, so the system would map and clear it page by page in every step, which
on a CPU takes longer than the fused update of the whole table (docs/lab/large-tables.md).
"""

from __future__ import annotations

import torch
from torch.fx import Node

from kbtrain.backends.torch.capture.aliasing import AliasAnalysis, nodes_in

aten = torch.ops.aten

KEPT_BYTES = 1 << 20
"""Size of a gradient above which its memory is kept."""

BYTES_PER_ROW = 1 << 13
"""Size of a gradient per added row, above which its memory is kept. Rows are added sequentially,
while PyTorch's operation uses one thread per part of the table."""

KeptMemory = dict[tuple[torch.Size, int], torch.Tensor]
"""Memory by the shape of a gradient and its index among the gradients of this shape."""

_LIBRARY = torch.library.Library("kbtrain_kept", "DEF")
_LIBRARY.define("embedding_gradient(Tensor memory, Tensor gradient, Tensor indices) -> Tensor")


def _embedding_gradient(
    analysis: torch.Tensor, gradient: torch.Tensor, indices: torch.Tensor
) -> torch.Tensor:
    rows = gradient.reshape(-1, analysis.shape[1])
    return analysis.zero_().index_add_(0, indices.reshape(-1), rows)


_LIBRARY.impl("embedding_gradient", _embedding_gradient, "CPU")


def keep_gradients(module: torch.nn.Module, kept: KeptMemory) -> None:
    """Place the gradients of large embeddings in the memory of ``kept``.

    In the graph the operation still allocates its result: nothing outside the step has a view of
    it, and each step clears it first. Sums are computed in the order of PyTorch's operation.

    Args:
        module: A recorded step; changed in place.
        kept: Memory shared with other graphs of the same step; missing entries are added.
    """
    graph = module.graph
    analysis = AliasAnalysis(graph)
    output = next(node for node in graph.nodes if node.op == "output")
    leaving = {owner for node in nodes_in(output.args[0]) for owner in analysis.owners(node)}
    used: dict[torch.Size, int] = {}
    for node in list(graph.nodes):
        if node.target is not aten.embedding_dense_backward.default or node in leaving:
            continue
        if not _is_worth_keeping(node):
            continue
        value = node.meta["val"]
        key = value.shape, used.get(value.shape, 0)
        used[value.shape] = key[1] + 1
        if key not in kept:
            kept[key] = torch.empty(value.shape, dtype=value.dtype)
        name = f"kept_{node.name}"
        module.register_buffer(name, kept[key], persistent=False)
        with graph.inserting_before(node):
            place = graph.get_attr(name)
            place.meta["val"] = value
            replacement = graph.call_function(
                torch.ops.kbtrain_kept.embedding_gradient.default, (place, *node.args[:2])
            )
        replacement.meta["val"] = value
        node.replace_all_uses_with(replacement)
        graph.erase_node(node)


def _is_worth_keeping(node: Node) -> bool:
    _, indices, _, padding, by_frequency = node.args
    value = node.meta["val"]
    size = value.numel() * value.element_size()
    plain = padding < 0 and not by_frequency and value.dtype is torch.float32
    return (
        plain
        and value.device.type == "cpu"
        and size >= max(KEPT_BYTES, indices.meta["val"].numel() * BYTES_PER_ROW)
    )
