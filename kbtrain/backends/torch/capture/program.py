"""A recorded torch step as a program: first what has no effect, then the check, then the changes.

Nearly all operations have no effect on the state. The few that change a variable (the fused
optimizer, a moving average, a counter) come last. Between the two stands the step's own finite
check: where it does not hold, nothing has been changed. All of it is one generated Python function
(`codegen`); with ``jit_compile=True``, ``torch.compile`` takes the part without effects.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, GraphModule, Node

from kbtrain.backends.torch.capture.codegen import Source
from kbtrain.backends.torch.capture.guard import GuardFailed, NotCapturable
from kbtrain.backends.torch.capture.large_gradients import Kept, keep_gradients
from kbtrain.backends.torch.capture.predication import drop_selections
from kbtrain.backends.torch.capture.simplify import (
    Memory,
    aliases,
    delay_assignments,
    fuse_bias,
    known_number,
    nodes_in,
    simplify,
)
from kbtrain.backends.torch.capture.views import copy_where_needed, plain_products, shorten_views

aten = torch.ops.aten
logger = logging.getLogger("kbtrain")

GUARD = aten._assert_async.default
"""Marks, in a recorded graph, that what follows happens only if its argument is true."""


class Part(NamedTuple):
    """The part of a recorded step that has no effect, as a function.

    Attributes:
        inputs: What it is given.
        constants: Nodes that stand for tensors, with these.
        nodes: The operations, in order.
        results: What the rest of the step needs of it.
    """

    inputs: list[Node]
    constants: dict[Node, torch.Tensor]
    nodes: list[Node]
    results: list[Node]


class Program(NamedTuple):
    """A recorded step that can be run.

    Attributes:
        run: A function of the step's inputs that returns a list of tensors.
        changes: Which of its inputs it changes, by number.
        holds: Tensors it uses besides them.
        waits: Why the device cannot run it alone (the host looks at a value); None if it can.
    """

    run: Callable[..., list[Any]]
    changes: list[int]
    holds: list[torch.Tensor]
    waits: str | None


def same_random_state() -> contextlib.AbstractContextManager[Any]:
    """What is drawn inside does not count: a run is the same whenever it captures a step."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    result: contextlib.AbstractContextManager[Any] = torch.random.fork_rng(devices)
    return result


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Nobody looks for garbage inside: among hundreds of thousands of new objects it takes long."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _check(*conditions: torch.Tensor) -> None:
    if not all(conditions):
        raise GuardFailed


def make_program(
    module: torch.nn.Module, examples: Sequence[torch.Tensor], inductor: bool, kept: Kept
) -> Program:
    """Compile a recorded step.

    Args:
        module: The recorded step: a ``torch.nn.Module`` with a ``graph``.
        examples: A value for each of its inputs.
        inductor: Compile the part without effects by ``torch.compile``.
        kept: Memory that the programs of one step share (``torch_kept``).

    Raises:
        NotCapturable: The state is changed before a check.
    """
    if any(_has_unknown_shape(node) for node in module.graph.nodes):
        raise NotCapturable("the shape of a result depends on values")
    drop_selections(module.graph)
    simplify(module)
    delay_assignments(module.graph)
    plain_products(module.graph)
    shorten_views(module.graph)
    copy_where_needed(module.graph)
    fuse_bias(module.graph)
    if not inductor:  # which arranges memory itself
        keep_gradients(module, kept)
    memory = Memory(module.graph)
    pure, late, conditions = _sort(module, memory)
    if any(condition in late for condition in conditions):
        raise NotCapturable("its loss depends on a value that Python reads, or on changed state")
    pure_set = set(pure)
    nodes = list(module.graph.nodes)
    placeholders = [n for n in nodes if n.op == "placeholder"]
    returned = nodes_in(next(n for n in nodes if n.op == "output").args[0])
    constants = {n: getattr(module, str(n.target)) for n in nodes if n.op == "get_attr" and n.users}
    needed = [*returned, *(n for node in late for n in node.all_input_nodes), *conditions]
    results = list(dict.fromkeys(n for n in needed if n in pure_set))
    part = Part(placeholders, constants, _erase_unused(module.graph, pure, results), results)
    compiled = _inductor(part, examples) if inductor else None

    source = Source(
        placeholders, constants, _last_uses([*part.nodes, *late], [*returned, *conditions])
    )
    if compiled is not None:
        source.assign(results, compiled, placeholders)
    else:
        for node in part.nodes:
            source.operation(node)
    if conditions:
        source.call(_check, conditions)
    for node in late:
        source.operation(node)
    changed = {owner for node in late for owner in _written(node, memory)}
    return Program(
        source.compile(returned),
        [i for i, node in enumerate(placeholders) if node in changed],
        list(constants.values()),
        "a condition is checked" if conditions else _reason_to_wait([*part.nodes, *late], changed),
    )


