"""Elementwise rules on PyTorch: recorded once, then run over tiles that stay in the cache.

Executed as it is written, a rule makes a pass over main memory for each of its operations, and
every one of them pays for Keras' Python. Here the rule is run once on a few elements, which records
its ATen operations. What depends on scalars only (the step, the learning rate) is computed once per
update. The rest becomes a straight line of PyTorch calls (`optim.kernels.torch.codegen`,
`optim.kernels.torch.tiles`), which is run over tiles of the tensors small enough for its buffers
to stay in the cache.

A rule may sum over its tensor (a norm, a mean). It then has two such functions: one for what the
sums need and what is needed for them anyway, one for the rest.

The whole of it is one operation to PyTorch, ``optim::run_program``, so that it can be recorded as a
part of a captured training step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from optim.kernels.torch import custom_op, foreach
from optim.kernels.torch.codegen import CallFusion, name_of
from optim.kernels.torch.custom_op import (
    NumberedObjects,
    define_in_place,
    settings_of,
    tile_width,
)
from optim.kernels.torch.recording import EXAMPLE, RecordedRule
from optim.kernels.torch.tiles import TileFunction, TileWriter

# Elements of a tile for each thread: many enough to hide the calls, few enough for the caches.
_TILE = 65536


class ElementwiseProgram:
    """A rule with its hyperparameters and a weight decay, recorded for one device.

    Args:
        rule: The optimizer whose ``update`` is recorded.
        weight_decay: As the rule gets it.
        device: Where the variables are.

    Raises:
        NotElementwise: If the rule is not elementwise.
    """

    def __init__(self, rule: Any, weight_decay: float, device: torch.device) -> None:
        self._recorded = RecordedRule(rule, weight_decay, device)
        self.slots = self._recorded.slots
        self._narrow = self._recorded.narrow_slots
        self._on_cpu = not custom_op.on_gpu(device)
        # The step that contains this update may be being recorded; this is not part of it.
        from torch.utils._python_dispatch import _disable_current_modes

        with _disable_current_modes(), torch.no_grad():
            self._compile(self._recorded)
            self._try(self._recorded.shapes, device)

    def _try(self, shapes: dict[str, Any], device: torch.device) -> None:
        """Run it on examples: what fails in this version of PyTorch fails before any update."""
        options: dict[str, Any] = {"dtype": torch.float32, "device": device}
        wide = [torch.full((EXAMPLE,), 0.5, **options) for _ in range(2)]
        scalars = [torch.ones((), **options) for _ in range(2)]
        slots = [torch.full(tuple(shapes[name]), 0.5, **options) for name in self.slots]
        self.run(wide[:1], wide[1:], slots, *scalars)

    # ---- from the graph to two functions ---------------------------------------------------------

    def _compile(self, recorded: RecordedRule) -> None:
        inputs, outputs, wide_slots = recorded.inputs, recorded.outputs, recorded.wide_slots
        wide = [n for n in recorded.computed if recorded.is_wide[n]]
        self._scalar_inputs = [*inputs[2:4], *inputs[4 + len(wide_slots) :]]
        self._narrow_outputs = outputs[len(wide_slots) : -1]

        slots = inputs[4 : 4 + len(wide_slots)]
        names: dict[Any, str] = {n: f"t{i}" for i, n in enumerate([*inputs[:2], *slots])}
        places = list(zip([*outputs[: len(wide_slots)], outputs[-1]], [*slots, inputs[0]],
                          strict=True))  # fmt: skip
        writer = TileWriter(CallFusion(recorded.is_wide, self._on_cpu), self._on_cpu)
        first = [n for n in wide if n in recorded.needed]
        second = [n for n in wide if n not in recorded.needed]
        self._first, self._scratch = TileFunction(), 0
        if recorded.sums:
            passed = self._passed(first, second, places)
            names |= {place: place for _, place in passed if isinstance(place, str)}
            self._scratch = len(names) - 2 - len(slots)
            nodes_and_sums = [n for n in recorded.computed if n in first or n in recorded.sums]
            self._first = writer.tile(nodes_and_sums, names, passed)
            places = [pair for pair in places if pair not in passed]
            names |= {node: names[place] for node, place in passed}
        self._second = writer.tile(second, names, places)

    def _passed(
        self, first: list[Node], second: list[Node], places: list[tuple[Node, Any]]
    ) -> list[tuple[Node, Any]]:
        """What the first function computes and the second needs, with the place it is kept in.

        In its variable's place, if the second function does not need the old value; else in memory
        of its own.
        """
        read = {argument for node in second for argument in node.all_input_nodes}
        read |= {output for output, place in places if output is not place}
        passed: list[tuple[Node, Any]] = []
        for node in first:
            own = [place for output, place in places if output is node]
            if len(own) == 1 and own[0] not in read:
                passed.append((node, own[0]))
            elif node in read:
                passed.append((node, f"x{len(passed)}"))
        return passed

    # ---- running ---------------------------------------------------------------------------------

    def run(
        self,
        parameters: list[torch.Tensor],
        gradients: list[torch.Tensor],
        slots: list[torch.Tensor],
        step: torch.Tensor,
        learning_rate: torch.Tensor,
    ) -> None:
        """Update lists of contiguous tensors in place.

        Args:
            parameters: float32.
            gradients: Of the same shapes.
            slots: For each name of ``self.slots`` as many tensors as there are parameters.
            step: float32 scalar.
            learning_rate: float32 scalar.
        """
        if not (self._on_cpu or self._narrow or self._recorded.sums):
            self._run_lists(parameters, gradients, slots, step, learning_rate)
            return
        count = len(parameters)
        by_name = {name: slots[i * count : (i + 1) * count] for i, name in enumerate(self.slots)}
        largest = max((p.numel() for p in parameters), default=0)
        width = tile_width(_TILE, largest, step.device)
        buffers = max(self._first.buffers, self._second.buffers)
        if not buffers:
            width = largest  # nothing has to stay in the cache
        options: dict[str, Any] = {"dtype": torch.float32, "device": step.device}
        memory = [torch.empty(width, **options) for _ in range(buffers)]
        scratch = [torch.empty(largest, **options) for _ in range(self._scratch)]
        known: dict[Any, dict[Any, Any]] = {}
        for i, parameter in enumerate(parameters):
            narrow = [by_name[name][i] for name in self._narrow]
            # Tensors whose scalars are equal share what follows from them.
            key = tuple(x.item() for x in narrow) if self._on_cpu else (i,) * bool(narrow)
            if key not in known:
                scalars = [step, learning_rate, *(x.clone() for x in narrow)]
                given = dict(zip(self._scalar_inputs, scalars, strict=True))
                known[key] = self._evaluated(self._recorded.early, given | self._recorded.constants)
            values = known[key]
            tensors = [
                parameter,
                gradients[i],
                *(by_name[name][i] for name in self._recorded.wide_slots),
            ]
            size = parameter.numel()
            flat = [t.view(-1) for t in tensors] + [x[:size] for x in scratch]
            tiles = list(zip(*(t.split(max(width, 1)) for t in flat), strict=True)) if size else []
            if self._recorded.sums:
                parts = _over_tiles(self._first, tiles, values, memory)
                values = values | self._totals(parts, size, step)
                values = self._evaluated(self._recorded.late, values)
            _over_tiles(self._second, tiles, values, memory)
            for slot, node in zip(narrow, self._narrow_outputs, strict=True):
                slot.copy_(values[node])

    def _run_lists(
        self,
        parameters: list[torch.Tensor],
        gradients: list[torch.Tensor],
        slots: list[torch.Tensor],
        step: torch.Tensor,
        learning_rate: torch.Tensor,
    ) -> None:
        """The same on a GPU, by operations on lists, for as many tensors as memory is taken for."""
        recorded, count = self._recorded, len(parameters)
        scalars = dict(zip(self._scalar_inputs, (step, learning_rate), strict=True))
        values = self._evaluated(recorded.early, scalars | recorded.constants)
        wide = [node for node in recorded.computed if recorded.is_wide[node]]
        inputs = [*recorded.inputs[:2], *recorded.inputs[4:]]
        for part in foreach.parts([p.numel() for p in parameters], custom_op.MOST_ELEMENTS):
            lists = [parameters[part], gradients[part]]
            lists += [slots[i * count : (i + 1) * count][part] for i in range(len(self.slots))]
            known = foreach.evaluate(wide, values | dict(zip(inputs, lists, strict=True)))
            new = [[*known[node]] for node in recorded.outputs]
            # An old value that moves to another slot is overwritten by the copies.
            old = {id(tensor) for tensors in lists for tensor in tensors}
            new = [[t.clone() if id(t) in old else t for t in tensors] for tensors in new]
            for target, tensors in zip([*lists[2:], lists[0]], new, strict=True):
                torch._foreach_copy_(target, tensors)

    def _totals(self, parts: list[Any], size: int, like: torch.Tensor) -> dict[Any, Any]:
        """The sums, or means, over all tiles of a tensor."""
        totals = {}
        for i, node in enumerate(self._first.sums):
            total = torch.stack([p[i] for p in parts]).sum() if parts else torch.zeros_like(like)
            totals[node] = total / size if name_of(node) == "mean" else total
        return totals

    @staticmethod
    def _evaluated(nodes: list[Node], known: dict[Any, Any]) -> dict[Any, Any]:
        """Values of scalars, in addition to those known."""
        known = dict(known)
        for node in nodes:
            args = torch.fx.node.map_arg(node.args, known.__getitem__)
            known[node] = node.target(*args, **node.kwargs)
        return known


def _over_tiles(
    tile: TileFunction, tiles: list[Any], values: dict[Any, Any], memory: list[torch.Tensor]
) -> list[Any]:
    """Calls the function on every tile; returns the parts of its sums."""
    scalars = [*(values[n].item() for n in tile.numbers), *(values[n] for n in tile.tensors)]
    buffers = memory[: tile.buffers]
    parts = []
    for tensors in tiles:
        length = tensors[0].numel()
        if buffers and length != buffers[0].numel():
            parts.append(tile.function(*tensors, *scalars, *(b[:length] for b in buffers)))
        else:
            parts.append(tile.function(*tensors, *scalars, *buffers))
    return parts


# ---- one operation for PyTorch -------------------------------------------------------------------

_PROGRAMS: NumberedObjects[ElementwiseProgram] = NumberedObjects()


def _run(
    parameters: list[torch.Tensor],
    gradients: list[torch.Tensor],
    slots: list[torch.Tensor],
    step: torch.Tensor,
    learning_rate: torch.Tensor,
    program: int,
) -> None:
    _PROGRAMS[program].run(parameters, gradients, slots, step, learning_rate)


define_in_place(
    "run_program(Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[] slots, Tensor step, "
    "Tensor learning_rate, int program) -> ()",
    _run,
)


def record_program(rule: Any, weight_decay: float, device: torch.device) -> int:
    """The number of the program of a rule, recorded the first time, and for new hyperparameters.

    Raises:
        NotElementwise: If the rule is not elementwise.
    """
    key = weight_decay, device, settings_of(rule)
    return _PROGRAMS.number(rule, key, lambda: ElementwiseProgram(rule, weight_decay, device))


def run_elementwise(
    rule: Any,
    parameters: list[torch.Tensor],
    gradients: list[torch.Tensor],
    slots: dict[str, list[torch.Tensor]],
    step: torch.Tensor,
    learning_rate: torch.Tensor,
    weight_decay: float,
) -> None:
    """Execute an elementwise rule over lists of tensors, in place.

    Args:
        rule: The optimizer whose rule it is.
        parameters: float32, contiguous.
        gradients: float32, contiguous.
        slots: Slot name -> one tensor per parameter.
        step: float32 scalar.
        learning_rate: float32 scalar.
        weight_decay: A Python number.
    """
    number = record_program(rule, weight_decay, parameters[0].device)
    flat = [slot for name in _PROGRAMS[number].slots for slot in slots[name]]
    torch.ops.optim.run_program(parameters, gradients, flat, step, learning_rate, number)
