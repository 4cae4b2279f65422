"""A scheduled module of XLA: its collectives, the bytes that it moves, and their order."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from kbtrain.backends.jax.hlo.collective import KINDS, Collective
from kbtrain.backends.jax.hlo.groups import groups_of
from kbtrain.backends.jax.hlo.shapes import arrays, result_of

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
_ROUNDS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_OPERAND = re.compile(r"%([\w.\-]+)")
_CHANNEL = re.compile(r"\bchannel_id=(\d+)")
_WORK = frozenset({"fusion", "convolution", "dot", "custom-call", "while", "conditional", "sort"})
_CONTROL = frozenset({"while", "conditional", "call"})
_FREE = _CONTROL | {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
    *("partition-id", "replica-id"),
}
_SLICING = frozenset({"dynamic-slice", "gather", "slice", "slice-start"})
_UPDATING = {"dynamic-update-slice": 1, "scatter": 2}  # and which operand is what they write
_TRIVIAL_CALLS = ("AllocateBuffer", "AssumeGatherIndicesInBound", "ConcatBitcast", "Sharding")


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
    def result(self) -> str:
        """The shape of what it makes."""
        return result_of(self.operation, self.shape)

    @property
    def bytes(self) -> int:
        """The size of its result."""
        return sum(each.bytes for each in arrays(self.result))


class Program:
    """A module of XLA, as text.

    Args:
        text: The text of the scheduled module.
        devices: Number of devices.
    """

    def __init__(self, text: str, devices: int) -> None:
        self.text, self.devices = text, devices
        self._tiled = ":T(" in text  # layouts of a TPU
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
        """All collectives, in the order of their computations.

        Inside of kernels a TPU has the same one, with its channel, in each stage of it: where it
        starts, beside other work, and where it ends.

        Raises:
            UnknownGroupsError: The devices of one are printed in a form that is not known.
        """
        loops, inside, started = self.loops(), self._inside_kernels(), self._started()
        found: list[Collective] = []
        places: dict[tuple[str, str], int] = {}
        stages: dict[tuple[str, str], int] = {}
        for name, instructions in self.computations.items():
            if name not in loops or name in started:
                continue
            for each, channel in self._collectives(instructions, name in inside, *loops[name]):
                key = each.kind, channel
                if name not in inside or not channel:
                    found.append(each)
                elif key not in places:
                    places[key], stages[key] = len(found), 1
                    found.append(each)
                else:
                    place, stages[key] = places[key], stages[key] + 1
                    often = max(found[place], each, key=lambda one: one.rounds)
                    found[place] = dataclasses.replace(often, overlapped=stages[key] - 2)
        return found

    def sent(self) -> dict[str, tuple[int, int]]:
        """For each kind of collective how often it runs, and the bytes that each device sends."""
        found: dict[str, tuple[int, int]] = {}
        for each in self.collectives():
            count, size = found.get(each.kind, (0, 0))
            found[each.kind] = count + each.rounds, size + int(each.rounds * each.sent)
        return found

    def sent_over(self, machine: int) -> tuple[float, float]:
        """The bytes that a device sends inside of its machine and out of it, at least.

        Args:
            machine: Number of devices of a machine, or of a pod of TPUs, at most.
        """
        machines = math.ceil(self.devices / machine)
        each = math.ceil(self.devices / machines)
        sent = [
            (one.rounds * inside, one.rounds * outside)
            for one in self.collectives()
            for inside, outside in (one.sent_over(each, self.devices),)
        ]
        return sum(inside for inside, _ in sent), sum(outside for _, outside in sent)

    def bytes_accessed(self) -> int:
        """The bytes that all kernels read and write, each time that they run.

        A fusion reads its operands once, of those that it only takes slices or rows from, these.
        What a TPU holds in the memory of the chip costs nothing.
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

    def _started(self) -> set[str]:
        """The computations that an instruction starts and another waits for."""
        return {
            called
            for instructions in self.computations.values()
            for each in instructions
            if each.operation.startswith("async-")
            for called in _called(each.rest)
        }

    def _in_memory(self, each: Instruction) -> int:
        """The bytes of a result that lie in the device's memory."""
        found = arrays(each.result)
        return sum(one.bytes for one in found if not (self._tiled and one.on_chip))

    def _bytes_accessed(self, instructions: list[Instruction]) -> int:
        sizes = {each.name: self._in_memory(each) for each in instructions}
        return sum(sum(self._transfers(each, sizes)) for each in instructions if _is_work(each))

    def _transfers(self, each: Instruction, sizes: dict[str, int]) -> tuple[int, int]:
        """The bytes that an instruction reads and writes."""
        written = sizes[each.name]
        if any(name in each.rest for name in _TRIVIAL_CALLS):
            return 0, 0
        if each.operation in _SLICING:
            return min(each.bytes, sizes.get(each.operands[0], 0)), written
        if each.operation in _UPDATING:
            update = sizes.get(each.operands[_UPDATING[each.operation]], 0)
            return update, min(update, written)
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
                update = inner_sizes.get(name, 0)
                read[number] = min(read[number], update)
                if each.bytes == inner.bytes:
                    written = min(written, update)
        return sum(read), written

    def _collectives(
        self, instructions: list[Instruction], kernel: bool, loops: int, rounds: int
    ) -> Iterator[tuple[Collective, str]]:
        """Those of a computation, with their channels."""
        for i, instruction in enumerate(instructions):
            of = self._collective_of(instruction)
            if of is None:
                continue
            kind = of.operation.removesuffix("-start")
            overlapped = (
                _work_until_done(instructions, i)
                if instruction.operation.endswith("-start")
                else None
            )
            sizes = list(arrays(of.result))
            size = sum(each.bytes for each in sizes)
            groups = groups_of(of.rest, self.devices)
            members = max(map(len, groups))
            if kind == "reduce-scatter":
                size *= members
            elif kind == "all-reduce" and kernel and self._scatters(instructions, members, size):
                kind = "reduce-scatter"
            scalar = max((each.elements for each in sizes), default=0) <= 1
            channel = _CHANNEL.search(of.rest)
            yield (
                Collective(kind, size, groups, loops, rounds, overlapped, scalar),
                channel[1] if channel else "",
            )

    def _scatters(self, instructions: list[Instruction], members: int, size: int) -> bool:
        """Whether a kernel, of a TPU, leaves each device its part of a sum."""
        sliced = any(each.operation == "dynamic-slice" for each in instructions)
        return sliced and members > 1 and instructions[-1].bytes * members < 1.5 * size

    def _collective_of(self, instruction: Instruction) -> Instruction | None:
        """The collective that an instruction is or starts."""
        if instruction.operation.removesuffix("-start") in KINDS:
            return instruction
        if instruction.operation == "async-start":
            for called in _called(instruction.rest):
                for inner in self.computations.get(called, []):
                    if inner.operation in KINDS:
                        return inner
        return None

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
