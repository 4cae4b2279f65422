"""What a compiled XLA program does, read from its text: collectives, their bytes, and their order.

Only the text of a scheduled module (``compiled.as_text()``) is read, so that programs for devices
that are not there can be read, too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4,
    "f32": 4, "s64": 8, "u64": 8, "f64": 8,
}  # fmt: skip

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
_IOTA_GROUPS = re.compile(r"replica_groups=\[(\d+),(\d+)\]")
_GROUPS = re.compile(r"replica_groups=\{\{([\d,]+)\}")
_WORK = frozenset({"fusion", "convolution", "dot", "custom-call", "while", "conditional", "sort"})
_TRIVIAL_CALLS = ("AllocateBuffer", "AssumeGatherIndicesInBound", "Sharding")


@dataclass(frozen=True)
class Collective:
    """An operation between devices.

    Attributes:
        kind: One of ``KINDS``.
        size: Bytes of the whole value: what is added up, gathered or scattered.
        group: Number of devices that take part together.
        loops: Number of loops that it is in.
        overlapped: Pieces of work (fusions, products, kernels) between its start and its end; None
            if the device waits for it.
        scalar: Whether its largest array has a single element.
    """

    kind: str
    size: int
    group: int
    loops: int
    overlapped: int | None
    scalar: bool

    @property
    def sent(self) -> float:
        """Bytes that each device sends, at least: those of a ring."""
        if self.kind == "collective-permute":
            return self.size
        once = self.size * (self.group - 1) / self.group
        return 2 * once if self.kind == "all-reduce" else once


@dataclass(frozen=True)
class Instruction:
    name: str
    shape: str
    operation: str
    rest: str


class Program:
    """A module of XLA, as text.

    Args:
        text: The text of the scheduled module.
        devices: Number of devices, the size of a group that is not listed.
    """

    def __init__(self, text: str, devices: int) -> None:
        self.text, self.devices = text, devices
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        current: list[Instruction] = []
        for line in text.splitlines():
            if found := _COMPUTATION.match(line):
                current = self.computations.setdefault(found[1], [])
                if line.startswith("ENTRY"):
                    self.entry = found[1]
            elif found := _INSTRUCTION.match(line):
                current.append(Instruction(*found.groups()))

    def loop_depths(self) -> dict[str, int]:
        """For each computation that runs, the number of loops around it."""
        depths: dict[str, int] = {}
        waiting = [(self.entry, 0)]
        while waiting:
            name, depth = waiting.pop()
            if depths.get(name, -1) >= depth:
                continue
            depths[name] = depth
            for instruction in self.computations.get(name, []):
                inner = depth + (instruction.operation == "while")
                waiting += [(called, inner) for called in _called(instruction.rest)]
        return depths

    def collectives(self) -> list[Collective]:
        """All collectives, in the order of their computations."""
        depths = self.loop_depths()
        return [
            each
            for name, instructions in self.computations.items()
            if name in depths
            for each in self._collectives(instructions, depths[name])
        ]

    def _collectives(self, instructions: list[Instruction], loops: int) -> Iterator[Collective]:
        for i, instruction in enumerate(instructions):
            kind, start = self._kind(instruction)
            if kind is None:
                continue
            overlapped = _work_until_done(instructions, i) if start else None
            sizes = _sizes(instruction.shape)
            if start and len(sizes) > 1 and kind != "all-reduce":
                sizes = sizes[len(sizes) // 2 :] or sizes  # a start returns operands and results
            size = sum(bytes_ for bytes_, _ in sizes)
            group = self._group(instruction.rest)
            if kind == "reduce-scatter":
                size *= group
            largest = max((elements for _, elements in sizes), default=0)
            yield Collective(kind, size, group, loops, overlapped, largest <= 1)

    def _kind(self, instruction: Instruction) -> tuple[str | None, bool]:
        """The kind of a collective, None for other instructions, and whether it only starts it."""
        operation = instruction.operation
        start = operation.endswith("-start")
        base = operation.removesuffix("-start")
        if base in KINDS:
            return base, start
        if base == "async":
            for called in _called(instruction.rest):
                for inner in self.computations.get(called, []):
                    if inner.operation in KINDS:
                        return inner.operation, start
        return None, False

    def _group(self, rest: str) -> int:
        if found := _IOTA_GROUPS.search(rest):
            return int(found[2])
        if found := _GROUPS.search(rest):
            return found[1].count(",") + 1
        return self.devices

    def host_transfers(self) -> list[str]:
        """Instructions that exchange data with the host."""
        found = []
        for instructions in self.computations.values():
            for each in instructions:
                fed = each.operation in ("infeed", "outfeed")
                called = each.operation == "custom-call" and "callback" in each.rest
                if fed or called or "is_host_transfer=true" in each.rest:
                    found.append(each.name)
        return found

    def donated(self) -> int:
        """The number of results that take the memory of an argument."""
        header = self.text.split("\n", 1)[0]
        return len(re.findall(r"(?:may|must)-alias", header))


def _called(rest: str) -> list[str]:
    found = _CALLED.findall(rest)
    for branches in _BRANCHES.findall(rest):
        found += [name.strip().lstrip("%") for name in branches.split(",")]
    return found


def _sizes(shape: str) -> list[tuple[int, int]]:
    """Bytes and elements of each array in a shape."""
    result = []
    for dtype, dimensions in _ARRAY.findall(shape):
        if dtype in BYTES:
            elements = math.prod(int(d) for d in dimensions.split(",") if d)
            result.append((elements * BYTES[dtype], elements))
    return result


def _work_until_done(instructions: list[Instruction], start: int) -> int:
    """The number of pieces of work between the start of a collective and its end."""
    name, between = instructions[start].name, 0
    pattern = re.compile(rf"%{re.escape(name)}[),]")
    for instruction in instructions[start + 1 :]:
        done = instruction.operation.endswith("-done") or instruction.operation == "async-done"
        if done and pattern.search(f"{instruction.rest}"):
            break
        if instruction.operation in _WORK and not any(
            t in instruction.rest for t in _TRIVIAL_CALLS
        ):
            between += 1
    return between
