"""Rewrites of a recorded graph: fewer views, fewer copies, plain matrix products.

Keras expresses a tensor product as a chain of views around a batched product of one matrix. Each
view costs about a microsecond, and views between a product and its bias prevent their fusion. The
net effect of a chain of views is read off the strides of its result.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import Graph, Node

from kbtrain.backends.torch.capture.aliasing import AliasAnalysis
from kbtrain.backends.torch.capture.guard import NotCapturable

aten = torch.ops.aten

_CHAINED = (
    aten.view.default,
    aten.reshape.default,
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
)
_ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: None,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: None,
    aten._scaled_dot_product_flash_attention: 3,
    aten._scaled_dot_product_flash_attention_backward: 4,
    aten._scaled_dot_product_efficient_attention: 3,
    aten._scaled_dot_product_efficient_attention_backward: 4,
    aten._scaled_dot_product_cudnn_attention: 3,
    aten._scaled_dot_product_cudnn_attention_backward: 4,
}
"""Attention kernels, and how many of their first arguments may be strided views (query, key and
value, after the gradient); None for all. On a GPU a mask must be aligned."""


def plain_products(graph: Graph) -> None:
    """Turn batched products of a single matrix into plain ones, which can take a bias.

    Args:
        graph: A recorded graph; changed in place.
    """
    for node in list(graph.nodes):
        if node.target is not aten.bmm.default or node.meta["val"].shape[0] != 1:
            continue
        with graph.inserting_before(node):
            factors = [_call(graph, aten.squeeze.dim, factor, 0) for factor in node.args]
            product = _call(graph, aten.mm.default, *factors)
            result = _call(graph, aten.unsqueeze.default, product, 0)
        node.replace_all_uses_with(result)
        graph.erase_node(node)


def shorten_views(graph: Graph) -> None:
    """Replace chains of views by one or two with the same result.

    Args:
        graph: A recorded graph; changed in place.
    """
    for node in graph.nodes:
        if node.target is aten._unsafe_view.default:  # a view whose schema does not declare it
            node.target = aten.view.default
    analysis = AliasAnalysis(graph)
    for node in list(graph.nodes):
        if node.target not in _CHAINED:
            continue
        base, length = node, 0
        while base.target in _CHAINED:
            base, length = base.args[0], length + 1
        # The real result of a kernel may have other strides than its fake tensor. The rewritten
        # chain may then copy instead of creating a view, so the memory must not be written to.
        read_only = base.op == "call_function" and not analysis.written_after(base, -1)
        reshape = aten.reshape.default if read_only else aten.view.default
        with graph.inserting_before(node):
            shorter = _view(graph, base, node.meta["val"], length, reshape)
        if shorter is not None:
            node.replace_all_uses_with(shorter)
            graph.erase_node(node)
    for node in reversed(graph.nodes):  # intermediate views, and rejected candidates
        if node.target in _CHAINED and not node.users:
            graph.erase_node(node)


def _view(graph: Graph, base: Node, wanted: torch.Tensor, below: int, reshape: Any) -> Node | None:
    """``base`` with the shape and strides of ``wanted`` in fewer than ``below`` views, or None."""
    held = base.meta["val"]
    dense = held.is_contiguous() and held.numel() == wanted.numel() > 0
    if not dense or held.storage_offset() != wanted.storage_offset():
        return None
    if wanted.shape == held.shape and wanted.stride() == held.stride():
        return base
    # The axes in memory order; those of length 1 may be anywhere.
    order = sorted(range(wanted.dim()), key=lambda i: (-wanted.stride(i), wanted.shape[i] != 1))
    shape = [int(wanted.shape[i]) for i in order]
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    found = [wanted.stride(i) for i in order]
    if any(n > 1 and a != b for n, a, b in zip(shape, strides, found, strict=True)):
        return None
    steps = (tuple(shape) != tuple(held.shape)) + (order != sorted(order))
    if steps >= below:
        return None
    result = base
    if tuple(shape) != tuple(held.shape):
        result = _call(graph, reshape, result, shape)
    if order != sorted(order):
        result = _call(
            graph, aten.permute.default, result, [order.index(i) for i in range(len(order))]
        )
    # Includes strides of axes of length 1: kernels use them to detect channels-last.
    return result if result.meta["val"].stride() == wanted.stride() else None


def allow_other_strides(graph: Graph) -> None:
    """Make a record independent of how kernels lay out their results.

    The libraries of a GPU may lay a result out otherwise than its fake tensor. What was decided by
    the fake's strides while recording can then be wrong: a view that is not possible, a gradient
    that an optimizer takes for contiguous, strides that mean other elements. A ``view`` of memory
    that no operation writes to becomes ``reshape``, and the others read ``contiguous()``; where
    strides are as recorded, both are the same view.

    Args:
        graph: A recorded graph; changed in place.

    Raises:
        NotCapturable: An operation reads memory by strides of a result that was recorded with gaps.
    """
    analysis = AliasAnalysis(graph)
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is aten.view.default and not analysis.written_after(node, -1):
            node.target = aten.reshape.default
        elif node.target in _BY_STRIDES:
            base = node.args[0]
            if _is_dense(base) and not analysis.written_after(node, -1):
                _read_contiguous(graph, node, [base])
            elif base.op == "call_function" and node.meta["val"].device.type != "cpu":
                raise NotCapturable(f"{node.target} depends on how a GPU lays out a result")
        elif _is_update(node.target):
            gradients = [g for g in node.args[1] if g.op == "call_function" and _is_dense(g)]
            _read_contiguous(graph, node, gradients)


_BY_STRIDES = (aten.as_strided.default, aten.view.dtype, aten.view_as_complex.default)


def _is_update(operation: Any) -> bool:
    """Whether an operation updates lists of tensors: parameters, then gradients."""
    if not isinstance(operation, torch._ops.OpOverload):
        return False
    return str(operation._schema.name).startswith(("aten::_fused_", "optim::run_"))


def _is_dense(node: Node) -> bool:
    value = node.meta["val"]
    return bool(value.is_contiguous() and value.storage_offset() == 0)


def _read_contiguous(graph: Graph, node: Node, sources: list[Node]) -> None:
    """Let ``node`` read ``contiguous()`` of some of its arguments."""
    with graph.inserting_before(node):
        dense = {source: _call(graph, aten.contiguous.default, source) for source in sources}
    # All at once: an update has a list of every gradient, which each replacement would copy.
    node.args, node.kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda n: dense.get(n, n))


def copy_where_needed(graph: Graph) -> None:
    """Remove unnecessary copies to another layout.

    The attention kernel accepts strided views of query, key and value, and tensors that are only
    strided during recording need no copy.

    Args:
        graph: A recorded graph; changed in place.
    """
    analysis = AliasAnalysis(graph)
    for node in list(graph.nodes):
        if node.target is not aten.clone.default or not node.users:
            continue
        source, start = node.args[0], analysis.position[node]
        if analysis.written_after(source, start) or analysis.written_after(node, start):
            continue
        if node.kwargs.get("memory_format") is not torch.contiguous_format:
            continue
        attention = all(_takes_view(user, node) for user in node.users)
        if attention and source.meta["val"].stride(-1) == 1:
            node.replace_all_uses_with(source)
            graph.erase_node(node)
        else:
            node.target, node.kwargs = aten.contiguous.default, {}


def _takes_view(user: Node, node: Node) -> bool:
    """Whether attention accepts ``node`` as a view whose last axis is dense."""
    packet = getattr(user.target, "overloadpacket", None)
    if packet not in _ATTENTION:
        return False
    places = _ATTENTION[packet]
    return places is None or not (node in user.args[places:] or node in user.kwargs.values())


def _call(graph: Graph, operation: Any, *args: Any) -> Node:
    """A new operation, with a fake tensor as its result."""
    node = graph.call_function(operation, args)
    values = torch.fx.map_arg(args, lambda n: n.meta["val"])
    node.meta["val"] = operation(*values)
    return node
