"""Capture of a torch step: from Python over Keras layers to a fixed list of ATen operations.

A step is run once on fake tensors, which records every operation, forward, backward and update,
for these shapes. The operations are then sorted into two kinds. Those without an effect on the
state (nearly all) become one TorchScript function, which the C++ interpreter runs without Python.
The few that change a variable (the fused optimizer, a moving average, a counter) are called one by
one after it. A guard between the two, the step's own finite check, leaves the state untouched when
it does not hold.

What depends on values in Python (seeded random layers, ``if`` on a tensor, ``.item()``) cannot be
recorded: torch says so during the capture, and the step runs as it is.
"""

from __future__ import annotations

import functools
import logging
import operator
import random
import re
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import keras
import numpy as np
import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

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


def _check(condition: torch.Tensor) -> None:
    if not condition:
        raise GuardFailed


class CapturedStep:
    """A recorded step for inputs of one shape.

    Args:
        fn: The step, ``fn(inputs) -> outputs``, structures of tensors.
        variables: Everything it reads or assigns.
        inputs: Example inputs; their values do not matter.

    Raises:
        NotCapturable: The step cannot be recorded.
    """

    def __init__(
        self, fn: Callable[[Any], Any], variables: Sequence[keras.Variable], inputs: Any
    ) -> None:
        self._variables = list(variables)
        flat = keras.tree.flatten(inputs)
        graph, self._outputs = _record(fn, self._variables, inputs)
        self._program = _split(graph, len(flat), [*flat, *self._state()])

    def _state(self) -> list[torch.Tensor]:
        return [variable._value for variable in self._variables]

    def __call__(self, inputs: Any) -> Any:
        """Run the recorded operations.

        Raises:
            GuardFailed: The guard did not hold; nothing was changed.
        """
        flat = self._program(*keras.tree.flatten(inputs), *self._state())
        return keras.tree.pack_sequence_as(self._outputs, flat)


def _record(
    fn: Callable[[Any], Any], variables: list[keras.Variable], inputs: Any
) -> tuple[GraphModule, Any]:
    """The step as one graph of ATen operations, and the structure of its outputs.

    The variables' values are inputs of the graph, after those of the step.
    """
    outputs: list[Any] = []
    real = [variable._value for variable in variables]
    count = len(keras.tree.flatten(inputs))

    def flat_step(*flat: torch.Tensor) -> list[torch.Tensor]:
        for variable, value in zip(variables, flat[count:], strict=True):
            variable._value = value.requires_grad_(variable.trainable)
        result = fn(keras.tree.pack_sequence_as(inputs, list(flat[:count])))
        outputs[:] = [keras.tree.map_structure(lambda _: 0, result)]
        return keras.tree.flatten(result)

    python, numpy = random.getstate(), np.random.get_state(legacy=True)
    record = make_fx(flat_step, tracing_mode="fake", _allow_non_fake_inputs=True)
    try:
        with _same_random_state():
            graph = record(*keras.tree.flatten(inputs), *[t.detach() for t in real])
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        raise NotCapturable(f"{type(error).__name__}: {lines[0]}") from error
    finally:
        for variable, value in zip(variables, real, strict=True):
            variable._value = value
    if random.getstate() != python or not _equal(numpy, np.random.get_state(legacy=True)):
        random.setstate(python)
        np.random.set_state(numpy)
        raise NotCapturable("the model draws Python or NumPy random numbers")
    return graph, outputs[0]


def _same_random_state() -> AbstractContextManager[Any]:
    """What is drawn inside does not count: a run is the same whenever it captures a step."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    return torch.random.fork_rng(devices)


def _equal(a: Any, b: Any) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


# --- which operations change the state ------------------------------------------------------------


def _aliases(node: Node, write: bool) -> list[Node]:
    """The nodes among the arguments that ``node`` writes to, or returns a view of."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return []
    found: list[Node] = []
    for argument, value in zip(node.target._schema.arguments, node.args, strict=False):
        info = argument.alias_info
        if info is not None and info.is_write == write:
            found += [n for n in _flat_nodes(value)]
    for argument in node.target._schema.arguments:
        info = argument.alias_info
        if info is not None and info.is_write == write and argument.name in node.kwargs:
            found += [n for n in _flat_nodes(node.kwargs[argument.name])]
    return found


def _flat_nodes(value: Any) -> list[Node]:
    if isinstance(value, Node):
        return [value]
    if isinstance(value, list | tuple):
        return [n for item in value for n in _flat_nodes(item)]
    return []


