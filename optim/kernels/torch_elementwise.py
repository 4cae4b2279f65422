"""Elementwise rules on PyTorch: recorded once, then run over pieces that stay in the cache.

Executed as it is written, a rule makes a pass over main memory for each of its operations, and
every one of them pays for Keras' Python. Here the rule is run once on a few elements, which records
its ATen operations. What depends on scalars only (the step, the learning rate) is computed once per
update. The rest becomes a straight line of PyTorch calls without allocations: results go to the
variables where nothing needs the old value any more, else to a few buffers; products, quotients
and steps towards a value are joined to the addition that follows them, as PyTorch has operations
for that. It is run over pieces of the tensors small enough for the buffers to stay in the cache.

The whole of it is one operation to PyTorch, ``optim::run_program``, so that it can be recorded as a
part of a captured training step.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import _disable_current_modes

# Elements of a piece for each thread: with half a dozen tensors involved, about a megabyte.
_PIECE = 32768
# Any size will do to record a rule that is elementwise.
_EXAMPLE = 3

_IN_PLACE = {
    name: getattr(torch, name)
    for name in (
        *("add", "sub", "mul", "div", "sqrt", "rsqrt", "reciprocal", "neg", "abs", "sign"),
        *("maximum", "minimum", "where", "exp", "expm1", "log", "square", "pow", "clamp"),
        *("lerp", "addcmul", "addcdiv"),
    )
}
_COMMUTES = ("add", "mul", "maximum", "minimum")
_NUMBERS_ALLOWED = ("add", "sub", "mul", "div", "lerp", "pow")
_SAME = ("detach", "alias", "lift_fresh_copy", "clone", "view")


@dataclass
class Call:
    """One operation on whole pieces: ``function(*args, **numbers)``."""

    name: str
    args: list[Any]
    numbers: dict[str, Any] = field(default_factory=dict)
    function: Callable[..., Any] | None = None


class Program:
    """A rule with its hyperparameters and a weight decay, recorded for one device.

    Args:
        rule: the optimizer whose ``update`` is recorded.
        weight_decay: as the rule gets it.
        device: where the variables are.

    Raises:
        TypeError: if the rule is not elementwise.
    """

    def __init__(self, rule: Any, weight_decay: float, device: torch.device) -> None:
        shapes = {name: getattr(s, "shape", s) for name, s in rule.slot_shapes((_EXAMPLE,)).items()}
        self.slots = list(shapes)
        self._wide = [name for name in self.slots if tuple(shapes[name]) == (_EXAMPLE,)]
        self._narrow = [name for name in self.slots if name not in self._wide]
        self._rule = type(rule).__name__
        self._on_cpu = device.type == "cpu"
        # Somebody may be recording a step that this update is a part of; this is no part of it.
        with _disable_current_modes(), torch.no_grad():
            self._compile(self._record(rule, weight_decay, shapes, device))

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

        wide = [example((_EXAMPLE,)), example((_EXAMPLE,))]
        scalars = [example(()), example(())]
        return make_fx(flat)(*wide, *scalars, *(example(shapes[name]) for name in names))

    # ---- from the graph to calls -----------------------------------------------------------------

    def _compile(self, module: GraphModule) -> None:
        nodes = list(module.graph.nodes)
        inputs = [n for n in nodes if n.op == "placeholder"]
        outputs = list(nodes[-1].args[0])
        self._piece_inputs = [*inputs[:2], *inputs[4 : 4 + len(self._wide)]]
        self._scalar_inputs = [*inputs[2:4], *inputs[4 + len(self._wide) :]]
        self._constants = {
            n: getattr(module, str(n.target)).clone() for n in nodes if n.op == "get_attr"
        }
        self._is_wide: dict[Node, bool] = {}
        self._scalar_nodes: list[Node] = []
        wide_nodes: list[Node] = []
        for node in nodes[:-1]:
            wide = tuple(node.meta["val"].shape) == (_EXAMPLE,) if node.op != "get_attr" else False
            self._is_wide[node] = wide
            if node.op == "call_function":
                (wide_nodes if wide else self._scalar_nodes).append(node)
                self._check(node)
        wide_outputs = [*outputs[: len(self._wide)], outputs[-1]]
        self._narrow_outputs = outputs[len(self._wide) : -1]
        uses = {n: sum(o is n for o in wide_outputs) for n in nodes}
        for node in wide_nodes:
            for argument in node.all_input_nodes:
                uses[argument] += sum(a is argument for a in node.args)
        calls = self._fuse(wide_nodes, uses)
        self._emit(calls, wide_outputs)

    def _check(self, node: Node) -> None:
        """Refuse what is not elementwise, whatever the mark on the rule says."""
        operation = node.target
        tags = getattr(operation, "tags", ())
        name = operation.__name__.partition(".")[0] if hasattr(operation, "__name__") else ""
        mixes = not self._is_wide[node] and any(self._is_wide[n] for n in node.all_input_nodes)
        if mixes or (torch.Tag.pointwise not in tags and name not in (*_SAME, "_to_copy")):
            if not mixes and not self._is_wide[node]:
                return  # a scalar may be computed in any way
            raise TypeError(
                f"{self._rule}.update is marked as elementwise, but {operation} is not: remove the "
                "mark `@elementwise`, or the operation."
            )

    def _fuse(self, nodes: list[Node], uses: dict[Node, int]) -> dict[Node, Call]:
        """Calls by the node they compute; a call that another has taken in is left out."""
        calls: dict[Node, Call] = {}
        for node in nodes:
            name = node.target.__name__.partition(".")[0]
            args = list(node.args)
            alpha = node.kwargs.get("alpha", 1)
            if name in _SAME:
                calls[node] = Call("same", args[:1])
                continue
            if name in _COMMUTES and not self._wide_argument(args[0]):
                args = [args[1], args[0]]
            calls[node] = Call(name, args, {}, node.target)
            if name not in ("add", "sub") or not self._wide_argument(args[1]) or alpha != 1:
                if node.kwargs:
                    calls[node] = Call("other", args, dict(node.kwargs), node.target)
                continue
            sign = 1 if name == "add" else -1
            pairs = [(args[0], args[1])] + ([(args[1], args[0])] if sign == 1 else [])
            for base, term in pairs:
                inner = calls.get(term)
                if inner is None or uses[term] != 1 or not self._wide_argument(base):
                    continue
                if fused := self._joined(base, inner, sign, calls, uses):
                    calls[node] = fused
                    del calls[term]
                    break
        return calls

    def _joined(
        self,
        base: Node,
        inner: Call,
        sign: int,
        calls: dict[Node, Call],
        uses: dict[Node, int],
    ) -> Call | None:
        """``base + sign * inner`` as one operation, if PyTorch has it."""
        if inner.name == "mul" and self._number(inner.args[1]):
            factor = inner.args[1]
            difference = calls.get(inner.args[0])
            if (
                sign == 1
                and difference is not None
                and difference.name == "sub"
                and not difference.numbers
                and uses[inner.args[0]] == 1
                and difference.args[1] is base
            ):
                del calls[inner.args[0]]
                return Call("lerp", [base, difference.args[0], factor])
            return Call("add", [base, inner.args[0]], {"alpha": (sign, factor)})
        if inner.name == "mul" and not inner.numbers and self._wide_argument(inner.args[1]):
            return Call("addcmul", [base, *inner.args], {"value": (sign, 1)})
        if inner.name == "div" and all(map(self._wide_argument, inner.args)):
            top, factor = inner.args[0], 1
            scaled = calls.get(top)
            if (
                scaled is not None
                and scaled.name == "mul"
                and uses[top] == 1
                and self._number(scaled.args[1])
            ):
                del calls[top]
                top, factor = scaled.args
            return Call("addcdiv", [base, top, inner.args[1]], {"value": (sign, factor)})
        return None

    def _wide_argument(self, value: Any) -> bool:
        return isinstance(value, Node) and self._is_wide[value]

    def _number(self, value: Any) -> bool:
        """Whether a factor is known to Python: on a GPU reading a scalar would stop the queue."""
        if isinstance(value, Node):
            return self._on_cpu and not self._is_wide[value]
        return isinstance(value, int | float)

    # ---- from calls to code ----------------------------------------------------------------------

    def _emit(self, calls: dict[Node, Call], outputs: list[Node]) -> None:
        """Source of a function of one piece of every tensor, the scalars and the buffers."""
        places = list(zip(outputs, [*self._piece_inputs[2:], self._piece_inputs[0]], strict=True))
        origin = {node: node for node in self._is_wide}
        order = []
        for node, call in calls.items():
            if call.name == "same":
                origin[node] = origin[call.args[0]]
            else:
                order.append(node)
        last: dict[Node, int] = {}
        for index, node in enumerate(order):
            for argument in calls[node].args:
                if self._wide_argument(argument):
                    last[origin[argument]] = index
        for output, place in places:  # an old value that moves to another variable at the end
            if origin[output] is not place and origin[output] in self._piece_inputs:
                last[origin[output]] = len(order)
        names = {node: f"t{i}" for i, node in enumerate(self._piece_inputs)}
        targets = {origin[output]: place for output, place in places}
        overwritten = {place for _, place in places}
        free: list[str] = []
        self._buffers = 0
        self._numbers: list[Node] = []
        self._tensors: list[Node] = []
        scope: dict[str, Any] = {}
        lines: list[str] = []
        late: list[str] = []
        for index, node in enumerate(order):
            arguments = self._arguments(calls[node], names, origin)
            for argument in {origin[a] for a in calls[node].args if self._wide_argument(a)}:
                if last[argument] == index and names[argument].startswith("b"):
                    free.append(names[argument])
            place = targets.get(node)
            if place is not None and last.get(place, -1) <= index:
                names[node] = names[place]
            else:
                if not free:
                    free.append(f"b{self._buffers}")
                    self._buffers += 1
                names[node] = free.pop()
                if place is not None:
                    # Kept until the end: the variable's old value is still needed.
                    last[node] = len(order)
            lines.append(self._line(calls[node], index, names[node], arguments, scope))
        for output, place in places:
            value = names[origin[output]]
            if value == names[place]:
                continue
            if origin[output] in overwritten:  # two variables may even change places
                value = f"b{self._buffers}"
                self._buffers += 1
                lines.append(f"{value}.copy_({names[origin[output]]})")
            late.append(f"{names[place]}.copy_({value})")
        arguments = [names[n] for n in self._piece_inputs]
        arguments += [f"n{i}" for i in range(len(self._numbers))]
        arguments += [f"s{i}" for i in range(len(self._tensors))]
        arguments += [f"b{i}" for i in range(self._buffers)]
        body = "\n    ".join([*lines, *late]) or "pass"
        exec(f"def piece({', '.join(arguments)}):\n    {body}", scope)
        self._piece = scope["piece"]

    def _arguments(self, call: Call, names: dict[Node, str], origin: dict[Node, Node]) -> list[str]:
        parts = []
        for position, value in enumerate(call.args):
            if self._wide_argument(value):
                parts.append(names[origin[value]])
            elif position and call.name in _NUMBERS_ALLOWED:
                parts.append(self._as_number(value))
            else:
                parts.append(self._as_tensor(value))
        for key, value in call.numbers.items():
            sign, factor = value if isinstance(value, tuple) else (1, value)
            parts.append(f"{key}={'-' if sign < 0 else ''}{self._as_number(factor)}")
        return parts

    def _as_number(self, value: Any) -> str:
        if not isinstance(value, Node):
            return repr(value)
        if not self._on_cpu:
            return self._as_tensor(value)
        if value not in self._numbers:
            self._numbers.append(value)
        return f"n{self._numbers.index(value)}"

    def _as_tensor(self, value: Any) -> str:
        if not isinstance(value, Node):
            return repr(value)
        if value not in self._tensors:
            self._tensors.append(value)
        return f"s{self._tensors.index(value)}"

    def _line(
        self, call: Call, index: int, out: str, arguments: list[str], scope: dict[str, Any]
    ) -> str:
        if call.name in _IN_PLACE:
            scope[call.name] = _IN_PLACE[call.name]
            return f"{call.name}({', '.join(arguments)}, out={out})"
        scope[f"f{index}"] = call.function
        return f"{out}.copy_(f{index}({', '.join(arguments)}))"

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
            gradients: of the same shapes.
            slots: for each name of ``self.slots`` as many tensors as there are parameters.
            step: float32 scalar.
            learning_rate: float32 scalar.
        """
        count = len(parameters)
        by_name = {name: slots[i * count : (i + 1) * count] for i, name in enumerate(self.slots)}
        size = _PIECE * torch.get_num_threads() if self._on_cpu else 0
        largest = max((p.numel() for p in parameters), default=0)
        width = min(size, largest) if size else largest
        buffers = [torch.empty(width, device=step.device) for _ in range(self._buffers)]
        scalars: tuple[list[Any], list[Any]] | None = None
        for i, parameter in enumerate(parameters):
            narrow = [by_name[name][i] for name in self._narrow]
            if scalars is None or narrow:
                scalars = self._scalars([step, learning_rate, *narrow])
            values, new_narrow = scalars
            tensors = [parameter, gradients[i], *(by_name[name][i] for name in self._wide)]
            flat = [t.view(-1) for t in tensors]
            for start in range(0, parameter.numel(), max(width, 1)):
                length = min(width, parameter.numel() - start)
                pieces = [t[start : start + length] for t in flat]
                self._piece(*pieces, *values, *(b[:length] for b in buffers))
            for slot, value in zip(narrow, new_narrow, strict=True):
                slot.copy_(value)

    def _scalars(self, inputs: list[torch.Tensor]) -> tuple[list[Any], list[Any]]:
        """What a piece needs of the scalars, and the new values of the scalar slots."""
        known: dict[Any, Any] = dict(zip(self._scalar_inputs, inputs, strict=True))
        known.update(self._constants)
        for node in self._scalar_nodes:
            args = torch.fx.node.map_arg(node.args, known.__getitem__)
            known[node] = node.target(*args, **node.kwargs)
        numbers = [known[n].item() for n in self._numbers]
        tensors = [known[n] for n in self._tensors]
        return [*numbers, *tensors], [known[n] for n in self._narrow_outputs]


