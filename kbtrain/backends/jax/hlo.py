"""What a compiled XLA program does, read from its text: collectives, bytes, and their order.

Only the text of a scheduled module (``compiled.as_text()``) is read, so that programs for devices
that are not there can be read, too.
"""

from __future__ import annotations

import functools
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
_ROUNDS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_OPERAND = re.compile(r"%([\w.\-]+)")
_IOTA_GROUPS = re.compile(r"replica_groups=\[(\d+),(\d+)\]")
_GROUPS = re.compile(r"replica_groups=\{\{([\d,]+)\}")
_WORK = frozenset({"fusion", "convolution", "dot", "custom-call", "while", "conditional", "sort"})
_CONTROL = frozenset({"while", "conditional", "call"})
_FREE = _CONTROL | {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
    *("partition-id", "replica-id"),
}
_SLICING = frozenset({"dynamic-slice", "gather", "slice"})
_UPDATING = {"dynamic-update-slice": 1, "scatter": 2}  # and which operand is what they write
_TRIVIAL_CALLS = ("AllocateBuffer", "AssumeGatherIndicesInBound", "Sharding")


@dataclass(frozen=True)
class Collective:
    """An operation between devices.

    Attributes:
        kind: One of ``KINDS``.
        size: Bytes of the whole value: what is added up, gathered or scattered.
        group: Number of devices that take part together.
        loops: Number of loops that it is in.
        rounds: How often it runs, as far as the lengths of these loops are known.
        overlapped: Pieces of work (fusions, products, kernels) between its start and its end; None
            if the device waits for it.
        scalar: Whether its largest array has a single element.
    """

    kind: str
    size: int
    group: int
    loops: int
    rounds: int
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
    """A line of a computation: its name, the shape of its result, what it does and to what."""

    name: str
    shape: str
    operation: str
    rest: str

    @functools.cached_property
    def operands(self) -> list[str]:
        """The names of its operands."""
        depth = 1
        for end, character in enumerate(self.rest):
            depth += (character == "(") - (character == ")")
            if depth == 0:
                return _OPERAND.findall(self.rest[:end])
        return _OPERAND.findall(self.rest)

    @property
    def bytes(self) -> int:
        """The size of its result."""
        return sum(size for size, _ in _sizes(self.shape))


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

    def loops(self) -> dict[str, tuple[int, int]]:
        """For each computation that runs, the number of loops around it, and their rounds."""
        found: dict[str, tuple[int, int]] = {}
        waiting = [(self.entry, 0, 1)]
        while waiting:
            name, depth, rounds = waiting.pop()
            if found.get(name, (-1, 0)) >= (depth, rounds):
                continue
            found[name] = depth, rounds
            for instruction in self.computations.get(name, []):
                inner, times = depth, rounds
                if instruction.operation == "while":
                    inner += 1
                    times *= int(known[1]) if (known := _ROUNDS.search(instruction.rest)) else 1
                waiting += [(called, inner, times) for called in _called(instruction.rest)]
        return found

    def kernels(self) -> list[Instruction]:
        """The instructions that are work of their own, each once, however often it runs."""
        return [each for each in self._running() if _is_work(each)]

    def host_waits(self) -> list[str]:
        """Loops of unknown length, and branches: the host of a GPU asks the device how to go on."""
        return [
            each.name
            for each in self._running()
            if each.operation == "conditional"
            or (each.operation == "while" and not _ROUNDS.search(each.rest))
        ]

    def _running(self) -> Iterator[Instruction]:
        """The instructions that run, without the insides of kernels."""
        loops, inside = self.loops(), self._inside_kernels()
        for name, instructions in self.computations.items():
            if name in loops and name not in inside:
                yield from instructions

    def collectives(self) -> list[Collective]:
        """All collectives, in the order of their computations."""
        loops = self.loops()
        return [
            each
            for name, instructions in self.computations.items()
            if name in loops
            for each in self._collectives(instructions, *loops[name])
        ]

    def sent(self) -> dict[str, tuple[int, int]]:
        """For each kind of collective how often it runs, and the bytes that each device sends."""
        found: dict[str, tuple[int, int]] = {}
        for each in self.collectives():
            count, size = found.get(each.kind, (0, 0))
            found[each.kind] = count + each.rounds, size + int(each.rounds * each.sent)
        return found

    def bytes_accessed(self) -> int:
        """The bytes that all kernels read and write, each time that they run.

        A fusion reads its operands once, of those that it only takes slices or rows from, these.
        """
        loops = self.loops()
        inside = self._inside_kernels()
        return sum(
            loops[name][1] * self._bytes_accessed(instructions)
            for name, instructions in self.computations.items()
            if name in loops and name not in inside
        )

    def _inside_kernels(self) -> set[str]:
        """The computations that are part of a kernel, not a list of kernels."""
        found: set[str] = set()
        waiting = [
            called
            for instructions in self.computations.values()
            for each in instructions
            if each.operation not in _CONTROL
            for called in _called(each.rest)
        ]
        while waiting:
            name = waiting.pop()
            if name not in found:
                found.add(name)
                for each in self.computations.get(name, []):
                    waiting += _called(each.rest)
        return found

    def _bytes_accessed(self, instructions: list[Instruction]) -> int:
        sizes = {each.name: each.bytes for each in instructions}
        return sum(sum(self._transfers(each, sizes)) for each in instructions if _is_work(each))

    def _transfers(self, each: Instruction, sizes: dict[str, int]) -> tuple[int, int]:
        """The bytes that an instruction reads and writes."""
        written = sizes[each.name]
        if each.operation in _SLICING:
            return written, written
        if each.operation in _UPDATING:
            update = sizes.get(each.operands[_UPDATING[each.operation]], 0)
            return update, update
        read = [sizes.get(name, 0) for name in each.operands]
        called = _called(each.rest) if each.operation == "fusion" else []
        body = self.computations.get(called[0], []) if called else []
        users: dict[str, list[Instruction]] = {}
        for inner in body:
            for name in dict.fromkeys(inner.operands):
                users.setdefault(name, []).append(inner)
        inner_sizes = {inner.name: inner.bytes for inner in body}
        for inner in body:
            of = users.get(inner.name, [])
            if inner.operation != "parameter" or not of:
                continue
            number = int(inner.rest.partition(")")[0])
            if any(user.operands[0] != inner.name for user in of):
                continue
            if all(user.operation in _SLICING for user in of):
                read[number] = min(read[number], sum(inner_sizes[user.name] for user in of))
            elif len(of) == 1 and of[0].operation in _UPDATING:
                name = of[0].operands[_UPDATING[of[0].operation]]
                read[number] = inner_sizes.get(name, 0)
                if written == inner.bytes:
                    written = read[number]
        return sum(read), written

    def _collectives(
        self, instructions: list[Instruction], loops: int, rounds: int
    ) -> Iterator[Collective]:
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
            yield Collective(kind, size, group, loops, rounds, overlapped, largest <= 1)

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


def _is_work(instruction: Instruction) -> bool:
    operation = instruction.operation
    return operation not in _FREE and not operation.endswith("-done")


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
