"""What a rule computes now and then, as one operation that decides when it runs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from optim.kernels.torch.custom_op import LIBRARY

_COMPUTE: list[Callable[[Any, Any], Any]] = []

# It looks at a value; PyTorch has a mark for what no CUDA graph can hold since 2.9.
_MARKS = tuple(filter(None, [getattr(torch.Tag, "cudagraph_unsafe", None)]))
LIBRARY.define(
    "refresh(Tensor due, Tensor operand, Tensor current, int compute) -> Tensor", tags=_MARKS
)


def _refresh(
    due: torch.Tensor, operand: torch.Tensor, current: torch.Tensor, compute: int
) -> torch.Tensor:
    # A result has memory of its own, as PyTorch demands of an operation.
    if not due:
        return current.clone()
    return _COMPUTE[compute](operand, current).contiguous()


LIBRARY.impl("refresh", _refresh, "CompositeExplicitAutograd")
torch.library.register_fake(
    "optim::refresh",
    lambda due, operand, current, compute: torch.empty_like(current),
    lib=LIBRARY,
)


def _refresh_stack(
    info: Any, dims: tuple[Any, ...], due: Any, operand: Any, current: Any, compute: int
) -> tuple[Any, int]:
    """The same for a stack of matrices: all are due, or none."""
    one, stacked = _COMPUTE[compute], []
    for x, dim in zip((operand, current), dims[1:3], strict=True):
        x = x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
        stacked.append(x)
    return refresh(due, _on_stacks(one), *stacked), 0


@functools.cache
def _on_stacks(compute: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda operand, current: torch.vmap(compute)(operand, current)


torch.library.register_vmap("optim::refresh", _refresh_stack, lib=LIBRARY)


def refresh(due: Any, compute: Callable[[Any, Any], Any], operand: Any, current: Any) -> Any:
    """``compute(operand, current)`` if it is due, else ``current``.

    One operation to PyTorch, so that it can be a part of a captured step: it decides when it runs,
    not when it is recorded. On a GPU that waits for the device.
    """
    if compute not in _COMPUTE:
        _COMPUTE.append(compute)
    return torch.ops.optim.refresh(due, operand, current, _COMPUTE.index(compute))
