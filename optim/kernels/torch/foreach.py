"""Operations of a recorded rule on lists of tensors, by PyTorch's ``_foreach`` functions.

For a GPU where Triton is not installed: an operation is launched for a list, not for each tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.fx import Node

from optim.kernels.torch.codegen import SAME, name_of

_WITH_SCALARS = ("add", "mul", "div")
_COMMUTE = ("add", "mul")
_LISTS = ("add", "sub", "mul", "div", "sqrt", "rsqrt", "neg", "abs", "sign", "reciprocal", "exp")


def evaluate(nodes: Sequence[Node], known: dict[Any, Any]) -> dict[Any, Any]:
    """The values of nodes, each a list of tensors; what is needed no more is let go.

    Args:
        nodes: Operations, in order.
        known: Values of the nodes they need: lists of tensors, or scalars.

    Returns:
        ``known`` with the last values of the nodes.
    """
    last = {argument: node for node in nodes for argument in node.all_input_nodes}
    for node in nodes:
        args = torch.fx.node.map_arg(node.args, known.__getitem__)
        known[node] = _on_lists(node, list(args))
        for argument in node.all_input_nodes:
            if last[argument] is node and not argument.users.keys() - set(nodes):
                known.pop(argument, None)
    return known


def _on_lists(node: Node, args: list[Any]) -> list[torch.Tensor]:
    name = name_of(node)
    if name in SAME:
        return list(args[0])
    if name in _COMMUTE and not isinstance(args[0], list):
        args.reverse()
    if name in _LISTS and isinstance(args[0], list) and not node.kwargs:
        other = args[1] if len(args) > 1 else None
        if not torch.is_tensor(other) or name in _WITH_SCALARS:
            result: list[torch.Tensor] = list(getattr(torch, f"_foreach_{name}")(*args))
            return result
    count = max(len(a) for a in args if isinstance(a, list))
    each = [a if isinstance(a, list) else [a] * count for a in args]
    operation: Any = node.target
    return [operation(*values, **node.kwargs) for values in zip(*each, strict=True)]


def parts(sizes: Sequence[int], most: int) -> Iterator[slice]:
    """Consecutive tensors with at most so many elements together, or a single larger one."""
    start = total = 0
    for i, size in enumerate(sizes):
        if i > start and total + size > most:
            yield slice(start, i)
            start, total = i, 0
        total += size
    if start < len(sizes):
        yield slice(start, len(sizes))
