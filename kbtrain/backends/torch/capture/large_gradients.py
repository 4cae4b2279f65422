"""Gradients of large embeddings in memory that stays from step to step.

The gradient of a table is zeros but for the rows that a batch has looked up. Its memory is too
large for the allocator to keep, so the system would map and clear it anew in every step, page by
page, which on a CPU takes longer than the fused update of the whole table
(docs/lab/large-tables.md).
"""

from __future__ import annotations

import torch
from torch.fx import Node

from kbtrain.backends.torch.capture.simplify import Memory, nodes_in

aten = torch.ops.aten

KEPT_BYTES = 1 << 20
"""Size of a gradient from which on its memory is kept."""

BYTES_PER_ROW = 1 << 13
"""Size of a gradient for each row that is added to it, from which on its memory is kept: the rows
are added one by one, where PyTorch's own operation has a thread for each part of the table."""

Kept = dict[tuple[torch.Size, int], torch.Tensor]
"""The memory: shape, and number among the gradients of this shape, to a tensor."""

_LIBRARY = torch.library.Library("kbtrain_kept", "DEF")
_LIBRARY.define("embedding_gradient(Tensor memory, Tensor gradient, Tensor indices) -> Tensor")


def _embedding_gradient(
    memory: torch.Tensor, gradient: torch.Tensor, indices: torch.Tensor
) -> torch.Tensor:
    rows = gradient.reshape(-1, memory.shape[1])
    return memory.zero_().index_add_(0, indices.reshape(-1), rows)


_LIBRARY.impl("embedding_gradient", _embedding_gradient, "CPU")


def keep_gradients(module: torch.nn.Module, kept: Kept) -> None:
    """Let the gradients of large embeddings use memory of ``kept``.

    To the record the operation is one that allocates its result: nothing outside of the step has a
    view of it, and each step begins by clearing it. The sums are those of PyTorch's operation, in
    the same order.

    Args:
        module: A recorded step; changed in place.
        kept: Memory of other records of the same step; what is missing is added.
    """
    graph = module.graph
    memory = Memory(graph)
    output = next(node for node in graph.nodes if node.op == "output")
    leaving = {owner for node in nodes_in(output.args[0]) for owner in memory.owners(node)}
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
