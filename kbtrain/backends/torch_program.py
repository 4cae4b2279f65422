"""A recorded torch step as a program: first what has no effect, then the check, then the changes.

The operations without an effect on the state (nearly all) become one TorchScript function, which
the C++ interpreter runs without Python. The few that change a variable (the fused optimizer, a
moving average, a counter) are called one by one after it. Between the two stands the step's own
finite check: where it does not hold, nothing has been changed.
"""

from __future__ import annotations

import functools
import logging
import operator
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from kbtrain.backends.torch_rewrites import (
    Memory,
    aliases,
    delay_assignments,
    fuse_bias,
    known_number,
    nodes_in,
    simplify,
)

aten = torch.ops.aten
logger = logging.getLogger("kbtrain")

GUARD = aten._assert_async.default
"""Marks, in a recorded graph, that what follows happens only if its argument is true."""


class NotCapturable(Exception):
    """The step cannot be recorded; the message says why."""


class GuardFailed(Exception):
    """The guard's condition was false; no variable has been changed."""


def guard(condition: torch.Tensor) -> None:
    """Record that everything from here on needs ``condition`` (a boolean scalar)."""
    torch._assert_async(condition)


def _check(*conditions: torch.Tensor) -> None:
    if not all(conditions):
        raise GuardFailed


def make_program(
    module: GraphModule, examples: Sequence[torch.Tensor], inductor: bool
) -> Callable[..., list[Any]]:
    """Compile a recorded step.

    Args:
        module: The recorded step.
        examples: A value for each of its inputs.
        inductor: Compile the part without effects by ``torch.compile``, not TorchScript.

    Returns:
        The program, a function of the same inputs that returns a list of tensors.

    Raises:
        NotCapturable: The state is changed before a check.
    """
    if any(_has_unknown_shape(node) for node in module.graph.nodes):
        raise NotCapturable("the shape of a result depends on values")
    simplify(module)
    delay_assignments(module.graph)
    fuse_bias(module.graph)
    pure, late, conditions = _sort(module)
    if any(condition in late for condition in conditions):
        raise NotCapturable("its loss depends on a value that Python reads, or on changed state")
    pure_set = set(pure)
    nodes = list(module.graph.nodes)
    placeholders = [n for n in nodes if n.op == "placeholder"]
    returned = nodes_in(next(n for n in nodes if n.op == "output").args[0])
    constants = {n: getattr(module, str(n.target)) for n in nodes if n.op == "get_attr"}
    needed = [*returned, *(n for node in late for n in node.all_input_nodes), *conditions]
    results = list(dict.fromkeys(n for n in needed if n in pure_set))
    part = _pure_part(pure, results, placeholders, constants)
    script = _inductor(part, examples) if inductor else _script(part, examples)

    code = _Code()
    names: dict[Node, str] = {}
    arguments = [code.name(node, names) for node in placeholders]
    for node, tensor in constants.items():
        names[node] = code.constant(tensor)
    targets = "".join(f"{code.name(node, names)}, " for node in results)
    code.lines.append(f"{targets or '_'} = {code.constant(script)}({', '.join(arguments)})")
    if conditions:
        checked = ", ".join(names[node] for node in conditions)
        code.lines.append(f"{code.constant(_check)}({checked})")
    for node in late:
        call = code.call(node, names)
        code.lines.append(f"{code.name(node, names)} = {call}")
    code.lines.append(f"return [{', '.join(names[n] for n in returned)}]")
    return code.compile(arguments)


