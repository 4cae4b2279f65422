"""Elementwise rules on a GPU: the kernels of `optim.kernels.torch.triton_kernels.source`, launched.

The whole of an update is one operation to PyTorch, ``optim::run_rules``, so that it can be recorded
as a part of a captured training step. It allocates memory with PyTorch's allocator, copies nothing
from the host and reads nothing there, so it can be part of a CUDA graph: pointers reach the device
as arguments of kernels, which a graph keeps.
"""

from __future__ import annotations

import functools
import importlib.util
import linecache
import math
import re
import struct
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from optim.kernels.torch.custom_op import NumberedObjects, define_in_place
from optim.kernels.torch.triton_kernels.coded import lookup_on
from optim.kernels.torch.triton_kernels.source import BLOCK, RuleSource
from optim.kernels.torch.triton_kernels.text import (
    POINTERS,
    fill_source,
    specialized,
    with_pointers,
)

WARPS = 8
"""Warps of a block."""

# Kernels for up to as many tensors are the same.
_FEW = 128
# Tables of pointers that are remembered for each group of tensors: variables seldom move.
_TABLES = 4
_NAMES = ("prepare", "sums_tile", "sums", "totals", "update_tile", "update", "fill")
_OF_CODES = ("restored", "store_coded")


@functools.cache
def is_available() -> bool:
    """Whether Triton is installed; PyTorch brings it along where it has CUDA, on Linux."""
    return importlib.util.find_spec("triton") is not None


@functools.lru_cache(256)
def compiled(source: str) -> dict[str, Any]:
    """The kernels in some source, by name, ready to be launched.

    Args:
        source: Text of functions, all of them Triton's.
    """
    import triton
    import triton.language as tl

    # Triton reads the text of a function again, from the file that it says it is in.
    file = f"<optim {abs(hash(source)):x}>"
    linecache.cache[file] = (len(source), None, source.splitlines(True), file)
    scope: dict[str, Any] = {"tl": tl, "__name__": __name__}
    # As this module is compiled, types of arguments would be text of text, and not read.
    exec(compile(source, file, "exec", dont_inherit=True), scope)
    names = [name for name in scope if name.startswith((*_NAMES, *_OF_CODES))]
    for name in names:
        arguments = scope[name].__code__.co_varnames[: scope[name].__code__.co_argcount]
        # No kernel of its own for pointers that are not multiples of 16, or numbers that are 1.
        plain = [argument for argument in arguments if re.fullmatch(r"p\d+", argument)]
        scope[name] = triton.jit(scope[name], do_not_specialize=plain)
    return {name: scope[name] for name in names}


@dataclass(frozen=True)
class Group:
    """Tensors that are updated by the same kernels, apart from where they are.

    Attributes:
        text: `RuleSource.text`.
        rows: `RuleSource.rows`.
        values: `RuleSource.values`.
        partials: `RuleSource.partials`.
        bytes_per_element: `RuleSource.bytes_per_element`.
        numbers: For every tensor, those of its rule.
        bytes_of_float32: `RuleSource.bytes_of_float32`.
        is_coded: `RuleSource.is_coded`.
        varying: Whether kernels read all numbers, so that others need no other kernels.
    """

    text: str
    rows: int
    values: int
    partials: int
    bytes_per_element: float
    numbers: tuple[tuple[float, ...], ...]
    bytes_of_float32: float = 0.0
    is_coded: bool = False
    varying: bool = False

    @classmethod
    def of(cls, source: RuleSource, numbers: Sequence[Sequence[float]]) -> Group:
        """The tensors of a source."""
        return cls(
            source.text,
            source.rows,
            source.values,
            source.partials,
            source.bytes_per_element,
            tuple(map(tuple, numbers)),
            source.bytes_of_float32,
            source.is_coded,
        )

    @property
    def columns(self) -> tuple[int, ...]:
        """Which numbers are read: those that differ."""
        first = self.numbers[0]
        if self.varying:
            return tuple(range(len(first)))
        return tuple(i for i in range(len(first)) if any(n[i] != first[i] for n in self.numbers))

    def source(self, pointers: int) -> str:
        """The source of the kernels, which get that many pointers to gradients as arguments."""
        text = specialized(self.text, self.numbers[0], self.columns, self.rows)
        return with_pointers(text, pointers)

    def bytes_of(self, sizes: Sequence[int]) -> int:
        """Bytes that an update reads and writes, without the tables.

        Args:
            sizes: The number of elements of each tensor.
        """
        narrow, wide = self.bytes_per_element, self.bytes_of_float32
        coded = [self.is_coded and bool(each[1]) for each in self.numbers]
        return round(
            sum(
                size * (narrow if of_codes or not self.is_coded else wide)
                for size, of_codes in zip(sizes, coded, strict=True)
            )
        )

    @property
    def launches(self) -> int:
        """Kernels of an update."""
        more = math.ceil(max(len(self.numbers) - POINTERS, 0) / POINTERS)
        return 2 + more + 2 * bool(self.partials)


