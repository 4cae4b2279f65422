"""Small operations of one kind as one operation over a list of tensors.

A model with 50 normalization layers updates 100 moving averages in five operations each, and one in
bfloat16 casts every bias: a thousand kernels of a few hundred numbers. PyTorch's ``_foreach_``
operations take some fifty tensors in one kernel, with the same arithmetic.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch.fx import Node

from kbtrain.backends.torch.capture.aliasing import AliasAnalysis, aliases
from kbtrain.backends.torch.fusion.order import Effects, collected

aten = torch.ops.aten

LARGEST = 1 << 18
"""Elements of the largest tensor that is put into a list. A larger one takes longer than a launch,
and its operands would have to be kept longer."""

_BINARY = {
    aten.add.Tensor: aten._foreach_add,
    aten.sub.Tensor: aten._foreach_sub,
    aten.mul.Tensor: aten._foreach_mul,
    aten.div.Tensor: aten._foreach_div,
}


def _cast(tensors: list[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    results = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    torch._foreach_copy_(results, tensors)
    return results


def _zeros(like: list[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    results = [torch.empty_like(tensor, dtype=dtype) for tensor in like]
    torch._foreach_zero_(results)
    return results


def _selected(
    condition: torch.Tensor, new: list[torch.Tensor], old: list[torch.Tensor]
) -> list[torch.Tensor]:
    """``where`` for each pair: there is no such operation for lists."""
    flat = [torch.cat([tensor.reshape(-1) for tensor in tensors]) for tensors in (new, old)]
    parts = torch.where(condition, *flat).split([tensor.numel() for tensor in new])
    return [part.view(tensor.shape) for part, tensor in zip(parts, new, strict=True)]


def use_lists(pure: Sequence[Node], late: Sequence[Node], analysis: AliasAnalysis) -> list[Node]:
    """Put small operations of a step into operations over lists.

    Args:
        pure: Operations that do not change the state, in order.
        late: The other operations.
        analysis: The analysis of their graph.

    Returns:
        All operations in a new order.
    """
    pure = _add_in_place(pure, late, analysis)
    first = [node for node in pure if kind_of(node) is not None and _is_of_state(node)]
    early = set(first)
    operations = [*first, *(node for node in pure if node not in early), *late]
    order: list[Node] = []
    for group in collected(operations, Effects(analysis), kind_of, is_free):
        order += group if len(group) == 1 else _as_list(group)
    return order


def _add_in_place(
    pure: Sequence[Node], late: Sequence[Node], analysis: AliasAnalysis
) -> list[Node]:
    """Turn ``x.copy_(x + y)`` into ``x.add_(y)``; return the operations that stay pure."""
    gone = set()
    for node in late:
        if node.target is not aten.copy_.default or node.args[0].op != "placeholder":
            continue
        variable, total = node.args[:2]
        if total.target is not aten.add.Tensor or total.kwargs or list(total.users) != [node]:
            continue
        left, right = total.args
        if left is not variable or not isinstance(right, Node) or total not in analysis.position:
            continue
        values = [each.meta["val"] for each in (variable, right, total)]
        if len(analysis.writes[variable]) > 1 or not _are_like(values, values[0]):
            continue
        if analysis.written_after(right, analysis.position[total]):
            continue
        node.target, node.args = aten.add_.Tensor, (variable, right)
        node.graph.erase_node(total)
        gone.add(total)
    return [node for node in pure if node not in gone]


_IN_PLACE = {
    aten.copy_.default: aten._foreach_copy_.default,
    aten.add_.Tensor: aten._foreach_add_.List,
}


def is_free(node: Node) -> bool:
    """Whether an operation launches nothing: a view, or one of several results."""
    if node.target is operator.getitem:
        return True
    return bool(aliases(node, write=False)) and not aliases(node, write=True)


def _is_of_state(node: Node) -> bool:
    return all(source.op != "call_function" for source in node.all_input_nodes)


def kind_of(node: Node) -> Hashable | None:
    """What operations must have in common to become one over lists; None for others."""
    value, operands = node.meta.get("val"), node.all_input_nodes
    if node.target in _IN_PLACE:
        value = node.args[0].meta.get("val")
    if not isinstance(value, torch.Tensor) or not value.dim() or not value.numel():
        return None
    if value.numel() > LARGEST and node.target is not aten.add_.Tensor:
        return None
    given = [operand.meta.get("val") for operand in operands]
    tensors = [t for t in given if isinstance(t, torch.Tensor) and t.device == value.device]
    if len(tensors) < len(given) or not is_dense(value):
        return None
    target, place = node.target, value.device
    if target in _BINARY and not node.kwargs and value.is_floating_point():
        left, right = node.args
        if not isinstance(left, Node):
            return None
        if isinstance(right, int | float):
            return (target, "number", value.dtype, place) if _are_like(tensors, value) else None
        both = left.meta["val"], right.meta["val"]
        return (target, "tensor", value.dtype, place) if _are_like(both, value) else None
    if target is aten._to_copy.default and list(node.kwargs) == ["dtype"]:
        (source,) = tensors
        same = source.stride() == value.stride()
        return (target, source.dtype, value.dtype, place) if same else None
    if target is aten.zeros_like.default and not {*node.kwargs} - {"pin_memory", "dtype"}:
        return (target, value.dtype, place)
    if target is aten.where.self:
        condition, *sides = node.args
        if condition.meta["val"].dim() or not _are_like([s.meta["val"] for s in sides], value):
            return None
        return (target, condition, value.dtype, place) if value.is_contiguous() else None
    if target in _IN_PLACE and len(operands) == len(node.args) == 2 and not node.kwargs:
        return (target, value.dtype, place) if _are_like(tensors, value) else None
    return None


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether a tensor has its memory for itself, in whatever order of its axes."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


def _are_like(tensors: Sequence[torch.Tensor], value: torch.Tensor) -> bool:
    return all(
        t.shape == value.shape and t.dtype == value.dtype and t.stride() == value.stride()
        for t in tensors
    )


def _as_list(group: list[Node]) -> list[Node]:
    """One operation for those of a group, with a node for each of its results."""
    graph, first = group[0].graph, group[0]
    columns: list[Any] = [list(column) for column in zip(*(n.args for n in group), strict=True)]
    target: Any
    if first.target in _BINARY:
        overloads = _BINARY[first.target]
        if isinstance(columns[1][0], Node):
            target = overloads.List
        elif len({repr(number) for number in columns[1]}) == 1:
            target, columns[1] = overloads.Scalar, columns[1][0]
        else:
            target = overloads.ScalarList
    elif first.target is aten._to_copy.default:
        target, columns = _cast, [columns[0], first.kwargs["dtype"]]
    elif first.target is aten.zeros_like.default:
        target, columns = _zeros, [columns[0], first.meta["val"].dtype]
    elif first.target is aten.where.self:
        target, columns = _selected, [columns[0][0], *columns[1:]]
    else:
        target = _IN_PLACE[first.target]
    with graph.inserting_before(first):
        joined = graph.call_function(target, tuple(columns))
        if first.target in _IN_PLACE:  # the result is the variable
            for node in group:
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)
            return [joined]
        joined.meta["val"] = [node.meta["val"] for node in group]
        results = [graph.call_function(operator.getitem, (joined, i)) for i in range(len(group))]
    for node, result in zip(group, results, strict=True):
        result.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(result)
        graph.erase_node(node)
    return [joined, *results]