class _Storage:
    """Which inputs of the graph each node may share memory with."""

    def __init__(self) -> None:
        self._inputs: dict[Node, frozenset[Node]] = {}

    def of(self, node: Node) -> frozenset[Node]:
        """The placeholders whose memory ``node`` may be."""
        if node not in self._inputs:
            if node.op == "placeholder":
                self._inputs[node] = frozenset([node])
            else:
                sources = _aliases(node, write=False) + _aliases(node, write=True)
                if node.target is operator.getitem:
                    sources = _flat_nodes(node.args[0])
                self._inputs[node] = frozenset(i for s in sources for i in self.of(s))
        return self._inputs[node]


def _sort(module: GraphModule) -> tuple[list[Node], list[Node], Node | None]:
    """Nodes that can run before any state is changed, the others, and the guard's condition.

    The order within each list is the recorded one. A node may move before the changes if it
    neither reads what they have changed nor overwrites what they have read.
    """
    storage = _Storage()
    pure: list[Node] = []
    late: list[Node] = []
    late_set: set[Node] = set()
    changed: set[Node] = set()
    read_late: set[Node] = set()
    condition: Node | None = None
    for node in module.graph.nodes:
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        if node.target is GUARD:
            new = _flat_nodes(node.args)[0]
            if new is not condition and (changed or condition is not None):
                raise NotCapturable("it changes the state before a check (accumulation does)")
            condition = new
            continue
        written = _aliases(node, write=True)
        states = {state for target in written for state in storage.of(target)}
        inputs = node.all_input_nodes
        reads_changed = any(storage.of(n) & changed for n in inputs)
        waits = any(n in late_set for n in inputs)
        overwrites = any(target in read_late for target in written)
        if states or reads_changed or waits or overwrites:
            late.append(node)
            late_set.add(node)
            changed |= states
            read_late.update(inputs)
        else:
            pure.append(node)
    return pure, late, condition


# --- a program of two parts -----------------------------------------------------------------------


def _split(
    module: GraphModule, count: int, examples: Sequence[torch.Tensor]
) -> Callable[..., list[Any]]:
    """TorchScript for the part without effects, then the guard, then the changes one by one.

    Args:
        module: The recorded step.
        count: How many of its inputs are the step's own; the others are the state.
        examples: A value for each input.
    """
    pure, late, condition = _sort(module)
    nodes = list(module.graph.nodes)
    placeholders = [n for n in nodes if n.op == "placeholder"]
    returned = _flat_nodes(next(n for n in nodes if n.op == "output").args[0])
    constants = {n: getattr(module, str(n.target)) for n in nodes if n.op == "get_attr"}
    needed = [*returned, *(n for node in late for n in node.all_input_nodes)]
    needed += [] if condition is None else [condition]
    pure_set = set(pure)
    results = list(dict.fromkeys(n for n in needed if n in pure_set))
    script = _script(pure, results, placeholders, constants, examples)

    code = _Code()
    names: dict[Node, str] = {}
    arguments = [code.name(node, names) for node in placeholders]
    for node, tensor in constants.items():
        names[node] = code.constant(tensor)
    targets = "".join(f"{code.name(node, names)}, " for node in results)
    code.lines.append(f"{targets or '_'} = {code.constant(script)}({', '.join(arguments)})")
    if condition is not None:
        code.lines.append(f"{code.constant(_check)}({names[condition]})")
    for node in late:
        call = code.call(node, names)
        code.lines.append(f"{code.name(node, names)} = {call}")
    code.lines.append(f"return [{', '.join(names[n] for n in returned)}]")
    return code.compile(arguments)


def _script(
    pure: list[Node],
    results: list[Node],
    placeholders: list[Node],
    constants: dict[Node, torch.Tensor],
    examples: Sequence[torch.Tensor],
) -> Callable[..., Any]:
    """One TorchScript function of all inputs, the nodes without effects."""
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
        if (position := _mask_position(node)) is not None:
            copy = mapping[node]
            copy.target = _traceable(node.target)
            mask = [int(wanted) for wanted in copy.args[position]]
            copy.args = (*copy.args[:position], mask, *copy.args[position + 1 :])
    graph.output(tuple(mapping[n] for n in results))
    graph.eliminate_dead_code()
    module = GraphModule(root, graph)
    try:
        with torch.no_grad(), _same_random_state(), warnings.catch_warnings():
            # TorchScript is deprecated in favour of torch.compile, which takes a minute here.
            warnings.simplefilter("ignore")
            return torch.jit.trace(module, tuple(examples), check_trace=False)
    except (RuntimeError, ValueError) as error:
        logger.info("The captured step runs in Python, TorchScript refuses it: %s", error)
        return module


_LIBRARY = torch.library.Library("kbtrain", "DEF")


def _mask_position(node: Node) -> int | None:
    """Where an operation takes a list of booleans, which TorchScript cannot record."""
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