class GroupKernels:
    """Launches the kernels of a group.

    Args:
        group: What they do.
        launch: ``launch(kernel, blocks, *args, **constants)``; None for Triton's own way.
    """

    def __init__(self, group: Group, launch: Callable[..., None] | None = None) -> None:
        count = len(group.numbers)
        self.group, self._launch = group, launch or _launch
        # A few sizes, so that a model with one more variable needs no other kernel.
        self._lanes = max(_FEW, _power_of_two(count))
        self._pointers = _FEW if count <= _FEW else POINTERS
        self._kernels = compiled(group.source(self._pointers))
        self._fill = compiled(fill_source(POINTERS))["fill"]
        self._tables: OrderedDict[tuple[int, ...], torch.Tensor] = OrderedDict()
        self._captured: list[torch.Tensor] = []

    def run(
        self,
        parameters: list[torch.Tensor],
        gradients: list[torch.Tensor],
        slots: list[torch.Tensor],
        step: torch.Tensor,
        learning_rate: torch.Tensor,
        skip: torch.Tensor | None,
        scale: torch.Tensor | None,
    ) -> None:
        """One update, in place.

        Args:
            parameters: Contiguous.
            gradients: Contiguous, of the same shapes.
            slots: As many tensors as there are parameters for each of: the residual, the slots per
                element (codes, then scales; of float32 state the same tensor twice), the scalar
                slots.
            step: float32 scalar.
            learning_rate: float32 scalar.
            skip: float32 scalar, nothing is changed unless it is 0; None to change.
            scale: float32 scalar that the gradients are divided by; None for 1.
        """
        count, group, device = len(parameters), self.group, step.device
        sizes = [p.numel() for p in parameters]
        where = [t.data_ptr() for t in (*parameters, *slots)]
        if group.is_coded:
            where += [lookup_on(device).data_ptr()] * count
        from_where = [g.data_ptr() for g in gradients]
        aligned = not any(at % 16 for at in where) and not any(at % 16 for at in from_where)
        blocks = sum(math.ceil(size / BLOCK) for size in sizes)
        floats: dict[str, Any] = {"dtype": torch.float32, "device": device}
        with _on(device):
            table = self._table(sizes, where, device)
            # `fill` writes as many numbers as it can, wherever it begins.
            noted = torch.empty(count + POINTERS, dtype=torch.int64, device=device)
            values = torch.empty(max(group.values, 1) * count, **floats)
            for at in range(self._pointers, count, POINTERS):
                self._write(noted[at:], from_where[at : at + POINTERS])
            given = from_where[: self._pointers]
            given += [0] * (self._pointers - len(given))
            flagged, scaled = skip is not None, scale is not None
            skip, scale = step if skip is None else skip, step if scale is None else scale
            self._launch(
                self._kernels["prepare"], 1, table, noted, values, step, learning_rate, skip, count,
                *given, N=self._lanes, FLAGGED=flagged,
            )  # fmt: skip
            options = {"N": self._lanes, "BLOCK": BLOCK, "ALIGNED": aligned}
            options |= {"FLAGGED": flagged, "SCALED": scaled, "num_warps": WARPS}
            if group.partials:
                partials = torch.empty(group.partials * max(blocks, 1), **floats)
                if blocks:
                    self._launch(
                        self._kernels["sums"], blocks, table, noted, values, skip, scale, partials,
                        blocks, count, **options,
                    )  # fmt: skip
                self._launch(
                    self._kernels["totals"], count, table, values, partials, skip, count, blocks,
                    BLOCK=BLOCK, FLAGGED=flagged,
                )  # fmt: skip
            if blocks:
                self._launch(
                    self._kernels["update"], blocks, table, noted, values, skip, scale, count,
                    **options,
                )  # fmt: skip

    def _table(self, sizes: list[int], where: list[int], device: torch.device) -> torch.Tensor:
        """The table of all that stays where it is, see `source.py` in this folder."""
        key = (*sizes, *where)
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if key in self._tables:
            table = self._tables[key]
            self._tables.move_to_end(key)
            if capturing and not any(table is t for t in self._captured):
                self._captured.append(table)  # the graph reads it as long as it lives
            return table
        firsts = [0]
        for size in sizes[:-1]:
            firsts.append(firsts[-1] + math.ceil(size / BLOCK))
        columns = [
            struct.unpack("i", struct.pack("f", numbers[i]))[0]
            for i in self.group.columns
            for numbers in self.group.numbers
        ]
        rows = [*firsts, *sizes, *where, *columns]
        table = torch.empty(len(rows) + POINTERS, dtype=torch.int64, device=device)
        for at in range(0, len(rows), POINTERS):
            self._write(table[at:], rows[at : at + POINTERS])
        if not capturing:  # else it is the graph's memory
            self._tables[key] = table
            if len(self._tables) > _TABLES:
                self._tables.popitem(last=False)
        return table

    def _write(self, table: torch.Tensor, numbers: list[int]) -> None:
        padded = [*numbers, *[0] * (POINTERS - len(numbers))]
        self._launch(self._fill, 1, table, *padded)


