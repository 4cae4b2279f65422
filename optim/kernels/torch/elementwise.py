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
from torch.fx import GraphModule, Node

from optim.kernels.torch.codegen import SAME, SUMS, CallFusion, name_of
from optim.kernels.torch.custom_op import NumberedObjects, define_in_place, tile_width
from optim.kernels.torch.tiles import TileFunction, TileWriter

# Elements of a tile for each thread: many enough to hide the calls, few enough for the caches.
_TILE = 65536
# Any size will do to record a rule that is elementwise.
_EXAMPLE = 3


class NotElementwise(TypeError):
    """A rule is marked as elementwise and is not."""


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
        shapes = {name: getattr(s, "shape", s) for name, s in rule.slot_shapes((_EXAMPLE,)).items()}
        self.slots = list(shapes)
        self._wide = [name for name in self.slots if tuple(shapes[name]) == (_EXAMPLE,)]
        self._narrow = [name for name in self.slots if name not in self._wide]
        self._rule = type(rule).__name__
        self._on_cpu = device.type == "cpu"
        # The step that contains this update may be being recorded; this is not part of it.
        from torch.utils._python_dispatch import _disable_current_modes

        with _disable_current_modes(), torch.no_grad():
            self._compile(self._record(rule, weight_decay, shapes, device))
            self._try(shapes, device)

    def _record(
        self, rule: Any, weight_decay: float, shapes: dict[str, Any], device: torch.device
    ) -> GraphModule:
        names = [*self._wide, *self._narrow]

        def flat(parameter: Any, gradient: Any, step: Any, rate: Any, *slots: Any) -> list[Any]:
            given = dict(zip(names, slots, strict=True))
            ordered = {name: given[name] for name in self.slots}
            new, new_slots = rule.update(parameter, gradient, ordered, step, rate, weight_decay)
            return [*(new_slots[name] for name in names), new]

        def example(shape: Any) -> torch.Tensor:
            return torch.full(tuple(shape), 0.5, device=device)

        from torch.fx.experimental.proxy_tensor import make_fx

        wide = [example((_EXAMPLE,)), example((_EXAMPLE,))]
        scalars = [example(()), example(())]
        return make_fx(flat)(*wide, *scalars, *(example(shapes[name]) for name in names))

    def _try(self, shapes: dict[str, Any], device: torch.device) -> None:
        """Run it on examples: what fails in this version of PyTorch fails before any update."""
        wide = [torch.full((_EXAMPLE,), 0.5, device=device) for _ in range(2)]
        scalars = [torch.ones((), device=device) for _ in range(2)]
        slots = [torch.full(tuple(shapes[name]), 0.5, device=device) for name in self.slots]
        self.run(wide[:1], wide[1:], slots, *scalars)

    # ---- from the graph to two functions ---------------------------------------------------------

    def _compile(self, module: GraphModule) -> None:
        nodes = list(module.graph.nodes)
        inputs = [n for n in nodes if n.op == "placeholder"]
        outputs = list(nodes[-1].args[0])
        self._constants = {
            n: getattr(module, str(n.target)).clone() for n in nodes if n.op == "get_attr"
        }
        self._is_wide = {
            n: n.op != "get_attr" and tuple(n.meta["val"].shape) == (_EXAMPLE,) for n in nodes[:-1]
        }
        computed = [n for n in nodes if n.op == "call_function"]
        self._sums = [n for n in computed if self._is_sum(n)]
        for node in computed:
            self._check(node)
        summed = _descendants(computed, self._sums)
        needed = _ancestors(computed, self._sums)
        if any(n in summed for n in needed):
            raise NotElementwise(f"{self._rule}.update sums over what depends on another sum.")
        wide = [n for n in computed if self._is_wide[n]]
        self._scalar_inputs = [*inputs[2:4], *inputs[4 + len(self._wide) :]]
        scalars = [n for n in computed if not self._is_wide[n] and n not in self._sums]
        self._early = [n for n in scalars if n not in summed]
        self._late = [n for n in scalars if n in summed]
        self._narrow_outputs = outputs[len(self._wide) : -1]

        slots = inputs[4 : 4 + len(self._wide)]
        names: dict[Any, str] = {n: f"t{i}" for i, n in enumerate([*inputs[:2], *slots])}
        places = list(zip([*outputs[: len(self._wide)], outputs[-1]], [*slots, inputs[0]],
                          strict=True))  # fmt: skip
        writer = TileWriter(CallFusion(self._is_wide, self._on_cpu), self._on_cpu)
        first = [n for n in wide if n in needed]
        second = [n for n in wide if n not in needed]
        self._first, self._scratch = TileFunction(), 0
        if self._sums:
            passed = self._passed(first, second, places)
            names |= {place: place for _, place in passed if isinstance(place, str)}
            self._scratch = len(names) - 2 - len(slots)
            nodes_and_sums = [n for n in computed if n in first or n in self._sums]
            self._first = writer.tile(nodes_and_sums, names, passed)
            places = [pair for pair in places if pair not in passed]
            names |= {node: names[place] for node, place in passed}
        self._second = writer.tile(second, names, places)

    def _is_sum(self, node: Node) -> bool:
        wide = any(self._is_wide[n] for n in node.all_input_nodes)
        scalar = tuple(node.meta["val"].shape) == ()
        return wide and scalar and name_of(node) in SUMS

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

    def _check(self, node: Node) -> None:
        """Raise for what is not elementwise, whether the rule is marked or not."""
        operation = node.target
        tags = getattr(operation, "tags", ())
        if node in self._sums:
            return
        mixes = not self._is_wide[node] and any(self._is_wide[n] for n in node.all_input_nodes)
        if mixes or (torch.Tag.pointwise not in tags and name_of(node) not in (*SAME, "_to_copy")):
            if not mixes and not self._is_wide[node]:
                return  # a scalar may be computed in any way
            raise NotElementwise(
                f"{self._rule}.update is marked as elementwise, but {operation} is not: remove the "
                "mark `@elementwise`, or the operation."
            )

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
        count = len(parameters)
        by_name = {name: slots[i * count : (i + 1) * count] for i, name in enumerate(self.slots)}
        largest = max((p.numel() for p in parameters), default=0)
        width = tile_width(_TILE, largest, step.device)
        buffers = max(self._first.buffers, self._second.buffers)
        if not buffers:
            width = largest  # nothing has to stay in the cache
        memory = [torch.empty(width, device=step.device) for _ in range(buffers)]
        scratch = [torch.empty(largest, device=step.device) for _ in range(self._scratch)]
        known: dict[Any, dict[Any, Any]] = {}
        for i, parameter in enumerate(parameters):
            narrow = [by_name[name][i] for name in self._narrow]
            # Tensors whose scalars are equal share what follows from them.
            key = tuple(x.item() for x in narrow) if self._on_cpu else (i,) * bool(narrow)
            if key not in known:
                scalars = [step, learning_rate, *(x.clone() for x in narrow)]
                given = dict(zip(self._scalar_inputs, scalars, strict=True))
                known[key] = self._evaluated(self._early, given | self._constants)
            values = known[key]
            tensors = [parameter, gradients[i], *(by_name[name][i] for name in self._wide)]
            size = parameter.numel()
            flat = [t.view(-1) for t in tensors] + [x[:size] for x in scratch]
            tiles = list(zip(*(t.split(max(width, 1)) for t in flat), strict=True)) if size else []
            if self._sums:
                parts = _over_tiles(self._first, tiles, values, memory)
                values = values | self._totals(parts, size, step)
                values = self._evaluated(self._late, values)
            _over_tiles(self._second, tiles, values, memory)
            for slot, node in zip(narrow, self._narrow_outputs, strict=True):
                slot.copy_(values[node])

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


def _descendants(nodes: list[Node], roots: list[Node]) -> set[Node]:
    """The nodes that depend on any of some others, without these."""
    found: set[Node] = set()
    for node in nodes:
        if any(n in found or n in roots for n in node.all_input_nodes):
            found.add(node)
    return found


def _ancestors(nodes: list[Node], roots: list[Node]) -> set[Node]:
    """The nodes that any of some others depends on, without these."""
    found: set[Node] = set()
    for node in reversed(nodes):
        if node in found or node in roots:
            found |= set(node.all_input_nodes)
    return found - set(roots)


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
    """The number of the program of a rule, which is recorded the first time.

    Raises:
        NotElementwise: If the rule is not elementwise.
    """
    return _PROGRAMS.number(
        rule, (weight_decay, device), lambda: ElementwiseProgram(rule, weight_decay, device)
    )


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