def _has_unknown_shape(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and any(known_number(n) is None for n in value.shape)


def _sort(module: GraphModule) -> tuple[list[Node], list[Node], list[Node]]:
    """Nodes that can run before any state is changed, the others, and the guards' conditions.

    The order within each list is the recorded one. A node may move before the changes if it
    neither reads what they have changed (the state, or a tensor that a fused optimizer advances in
    place) nor overwrites what they have read, and reads no value.
    """
    storage = _States()
    owners = Memory(module.graph).owners
    changed_memory: set[Node] = set()
    pure: list[Node] = []
    late: list[Node] = []
    late_set: set[Node] = set()
    changed: set[Node] = set()
    read_late: set[Node] = set()
    conditions: dict[Node, None] = {}
    for node in module.graph.nodes:
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        if node.target is GUARD:
            condition = nodes_in(node.args)[0]
            if condition not in conditions and changed:
                raise NotCapturable("it changes the state before a check")
            conditions[condition] = None
            continue
        written = aliases(node, write=True)
        states = {state for target in written for state in storage.of(target)}
        inputs = node.all_input_nodes
        reads_changed = any(storage.of(n) & changed for n in inputs)
        waits = any(n in late_set or owners(n) & changed_memory for n in inputs)
        overwrites = any(target in read_late for target in written)
        if states or reads_changed or waits or overwrites or _reads_value(node):
            late.append(node)
            late_set.add(node)
            changed |= states
            changed_memory |= {owner for target in written for owner in owners(target)}
            read_late.update(inputs)
        else:
            pure.append(node)
    return pure, late, list(conditions)


def _reads_value(node: Node) -> bool:
    """Whether the result is a number read from a tensor, which TorchScript would keep for ever.

    Keras' SGD reads its learning rate so, to give it to an operation that takes only numbers.
    """
    value = node.meta.get("val")
    symbols = torch.SymInt | torch.SymFloat | torch.SymBool
    return isinstance(value, symbols) and known_number(value) is None


class _States:
    """Which inputs of the graph each node may share memory with."""

    def __init__(self) -> None:
        self._inputs: dict[Node, frozenset[Node]] = {}

    def of(self, node: Node) -> frozenset[Node]:
        """The placeholders whose memory ``node`` may be."""
        if node not in self._inputs:
            if node.op == "placeholder":
                self._inputs[node] = frozenset([node])
            else:
                sources = aliases(node, write=False) + aliases(node, write=True)
                if node.target is operator.getitem:
                    sources = nodes_in(node.args[0])
                self._inputs[node] = frozenset(i for s in sources for i in self.of(s))
        return self._inputs[node]


# --- the part without effects ---------------------------------------------------------------------


def _pure_part(
    pure: list[Node],
    results: list[Node],
    placeholders: list[Node],
    constants: dict[Node, torch.Tensor],
) -> GraphModule:
    """A function of all inputs with the nodes without effects."""
    graph, mapping, root = Graph(), {}, torch.nn.Module()
    for node in placeholders:
        mapping[node] = graph.placeholder(node.name)
    for node, tensor in constants.items():
        # TorchScript takes each tensor once only.
        known = [name for name, other in root.named_buffers() if other is tensor]
        if not known:
            known = [f"constant{len(mapping)}"]
            root.register_buffer(known[0], tensor)
        mapping[node] = graph.get_attr(known[0])
    for node in pure:
        mapping[node] = graph.node_copy(node, lambda n: mapping[n])
    graph.output(tuple(mapping[n] for n in results))
    graph.eliminate_dead_code()
    return GraphModule(root, graph)


def _inductor(module: GraphModule, examples: Sequence[torch.Tensor]) -> Callable[..., Any]:
    """The function compiled by ``torch.compile``; as TorchScript where that fails."""
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compiled = torch.compile(module, fullgraph=True, dynamic=False)
            with torch.random.fork_rng(_cuda_devices()):
                compiled(*examples)
            return compiled
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        logger.warning(
            "jit_compile=True: torch.compile failed (%s: %s), the captured step runs without it. "
            "It needs a C++ compiler; jit_compile='auto' needs none.",
            type(error).__name__,
            lines[0],
        )
        return _script(module, examples)


def _script(module: GraphModule, examples: Sequence[torch.Tensor]) -> Callable[..., Any]:
    """The function as TorchScript; in Python where that is refused."""
    for node in module.graph.nodes:
        if (position := _mask_position(node)) is not None:
            node.target = _traceable(node.target)
            mask = [int(wanted) for wanted in node.args[position]]
            node.args = (*node.args[:position], mask, *node.args[position + 1 :])
    module.recompile()
    try:
        with (
            torch.no_grad(),
            torch.random.fork_rng(_cuda_devices()),
            warnings.catch_warnings(),
        ):
            # TorchScript is deprecated in favour of torch.compile, which takes a minute here.
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(module, tuple(examples), check_trace=False)
        return traced.forward  # without torch.nn.Module's hooks
    except (RuntimeError, ValueError) as error:
        logger.info("The captured step runs in Python, TorchScript refuses it: %s", error)
        return module


def _cuda_devices() -> list[int]:
    return [torch.cuda.current_device()] if torch.cuda.is_available() else []


_LIBRARY = torch.library.Library("kbtrain", "DEF")


def _mask_position(node: Node) -> int | None:
    """Where an operation takes a list of booleans, which TorchScript cannot record."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    for position, value in enumerate(node.args):
        if isinstance(value, list | tuple) and value and isinstance(value[0], bool):
            return position
    return None


@functools.cache
def _traceable(operation: Any) -> Any:
    """The same operation with integers for booleans, and empty tensors where it returns None."""
    schema = str(operation._schema).replace("SymInt", "int")
    name = f"{operation._schema.name}_{operation._overloadname}".replace("aten::", "")
    signature = re.sub(r"bool\[\d*\]", "int[]", schema[schema.index("(") :])

    def run(*args: Any) -> tuple[torch.Tensor, ...]:
        given = [
            [bool(item) for item in value] if argument.type.str() == "List[bool]" else value
            for argument, value in zip(operation._schema.arguments, args, strict=True)
        ]
        results = operation(*given)
        return tuple(args[0].new_empty(0) if r is None else r for r in results)

    _LIBRARY.define(f"{name}{signature}")
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    return getattr(torch.ops.kbtrain, name).default


# --- the program ----------------------------------------------------------------------------------


class _Code:
    """Source of a Python function, with the objects it refers to."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.constants: dict[str, Any] = {}

    def constant(self, value: Any) -> str:
        """A name for an object."""
        name = f"const{len(self.constants)}"
        self.constants[name] = value
        return name

    def name(self, node: Node, names: dict[Node, str]) -> str:
        """The variable a node's result is kept in."""
        return names.setdefault(node, f"value{len(names)}")

    def call(self, node: Node, names: dict[Node, str]) -> str:
        """Source of one operation."""
        parts = [self._value(argument, names) for argument in node.args]
        parts += [f"{key}={self._value(value, names)}" for key, value in node.kwargs.items()]
        return f"{self.constant(node.target)}({', '.join(parts)})"

    def _value(self, value: Any, names: dict[Node, str]) -> str:
        if isinstance(value, Node):
            return names[value]
        if isinstance(value, list | tuple):
            return f"[{', '.join(self._value(item, names) for item in value)}]"
        return self.constant(value)

    def compile(self, arguments: list[str]) -> Callable[..., list[Any]]:
        """The function."""
        body = "\n    ".join(self.lines)
        scope = dict(self.constants)
        exec(f"def program({', '.join(arguments)}):\n    {body}", scope)
        return scope["program"]