def _launch(kernel: Any, blocks: int, *args: Any, **constants: Any) -> None:
    # Without fused operations the numbers are those of PyTorch's operations, one by one.
    kernel[(blocks,)](*args, **constants, enable_fp_fusion=False)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _power_of_two(count: int) -> int:
    return 1 << max(count - 1, 0).bit_length()


# ---- one operation for PyTorch -------------------------------------------------------------------

_GROUPS: NumberedObjects[GroupKernels] = NumberedObjects()


# Numbers for which a rule gets kernels of its own: more are a schedule of a hyperparameter.
_MOST_NUMBERS = 8
_WRITTEN: weakref.WeakKeyDictionary[Any, dict[Any, set[Any]]] = weakref.WeakKeyDictionary()


def with_few_kernels(rule: Any, group: Group) -> Group:
    """The group, whose kernels read all numbers if the rule had many others before.

    Args:
        rule: One of its rules.
        group: The group.
    """
    columns = set(group.columns)
    numbers = tuple(x for i, x in enumerate(group.numbers[0]) if i not in columns)
    written = _WRITTEN.setdefault(rule, {}).setdefault((group.text, *sorted(columns)), set())
    if numbers not in written and len(written) >= _MOST_NUMBERS:
        return replace(group, varying=True)
    written.add(numbers)
    return group


def number_of(rule: Any, group: Group) -> int:
    """The number by which the operation knows a group.

    Args:
        rule: One of its rules.
        group: The group.
    """
    return _GROUPS.number(rule, group, lambda: GroupKernels(with_few_kernels(rule, group)))


def launches(group: int) -> int:
    """Kernels that one call of ``optim::run_rules`` launches."""
    number: int = _GROUPS[group].group.launches
    return number


def bytes_of(parameters: Sequence[torch.Tensor], group: int) -> int:
    """Bytes that one call of ``optim::run_rules`` reads and writes, without the tables."""
    number: int = _GROUPS[group].group.bytes_of([p.numel() for p in parameters])
    return number


def _run(
    parameters: list[torch.Tensor],
    gradients: list[torch.Tensor],
    slots: list[torch.Tensor],
    step: torch.Tensor,
    learning_rate: torch.Tensor,
    group: int,
    grad_scale: torch.Tensor | None = None,
    found_inf: torch.Tensor | None = None,
) -> None:
    _GROUPS[group].run(parameters, gradients, slots, step, learning_rate, found_inf, grad_scale)


define_in_place(
    "run_rules(Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[] slots, Tensor step, "
    "Tensor learning_rate, int group, *, Tensor? grad_scale=None, Tensor? found_inf=None) "
    "-> ()",
    _run,
)