# ---- one operation for PyTorch -------------------------------------------------------------------

_PROGRAMS: list[Program] = []
_NUMBERS: "weakref.WeakKeyDictionary[Any, dict[Any, int]]" = weakref.WeakKeyDictionary()

_LIBRARY = torch.library.Library("optim", "FRAGMENT")
_LIBRARY.define(
    "run_program(Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[] slots, Tensor step, "
    "Tensor learning_rate, int program) -> ()"
)


def _run(
    parameters: list[torch.Tensor],
    gradients: list[torch.Tensor],
    slots: list[torch.Tensor],
    step: torch.Tensor,
    learning_rate: torch.Tensor,
    program: int,
) -> None:
    _PROGRAMS[program].run(parameters, gradients, slots, step, learning_rate)


def _nothing(*args: Any) -> None:
    """Tensors without memory have nothing to update."""


_LIBRARY.impl("run_program", _run, "CPU")
_LIBRARY.impl("run_program", _run, "CUDA")
_LIBRARY.impl("run_program", _nothing, "Meta")


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
        rule: the optimizer whose rule it is.
        parameters: float32, contiguous.
        gradients: float32, contiguous.
        slots: slot name -> one tensor per parameter.
        step: float32 scalar.
        learning_rate: float32 scalar.
        weight_decay: a Python number.
    """
    numbers = _NUMBERS.setdefault(rule, {})
    key = (weight_decay, parameters[0].device)
    if key not in numbers:
        _PROGRAMS.append(Program(rule, weight_decay, parameters[0].device))
        numbers[key] = len(_PROGRAMS) - 1
    program = numbers[key]
    flat = [slot for name in _PROGRAMS[program].slots for slot in slots[name]]
    torch.ops.optim.run_program(parameters, gradients, flat, step, learning_rate, program)
