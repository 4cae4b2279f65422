"""The norm of all gradients in three kernels of Triton, however large they are.

PyTorch's norm of a list launches a kernel for every hundred tensors or 320 pieces, then one for the
sums of each tensor, and the norms of the tensors are stacked and taken together. Here the pointers
reach the device as arguments of a kernel that writes them into a table; another one has a block for
every `CHUNK` elements of all tensors, and stores the sum of its squares; the last one adds these.
The order of the additions depends on the shapes alone, so the result is the same in every run.

Nothing is copied from the host or read there, so it can be part of a CUDA graph.
"""

from __future__ import annotations

import contextlib
import functools
import math
import operator
from collections.abc import Sequence

import torch
from torch.fx import Node

from kbtrain.backends.torch.device import is_oom
from kbtrain.backends.torch.fusion.lists import is_dense
from kbtrain.backends.torch.fusion.scalar_kernel import are_close, compiled, is_capturing
from kbtrain.utils.fallback import PrivateApi

aten = torch.ops.aten

POINTERS = 448
"""Most pointers that a kernel gets as arguments: with the others they are less than 4 KiB."""

BLOCK = 2048
CHUNK = 8 * BLOCK
"""Elements of a block, which adds ``BLOCK`` of them at a time."""

WARPS = 8

_TYPES = {
    torch.float32: "tl.float32",
    torch.bfloat16: "tl.bfloat16",
    torch.float16: "tl.float16",
    torch.float64: "tl.float64",
}

_HEAD = """\
import triton
import triton.language as tl


"""

_SUMS = """\
@triton.jit
def kernel(table, layout, partials, n, N: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
           ALIGNED: tl.constexpr):
    pid = tl.program_id(0)
    every = tl.arange(0, N)
    firsts = tl.load(layout + every, mask=every < n, other=2147483647)
    t = tl.sum((firsts <= pid).to(tl.int32), axis=0) - 1
    begin = (pid - tl.load(layout + t)) * CHUNK
    size = tl.load(layout + n + t)
    end = tl.minimum(begin + CHUNK, size)
    kind = tl.load(layout + 2 * n + t)
    at = tl.load(table + t)
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), WIDE)
"""

_PART = """\
    if kind == {kind}:
        source = at.to(tl.pointer_type({type}))
        if ALIGNED:
            source = tl.multiple_of(source, 16)
        for i in tl.range(begin, end, BLOCK):
            x = tl.load(source + i + lanes, mask=i + lanes < end, other=0.0).to(WIDE)
            total += x * x
"""

_TOTAL = """\
@triton.jit
def kernel(partials, out, count, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), WIDE)
    for i in tl.range(0, count, BLOCK):
        total += tl.load(partials + i + lanes, mask=i + lanes < count, other=0.0)
    tl.store(out, ROOT(tl.sum(total, axis=0)))
"""


def fill_text(count: int) -> str:
    """A kernel that writes its arguments into a table."""
    names = [f"p{i}" for i in range(count)]
    arguments = ", ".join(f'{name}: "i64"' for name in names)
    lines = [
        # As they are: no kernel of its own for numbers that are 1 or multiples of 16.
        f"@triton.jit(do_not_specialize={names})",
        f"def kernel(table, {arguments}):",
        *(f"    tl.store(table + {i}, {name})" for i, name in enumerate(names)),
    ]
    return _HEAD + "\n".join(lines) + "\n"


def sums_text(dtypes: Sequence[torch.dtype], wide: torch.dtype) -> str:
    """The kernel that adds up the squares of a block.

    Args:
        dtypes: Those of the tensors, without repetition; the table has their positions here.
        wide: In which squares are added.
    """
    parts = [_PART.format(kind=i, type=_TYPES[dtype]) for i, dtype in enumerate(dtypes)]
    end = "    tl.store(partials + pid, tl.sum(total, axis=0))\n"
    return (_HEAD + _SUMS + "".join(parts) + end).replace("WIDE", _TYPES[wide])


def total_text(wide: torch.dtype) -> str:
    """The kernel that adds up the sums of all blocks and takes the root."""
    root = "tl.sqrt_rn" if wide is torch.float32 else "tl.sqrt"
    return (_HEAD + _TOTAL).replace("WIDE", _TYPES[wide]).replace("ROOT", root)


_compiled = functools.lru_cache(64)(compiled)


