"""A recorded rule as Triton kernels that update any number of tensors at once.

Pointers to the tensors are in a table, a row of it for every slot, a column for every tensor:

- row 0: the first block of a tensor, where all blocks of all tensors are numbered;
- row 1: its number of elements;
- row 2: the parameter; then the residual of a low-precision one, the slots with a value per
  element (of 8-bit state two rows each, codes and scales), and those that are scalars;
- with 8-bit state, the tables of codes, the same for every tensor;
- then numbers in which the tensors differ: decays, multiples of the learning rate.

Two kernels make an update. ``prepare``, a single block, notes the pointers to the gradients, which
it gets as arguments, and computes for every tensor what depends on scalars only. ``update`` has a
block for every `BLOCK` elements. A rule that sums over its tensor (a norm, a mean) has two more in
between: ``sums`` adds up blocks, ``totals`` the sums of a tensor's blocks, in a fixed order.

Nothing is read on the host: a flag decides on the device whether anything is changed, and what all
gradients are divided by is read there too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.fx import Node

from optim.kernels.torch.codegen import SAME, name_of
from optim.kernels.torch.recording import RecordedRule
from optim.kernels.torch.triton_kernels import coded
from optim.kernels.torch.triton_kernels.expressions import (
    Constants,
    Lines,
    Untranslatable,
    needed_by,
)
from optim.kernels.torch.triton_kernels.storage import TYPES, Storage
from optim.kernels.torch.triton_kernels.text import function

BLOCK = 2048
"""Elements of a block of a kernel."""

_POINTER = "tl.load(table + {row} * n + {at}).to(tl.pointer_type({type}))"


class RuleSource:
    """The kernels of a rule, with names in place of its numbers.

    Args:
        recorded: The rule.
        storage: How its tensors are stored.
        coding: How its slots are coded in 8 bits; None if they are float32.

    Raises:
        Untranslatable: If the rule has an operation that is not written for Triton here.

    Attributes:
        text: The source. Rules with the same one can share kernels.
        numbers: The values of ``c0``, ``c1``... ``c0`` is the multiple of the learning rate; of
            coded slots, ``c1`` is 0 for a tensor whose state is float32.
        rows: Rows of the table before those of numbers.
        values: Rows of the memory for scalars.
        partials: Rows of the memory for sums of blocks; 0 without sums.
        slots: The names of the slots, in the order of the table.
        bytes_per_element: What an update reads and writes.
        is_coded: Whether slots are codes.
        bytes_of_float32: `bytes_per_element` of a tensor whose state is float32 all the same.
    """

    def __init__(
        self, recorded: RecordedRule, storage: Storage, coding: coded.Coding | None = None
    ) -> None:
        for name in recorded.narrow_slots:
            if tuple(recorded.shapes[name]) != ():
                raise Untranslatable(f"the slot {name!r} is neither a scalar nor per element")
        if any(dtype != "float32" for dtype in recorded.slot_dtypes.values()):
            raise Untranslatable(f"the slots have the dtypes {recorded.slot_dtypes}")
        if coding is not None and recorded.sums:
            raise Untranslatable("it sums over 8-bit state")
        self._recorded, self._storage, self._coding = recorded, storage, coding
        self.is_coded = coding is not None
        self._constants = Constants([1.0] * (1 + self.is_coded))
        self._bytes: list[float] = []
        self._saved = 0.0
        self.partials = len(recorded.sums)
        inputs, outputs, wide = recorded.inputs, recorded.outputs, len(recorded.wide_slots)
        self._parameter, self._gradient, self._step, self._rate, *slots = inputs
        self._slots, self._narrow = slots[:wide], slots[wide:]
        self._new_narrow = outputs[wide:-1]
        row = 3 + self._low_precision
        self._row = {self._parameter: 2}
        names = (*recorded.wide_slots, *recorded.narrow_slots)
        if self.is_coded:
            names = (*coded.names_of(recorded.wide_slots), *recorded.narrow_slots)
        self.slots = ("residual", *names) if self._low_precision else names
        width = 1 + self.is_coded
        self._row |= {node: row + width * i for i, node in enumerate(self._slots)}
        row += width * wide
        self._row |= {node: row + i for i, node in enumerate(self._narrow)}
        self.rows = row + len(self._narrow) + self.is_coded
        self._places = [*zip(outputs[:wide], self._slots, strict=True)]
        self._places.append((outputs[-1], self._parameter))
        self._stored_early = self._choose_stored_early()
        parts = [self._update()]
        if recorded.sums:
            parts = [self._sums(), *parts]
        self.values = len(self._kept)
        if recorded.sums:
            parts = [self._totals(), *parts]
        if self.is_coded:
            parts = [*coded.functions(), *parts]
        self.text = "\n\n".join([self._prepare(), *parts])
        self.numbers = self._constants.values
        self.bytes_per_element = sum(self._bytes)
        self.bytes_of_float32 = self.bytes_per_element + self._saved

    @property
    def _low_precision(self) -> bool:
        return self._storage.parameter != "float32"

    # ---- what is computed in which kernel --------------------------------------------------------

    def _choose_stored_early(self) -> list[tuple[Node, Node]]:
        """New slots that ``sums`` stores and ``update`` reads again: needed for the sums anyway.

        Not those whose old value ``update`` needs.
        """
        first = needed_by(self._recorded.sums, ())
        stored = [
            (node, place)
            for node, place in self._places
            if node in first and place is not self._parameter and node not in self._slots
        ]
        stored = [pair for pair in stored if [n for n, _ in self._places].count(pair[0]) == 1]
        while True:
            rest = [node for node, place in self._places if (node, place) not in stored]
            read = needed_by(rest, [*(node for node, _ in stored), *self._recorded.sums])
            lost = [pair for pair in stored if pair[1] in read]
            if not lost:
                return stored
            stored = [pair for pair in stored if pair not in lost]

    @property
    def _kept(self) -> list[Node]:
        """Scalars that a kernel after ``prepare`` needs, one row of memory for each."""
        if not hasattr(self, "_kept_nodes"):
            recorded = self._recorded
            late = {*recorded.late, *recorded.sums}
            found = [node for node, _ in self._places]
            found += [self._step] if self._coding and self._coding.dithered else []
            for node in recorded.computed:
                if recorded.is_wide[node] or node in recorded.sums:
                    found += node.all_input_nodes
                elif node in late:
                    found += [n for n in node.all_input_nodes if n not in late]
            found += [n for n in self._new_narrow if n in recorded.sums]
            found = [n for n in found if not recorded.is_wide[n] and not self._is_constant(n)]
            self._kept_nodes = list(dict.fromkeys(found))
        return self._kept_nodes

    def _is_constant(self, node: Node) -> bool:
        while name_of(node) in SAME and node not in self._recorded.constants:
            node = node.args[0]
        return node in self._recorded.constants

    # ---- pieces of text --------------------------------------------------------------------------

    def _pointer(self, row: Any, at: str, kind: str = "float32") -> str:
        return _POINTER.format(row=row, at=at, type=TYPES[kind])

    def _value(self, node: Node, at: str = "t") -> str:
        """Reads a scalar of a tensor."""
        boolean = " != 0.0" if str(node.meta["val"].dtype) == "torch.bool" else ""
        return f"tl.load(values + {self._kept.index(node)} * n + {at}){boolean}"

    def _store_scalar(self, node: Node, name: str, at: str, mask: str) -> str:
        value = f"({name}).to(tl.float32)" if "bool" in str(node.meta["val"].dtype) else name
        return f"tl.store(values + {self._kept.index(node)} * n + {at}, {value}{mask})"

    def _prepare(self) -> str:
        """The kernel of a single block, a lane for each tensor."""
        start = ["lanes = tl.arange(0, N)", "here = lanes < n", "kept = here"]
        start += ["if FLAGGED:", "    kept = lanes < tl.where(tl.load(skip_at) == 0.0, n, 0)"]
        names = {self._step: "step", self._rate: "rate"}
        start += ["step = tl.load(step_at)", "rate = tl.load(rate_at) * c0"]
        for i, node in enumerate(self._narrow):
            row = self._row[node]
            pointer = f"tl.load(table + {row} * n + lanes, mask=here, other=0)"
            start.append(f"at{i} = {pointer}.to(tl.pointer_type(tl.float32))")
            start.append(f"old{i} = tl.load(at{i}, mask=here, other=0.0)")
            names[node] = f"old{i}"
        lines = Lines(self._recorded, self._constants, names)
        late = {*self._recorded.late, *self._recorded.sums}
        early = [node for node in self._kept if node not in late]
        narrow = [(i, n) for i, n in enumerate(self._new_narrow) if n not in late]
        lines.compute([*early, *(node for _, node in narrow)])
        end = [self._store_scalar(n, lines.value(n), "lanes", ", mask=here") for n in early]
        for i, node in narrow:
            end.append(f"tl.store(at{i}, {lines.value(node)}, mask=kept)")
        arguments = "table, gradients, values, step_at, rate_at, skip_at, n"
        return function(
            "prepare",
            f"{arguments}, POINTER_ARGUMENTS, N: tl.constexpr, FLAGGED: tl.constexpr",
            ["STORE_POINTERS", *start, *lines.lines, *end],
        )

    def _sums(self) -> str:
        recorded = self._recorded
        return "\n\n".join(
            [
                *(self._tile("sums_tile", masked, recorded.sums, self._stored_early, {})
                  for masked in (False, True)),
                self._blocks("sums"),
            ]
        )  # fmt: skip

    def _update(self) -> str:
        places = [pair for pair in self._places if pair not in self._stored_early]
        again = dict(self._stored_early)
        return "\n\n".join(
            [
                *(self._tile("update_tile", masked, [], places, again) for masked in (False, True)),
                self._blocks("update"),
            ]
        )

    def _tile(
        self,
        name: str,
        masked: bool,
        sums: Sequence[Node],
        places: Sequence[tuple[Node, Node]],
        again: dict[Node, Node],
    ) -> str:
        """A function that does a block, the last one of a tensor if ``masked``.

        Args:
            name: Its name.
            masked: Whether the tensor ends in it.
            sums: Sums whose parts it stores.
            places: Nodes, and the inputs whose places their values take.
            again: Nodes that are stored already, with the inputs whose places they took.
        """
        recorded, mask = self._recorded, ", mask=inside" if masked else ""
        wanted = [*(node for node, _ in places), *sums]
        needed = needed_by(wanted, [*again, *([] if sums else recorded.sums)])
        readers = [n for n in needed if recorded.is_wide[n] or n in sums]
        inputs = {n for reader in readers for n in reader.all_input_nodes} | set(wanted)
        body = ["lanes = tl.arange(0, BLOCK)"]
        if masked:
            body.append("inside = lanes < size")
        names: dict[Node, str] = {}
        read = [n for n in (self._parameter, self._gradient, *self._slots) if n in needed]
        written = [place for _, place in places]
        for i, place in enumerate([self._parameter, *self._slots]):
            source = [n for n, p in again.items() if p is place and n in inputs]
            if place not in [*read, *written] and not source:
                continue
            kind = self._storage.parameter if place is self._parameter else "float32"
            if self._is_code(place):
                body += coded.pointers(i, self._row[place], self.rows - 1)
            else:
                body += self._base(f"at{i}", self._pointer(self._row[place], "t", kind))
            if self._is_code(place) and place in read:
                names[place] = f"x{i}"
                body += coded.read(i, self._is_square(place), masked)
            elif place in read or source:
                node = source[0] if source else place
                names[node] = f"x{i}"
                body.append(f"x{i} = tl.load(at{i} + lanes{mask})")
                if place is self._parameter:
                    body += self._joined(mask)
            elif place is self._parameter and self._low_precision:
                body += self._base("left_at", self._pointer(3, "t"))
        if self._gradient in read:
            kind = TYPES[self._storage.gradient]
            body += self._base("from_at", f"tl.load(gradients + t).to(tl.pointer_type({kind}))")
            body.append(f"g = tl.load(from_at + lanes{mask}).to(tl.float32)")
            body += ["if SCALED:", "    g = tl.div_rn(g, tl.load(scale_at))"]
            names[self._gradient] = "g"
        for node in self._kept:
            dithers = node is self._step and any(map(self._dithers, written))
            if (node in inputs or dithers) and node not in sums:
                names[node] = f"v{self._kept.index(node)}"
                body.append(f"{names[node]} = {self._value(node)}")
        lines = Lines(recorded, self._constants, names)
        lines.compute([node for node, _ in places])
        terms = [self._term(node) for node in sums]
        lines.compute(terms)
        body += lines.lines
        for j, term in enumerate(terms):
            value = lines.value(term)
            value = f"tl.where(inside, {value}, 0.0)" if masked else value
            body.append(f"tl.store(partials + {j} * blocks + pid, tl.sum({value}, axis=0))")
        for node, place in places:
            if self._is_code(place):
                i, step = 1 + self._slots.index(place), ""
                if self._dithers(place):
                    step = names[self._step]
                body += coded.stored(i, lines.value(node), self._is_square(place), step, masked)
            else:
                body += self._stored(place, lines.value(node), mask)
        if not masked:
            again_read = [p for n, p in again.items() if n in inputs]
            self._bytes += map(self._size, [*read, *again_read, *written])
        return function(f"{name}{'_masked' * masked}", self._tile_arguments(name), body)

    def _is_code(self, place: Node) -> bool:
        return self.is_coded and place in self._slots

    def _name(self, place: Node) -> str:
        return str(self._recorded.wide_slots[self._slots.index(place)])

    def _is_square(self, place: Node) -> bool:
        return self._coding is not None and self._name(place) in self._coding.squares

    def _dithers(self, place: Node) -> bool:
        return self._is_code(place) and self._name(place) in getattr(self._coding, "dithered", ())

    def _size(self, place: Node) -> float:
        """Bytes of an element of an input, with the residual of a low-precision parameter."""
        sizes = {"float32": 4, "bfloat16": 2, "float16": 2}
        if place is self._gradient:
            return sizes[self._storage.gradient]
        if self._is_code(place):
            self._saved += 4 - coded.BYTES
            return coded.BYTES
        if place is not self._parameter:
            return 4
        return sizes[self._storage.parameter] + 4 * self._low_precision

    def _tile_arguments(self, name: str) -> str:
        sums = "partials, blocks, pid, " if name.startswith("sums") else ""
        return (
            f"table, gradients, values, scale_at, {sums}n, t, begin, size, "
            "BLOCK: tl.constexpr, ALIGNED: tl.constexpr, SCALED: tl.constexpr"
        )

    def _base(self, name: str, pointer: str) -> list[str]:
        return [
            f"{name} = {pointer}",
            "if ALIGNED:",
            f"    {name} = tl.multiple_of({name}, 16)",
            f"{name} = {name} + begin",
        ]

    def _joined(self, mask: str) -> list[str]:
        """`optim.core.precision.join`."""
        if not self._low_precision:
            return []
        kind = TYPES[self._storage.parameter]
        return [
            "wide = x0.to(tl.float32)",
            *self._base("left_at", self._pointer(3, "t")),
            f"total = wide + tl.load(left_at + lanes{mask})",
            f"x0 = tl.where(total.to({kind}).to(tl.float32) == wide, total, wide)",
        ]

    def _stored(self, place: Node, value: str, mask: str) -> list[str]:
        """Lines that store a new value; of a parameter as `optim.core.precision.split` does."""
        if place is not self._parameter:
            return [f"tl.store(at{1 + self._slots.index(place)} + lanes, {value}{mask})"]
        if not self._low_precision:
            return [f"tl.store(at0 + lanes, {value}{mask})"]
        return [
            f"rounded = ({value}).to({TYPES[self._storage.parameter]})",
            f"left = {value} - rounded.to(tl.float32)",
            "left = tl.where(tl.abs(left) <= 3.4028234663852886e38, left, 0.0)",
            f"tl.store(at0 + lanes, rounded{mask})",
            f"tl.store(left_at + lanes, left{mask})",
        ]

    def _term(self, node: Node) -> Node:
        term: Node = node.args[0]
        return term

    def _blocks(self, name: str) -> str:
        """The kernel that finds a block's tensor, and does the block."""
        sums = name == "sums"
        extra = "partials, blocks, " if sums else ""
        given = f"table, gradients, values, scale_at, {'partials, blocks, pid, ' if sums else ''}"
        given += "n, t, begin, size, BLOCK, ALIGNED, SCALED"
        return function(
            name,
            f"table, gradients, values, skip_at, scale_at, {extra}n, N: tl.constexpr, "
            "BLOCK: tl.constexpr, ALIGNED: tl.constexpr, FLAGGED: tl.constexpr, "
            "SCALED: tl.constexpr",
            [
                "pid = tl.program_id(0)",
                "all = tl.arange(0, N)",
                "firsts = tl.load(table + all, mask=all < n, other=2147483647)",
                "t = tl.sum((firsts <= pid).to(tl.int32), axis=0) - 1",
                "begin = (pid - tl.load(table + t)) * BLOCK",
                "size = tl.load(table + n + t) - begin",
                "if FLAGGED:",
                "    size = tl.where(tl.load(skip_at) == 0.0, size, 0)",
                "if size >= BLOCK:",
                f"    {name}_tile({given})",
                "elif size > 0:",
                f"    {name}_tile_masked({given})",
            ],
        )

    def _totals(self) -> str:
        """The kernel that adds up the sums of a tensor's blocks, and computes what needs them."""
        recorded = self._recorded
        body = [
            "t = tl.program_id(0)",
            "begin = tl.load(table + t)",
            "end = tl.load(table + t + 1, mask=t + 1 < n, other=0)",
            "end = tl.where(t + 1 < n, end, blocks)",
            "size = tl.load(table + n + t).to(tl.float32)",
            "lanes = tl.arange(0, BLOCK)",
        ]
        names: dict[Node, str] = {}
        for j, node in enumerate(recorded.sums):
            body += [
                f"parts{j} = tl.zeros((BLOCK,), tl.float32)",
                "for i in tl.range(begin, end, BLOCK):",
                f"    parts{j} += tl.load(partials + {j} * blocks + i + lanes, "
                "mask=i + lanes < end, other=0.0)",
                f"r{j} = tl.sum(parts{j}, axis=0)",
            ]
            names[node] = f"r{j}"
            if name_of(node) == "mean":
                body.append(f"r{j} = tl.div_rn(r{j}, size)")

        late = {*recorded.late, *recorded.sums}
        for node in self._kept:
            if node not in late and any(node in m.all_input_nodes for m in recorded.late):
                names[node] = f"v{self._kept.index(node)}"
                body.append(f"{names[node]} = {self._value(node)}")
        lines = Lines(recorded, self._constants, names)
        kept = [n for n in self._kept if n in late]
        narrow = [(i, n) for i, n in enumerate(self._new_narrow) if n in late]
        lines.compute([*kept, *(node for _, node in narrow)])
        body += lines.lines
        body += [self._store_scalar(n, lines.value(n), "t", "") for n in kept]
        for i, node in narrow:
            pointer = self._pointer(self._row[self._narrow[i]], "t")
            body += ["live = True", "if FLAGGED:", "    live = tl.load(skip_at) == 0.0"]
            body.append(f"tl.store({pointer}, {lines.value(node)}, mask=live)")
        return function(
            "totals",
            "table, values, partials, skip_at, n, blocks, BLOCK: tl.constexpr, "
            "FLAGGED: tl.constexpr",
            body,
        )
