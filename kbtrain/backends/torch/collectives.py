"""PyTorch: what processes exchange inside a step.

The functional collectives are used, which can be recorded. Tensors travel in buckets: each is one
flat tensor, and the reduction of gradients starts as soon as their bucket is complete
(``capture.overlap``). Afterwards the gradients are views of the buckets.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from kbtrain.backends.buckets import BUCKET_BYTES, Parts, buckets_of, parts_of
from kbtrain.backends.collective_check import about_to

_bucket_bytes = BUCKET_BYTES

_c10d = torch.ops._c10d_functional


@contextlib.contextmanager
def bucket_size(megabytes: float | None) -> Iterator[None]:
    """Context in which buckets have this size at most; None is the default."""
    global _bucket_bytes
    before = _bucket_bytes
    _bucket_bytes = BUCKET_BYTES if megabytes is None else int(megabytes * (1 << 20))
    try:
        yield
    finally:
        _bucket_bytes = before


def shards() -> int:
    """The number of processes, each of which sees its rows of a batch."""
    if not dist.is_available() or not dist.is_initialized():
        return 1
    size: int = dist.get_world_size()
    return size


def all_sum(tensors: Sequence[Any]) -> list[Any]:
    """The sums over all processes of each tensor, in buckets of one dtype."""
    tensors = list(tensors)
    if shards() == 1 or not tensors:
        return tensors
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return list(_Sum.apply(*tensors))
    return _bucketed_sum(tensors)


class _Sum(torch.autograd.Function):  # type: ignore[misc]
    """A sum over processes; its gradient is the sum of their gradients."""

    @staticmethod
    def forward(ctx: Any, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(_bucketed_sum(list(tensors)))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(_bucketed_sum(list(gradients)))


def _bucketed_sum(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    started: list[tuple[list[int], torch.Tensor]] = []
    for indices in _buckets(tensors):
        flat = torch.cat([tensors[i].detach().reshape(-1) for i in indices])
        started.append((indices, _start_sum(flat)))
    results: list[Any] = [None] * len(tensors)
    for indices, flat in started:
        for i, part in zip(indices, _split(_wait(flat), tensors, indices), strict=True):
            results[i] = part
    return results


def _buckets(tensors: list[torch.Tensor]) -> list[list[int]]:
    sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
    return buckets_of([tensor.dtype for tensor in tensors], sizes, _bucket_bytes)


def _start_sum(flat: torch.Tensor) -> torch.Tensor:
    if flat.dtype in (torch.bool, torch.uint8, torch.int8, torch.int16):
        raise TypeError(f"A sum over processes needs a wider type than {flat.dtype}.")
    _announce("all_sum", flat)
    result: torch.Tensor = _c10d.all_reduce_(flat, "sum", _group_name())
    return result


def _announce(name: str, tensor: torch.Tensor) -> None:
    about_to(name, tensor.shape, str(tensor.dtype).removeprefix("torch."))


def _wait(tensor: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = _c10d.wait_tensor(tensor)
    return result


def _group_name() -> str:
    name: str = dist.group.WORLD.group_name
    return name


def all_gather(tensors: Sequence[Any]) -> list[Any]:
    """Each tensor of all processes along a new first axis."""
    if shards() == 1:
        return [tensor.unsqueeze(0) for tensor in tensors]
    started = [
        _start_gather(_sendable(tensor.detach()).contiguous().reshape(-1)) for tensor in tensors
    ]
    return [
        _wait(flat).view(shards(), *tensor.shape).to(tensor.dtype)
        for flat, tensor in zip(started, tensors, strict=True)
    ]


def _start_gather(flat: torch.Tensor) -> torch.Tensor:
    _announce("all_gather", flat)
    result: torch.Tensor = _c10d.all_gather_into_tensor(flat, shards(), _group_name())
    return result


def _sendable(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor


# --- variables with owners ------------------------------------------------------------------------


def sum_to_owners(tensors: Sequence[Any], owners: Sequence[int]) -> list[Any]:
    """The sums over all processes of the tensors that this one owns; None for the others."""
    tensors, rank = [tensor.detach() for tensor in tensors], dist.get_rank()
    started: list[tuple[list[int], torch.Tensor]] = []
    for indices in _buckets(tensors):
        parts = _parts(tensors, owners, indices)
        if parts.is_balanced:
            flat = torch.cat([_row(tensors, parts, owner) for owner in range(shards())])
            _announce("sum_to_owners", flat)
            result = _c10d.reduce_scatter_tensor(flat, "sum", shards(), _group_name())
            started.append((parts.indices[rank], result))
        else:
            flat = torch.cat([tensors[i].reshape(-1) for i in indices])
            started.append((indices, _start_sum(flat)))
    results: list[Any] = [None] * len(tensors)
    for indices, flat in started:
        for i, part in zip(indices, _split(_wait(flat), tensors, indices), strict=True):
            if owners[i] == rank:
                results[i] = part
    return results


def gather_from_owners(tensors: Sequence[Any], owners: Sequence[int]) -> list[Any]:
    """Each tensor as its owner has it; shape and dtype are the same on all processes."""
    tensors, rank = [tensor.detach() for tensor in tensors], dist.get_rank()
    started: list[tuple[list[list[int]], int, torch.Tensor]] = []
    for indices in _buckets(tensors):
        parts = _parts(tensors, owners, indices)
        if parts.is_balanced:
            row = _row(tensors, parts, rank)
            started.append((parts.indices, parts.width, _start_gather(row)))
            continue
        for owner, part in enumerate(parts.indices):
            if part:
                row = torch.cat([tensors[i].reshape(-1) for i in part])
                _announce(f"broadcast from {owner}", row)
                flat = _c10d.broadcast_(row, owner, _group_name())
                started.append(([part], row.numel(), flat))
    results = list(tensors)
    for indices_of, width, flat in started:
        for part, row in zip(indices_of, _wait(flat).view(len(indices_of), width), strict=True):
            for i, value in zip(part, _split(row, tensors, part), strict=True):
                if owners[i] != rank:
                    results[i] = value
    return results


def _parts(tensors: Sequence[torch.Tensor], owners: Sequence[int], indices: Sequence[int]) -> Parts:
    return parts_of(indices, owners, [tensor.numel() for tensor in tensors], shards())


def _row(tensors: Sequence[torch.Tensor], parts: Parts, owner: int) -> torch.Tensor:
    """The tensors of one owner as a flat one, filled up to the width of the others."""
    missing = parts.width - parts.sizes[owner]
    first = next(tensors[i] for part in parts.indices for i in part)
    filling = [first.new_zeros(missing)] if missing else []
    return torch.cat([*(tensors[i].reshape(-1) for i in parts.indices[owner]), *filling])


def _split(
    flat: torch.Tensor, like: Sequence[torch.Tensor], indices: Sequence[int]
) -> list[torch.Tensor]:
    """Views of the beginning of a flat tensor in the shapes of others."""
    sizes = [like[i].numel() for i in indices]
    pieces = torch.split(flat, [*sizes, flat.numel() - sum(sizes)])[: len(sizes)]
    return [piece.view(like[i].shape) for piece, i in zip(pieces, indices, strict=True)]