class GlobalNorm:
    """The Euclidean norm over all elements of some tensors, as a function of their list.

    Args:
        tensors: Tensors of the shapes and dtypes that it will get, without memory or with it.
        dtype: float32 or float64: of the sums and the result.

    Attributes:
        launches: Kernels of a call.
    """

    __name__ = "global_norm"

    def __init__(self, tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> None:
        self._dtype, self._count = dtype, len(tensors)
        self._width = min(POINTERS, max(16, _power_of_two(self._count)))
        kinds = list(dict.fromkeys(t.dtype for t in tensors))
        sizes = [t.numel() for t in tensors]
        firsts, self._blocks = [], 0
        for size in sizes:
            firsts.append(self._blocks)
            self._blocks += math.ceil(size / CHUNK)
        self._rows = [*firsts, *sizes, *(kinds.index(t.dtype) for t in tensors)]
        self._kinds = kinds
        self._layout: torch.Tensor | None = None
        self.launches = math.ceil(self._count / self._width) + bool(self._blocks) + 1
        self._run = PrivateApi(
            "Taking the norm of all gradients in a kernel",
            "triton",
            self._launch,
            self._plain,
            "It is put together of the norms of the tensors.",
            passes=is_oom,
        )
        self._is_checked = False

    def __call__(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """The norm."""
        norm: torch.Tensor = self._run(tensors)
        return norm

    def _plain(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        norms = [torch.linalg.vector_norm(t, dtype=self._dtype) for t in tensors]
        result: torch.Tensor = torch.linalg.vector_norm(torch.stack(norms))
        return result

    def _launch(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        found = self._compute(tensors)
        if not self._is_checked and not is_capturing(found.device):
            if not are_close(found, self._plain(tensors)):
                raise RuntimeError("it is not that of the operations")
            self._is_checked = True
        return found

    def _compute(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        # What has gaps in memory gets memory of its own.
        tensors = [t if t.is_contiguous() or is_dense(t) else t.contiguous() for t in tensors]
        device = tensors[0].device
        where = [t.data_ptr() for t in tensors]
        # Triton launches on the current device.
        place = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
        with place:
            layout = self._layout_on(device)
            table = self._table(where, device)
            partials = torch.empty(max(self._blocks, 1), dtype=self._dtype, device=device)
            if self._blocks:
                sums = _compiled(sums_text(self._kinds, self._dtype))
                sums[(self._blocks,)](
                    *(table, layout, partials, self._count),
                    N=max(128, _power_of_two(self._count)),
                    BLOCK=BLOCK,
                    CHUNK=CHUNK,
                    ALIGNED=not any(at % 16 for at in where),
                    num_warps=WARPS,
                    enable_fp_fusion=False,
                )
            out = torch.empty((), dtype=self._dtype, device=device)
            total = _compiled(total_text(self._dtype))
            total[(1,)](
                *(partials, out, self._blocks),
                BLOCK=BLOCK,
                num_warps=WARPS,
                enable_fp_fusion=False,
            )
        return out

    def _layout_on(self, device: torch.device) -> torch.Tensor:
        """For every tensor its first block, its size and its dtype; they never change."""
        if self._layout is not None and self._layout.device == device:
            return self._layout
        layout = self._table(self._rows, device)
        if not is_capturing(device):  # else it is the memory of the graph
            self._layout = layout
        return layout

    def _table(self, numbers: Sequence[int], device: torch.device) -> torch.Tensor:
        fill = _compiled(fill_text(self._width))
        # The kernel writes as many numbers as it can, wherever it begins.
        table = torch.empty(len(numbers) + self._width, dtype=torch.int64, device=device)
        for at in range(0, len(numbers), self._width):
            given = list(numbers[at : at + self._width])
            fill[(1,)](table[at:], *given, *[0] * (self._width - len(given)), num_warps=1)
        return table


def _power_of_two(count: int) -> int:
    return 1 << max(count - 1, 0).bit_length()


# --- finding it in a step -------------------------------------------------------------------------


def use_norm_kernel(operations: Sequence[Node], kind: str) -> list[Node]:
    """Put the kernels in place of the norm of a list of norms.

    Args:
        operations: The operations of a step, in order.
        kind: The type of the devices whose norms are changed.

    Returns:
        Operations with the same results, in order.
    """
    order = list(operations)
    for norm in operations:
        found = _norms_of(norm, kind)
        if found is None:
            continue
        norms, stack = found
        tensors = [node.meta["val"] for node in norms.args[0]]
        graph, dtype = norm.graph, norm.meta["val"].dtype
        with graph.inserting_before(norms):
            joined = graph.call_function(GlobalNorm(tensors, dtype), (list(norms.args[0]),))
        joined.meta.update(norm.meta)
        norm.replace_all_uses_with(joined)
        # Where the gradients were read before: they may be overwritten later.
        order[order.index(norms)] = joined
        gone = [norm, stack, *stack.args[0]]
        for node in (*gone, norms):
            graph.erase_node(node)
        order = [node for node in order if node not in set(gone)]
    return order


def _norms_of(norm: Node, kind: str) -> tuple[Node, Node] | None:
    """The norms of a list, and their stack, if that is what an operation takes the norm of."""
    if norm.target is not aten.linalg_vector_norm.default or len(norm.args) > 1 or norm.kwargs:
        return None
    (stack,) = norm.args
    if stack.target is not aten.stack.default or list(stack.users) != [norm]:
        return None
    if len(stack.args) > 1 or stack.kwargs:
        return None
    parts = stack.args[0]
    if not parts or any(part.target is not operator.getitem for part in parts):
        return None
    norms = parts[0].args[0]
    if norms.target is not aten._foreach_norm.Scalar or norms.kwargs:
        return None
    if set(parts) != set(norms.users) or any(list(part.users) != [stack] for part in parts):
        return None
    if [part.args for part in parts] != [(norms, i) for i in range(len(norms.args[0]))]:
        return None
    values = [node.meta["val"] for node in norms.args[0]]
    if norms.args[1] != 2 or any(v.dtype not in _TYPES for v in values):
        return None
    wide = norm.meta["val"].dtype
    if wide not in (torch.float32, torch.float64) or parts[0].meta["val"].dtype is not wide:
        return None
    devices = {v.device for v in values}
    return (norms, stack) if len(devices) == 1 and values[0].device.type == kind else None