def _reason_to_wait(nodes: Sequence[Node], changed: set[Node]) -> str | None:
    if any(node.op == "get_attr" for node in changed):
        return "it changes a tensor that is no variable"
    for node in nodes:
        if _reads_value(node):
            return "a number is read from a tensor"
        if _UNSAFE in getattr(node.target, "tags", ()):
            return f"{node.target} looks at values"
    return None


_UNSAFE = getattr(torch.Tag, "cudagraph_unsafe", None)  # since torch 2.9


def _has_unknown_shape(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and any(known_number(n) is None for n in value.shape)


def _sort(module: torch.nn.Module, memory: Memory) -> tuple[list[Node], list[Node], list[Node]]:
    """Nodes that can run before any state is changed, the others, and the guards' conditions.

    The order within each list is the recorded one. A node may move before the changes if it
    neither reads what they have changed (the state, or a tensor that a fused optimizer advances in
    place) nor overwrites what they have read, and reads no value.
    """
    owners = memory.owners
    changed: set[Node] = set()
    read_late: set[Node] = set()
    late: dict[Node, None] = {}
    pure: list[Node] = []
    conditions: dict[Node, None] = {}
    for node in module.graph.nodes:
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        if node.target is GUARD:
            condition = nodes_in(node.args)[0]
            if condition not in conditions and any(map(_is_state, changed)):
                raise NotCapturable("it changes the state before a check")
            conditions[condition] = None
            continue
        written = _written(node, memory)
        read = {owner for source in node.all_input_nodes for owner in owners(source)}
        waits = read & changed or any(source in late for source in node.all_input_nodes)
        unmovable = any(map(_is_state, written)) or written & read_late
        if unmovable or waits or _reads_value(node):
            late[node] = None
            changed |= written
            read_late |= read
        else:
            pure.append(node)
    return pure, list(late), list(conditions)


def _reads_value(node: Node) -> bool:
    """Whether the result is a number read from a tensor, which the host has to wait for.

    Keras' SGD reads its learning rate so, to give it to an operation that takes only numbers.
    """
    value = node.meta.get("val")
    symbols = torch.SymInt | torch.SymFloat | torch.SymBool
    return isinstance(value, symbols) and known_number(value) is None


def _written(node: Node, memory: Memory) -> set[Node]:
    """Whose memory a node writes to."""
    return {owner for target in aliases(node, write=True) for owner in memory.owners(target)}


def _is_state(owner: Node) -> bool:
    """Whether memory is there before and after the step, and not its own."""
    result: bool = owner.op != "call_function"
    return result


# --- the part without effects ---------------------------------------------------------------------


def _erase_unused(graph: Graph, nodes: list[Node], results: list[Node]) -> list[Node]:
    """The nodes that the results need, and those with an effect of their own; the others go."""
    needed = set(results)
    used = []
    for node in reversed(nodes):
        if node in needed or node.is_impure():
            used.append(node)
            needed.update(node.all_input_nodes)
        else:
            graph.erase_node(node)
    return used[::-1]


def _last_uses(nodes: Sequence[Node], kept: Sequence[Node]) -> dict[Node, Node]:
    """The last of the nodes that uses each result of another; nothing for what is kept."""
    last: dict[Node, Node] = {}
    for node in nodes:
        for source in node.all_input_nodes:
            last[source] = node
    return {s: user for s, user in last.items() if s.op == "call_function" and s not in kept}


def _as_module(part: Part) -> GraphModule:
    """The function as a module that runs in Python."""
    graph, mapping, root = Graph(), {}, torch.nn.Module()
    for node in part.inputs:
        mapping[node] = graph.placeholder(node.name)
    for node, tensor in part.constants.items():
        name = f"constant{len(mapping)}"
        root.register_buffer(name, tensor)
        mapping[node] = graph.get_attr(name)
    for node in part.nodes:
        mapping[node] = graph.node_copy(node, lambda n: mapping[n])
    graph.output(tuple(mapping[n] for n in part.results))
    return GraphModule(root, graph)


def _inductor(part: Part, examples: Sequence[torch.Tensor]) -> Callable[..., Any] | None:
    """The function compiled by ``torch.compile``; None where that fails."""
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compiled = torch.compile(_as_module(part), fullgraph=True, dynamic=False)
            with same_random_state():
                compiled(*examples)
            result: Callable[..., Any] | None = compiled
            return result
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        logger.warning(
            "jit_compile=True: torch.compile failed (%s: %s), the captured step runs without it. "
            "It needs a C++ compiler; jit_compile='auto' needs none.",
            type(error).__name__,
            lines[0],
        )
        return None
