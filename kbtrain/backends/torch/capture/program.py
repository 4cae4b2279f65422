"""A recorded torch step as a program: pure operations, then the check, then the state changes.

Nearly all operations are pure. The few that change a variable (the fused optimizer, a moving
average, a counter) come last. Between the two is the finite check of the step: if it fails, nothing
has been changed. The whole is one generated Python function (``codegen``); with
``jit_compile=True`` the pure region is compiled by ``torch.compile``.
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

from kbtrain.backends.torch import fusion
from kbtrain.backends.torch.capture.aliasing import (
    AliasAnalysis,
    aliases,
    is_collective,
    nodes_in,
)
from kbtrain.backends.torch.capture.codegen import FunctionSource
from kbtrain.backends.torch.capture.guard import GuardFailed, NotCapturable
from kbtrain.backends.torch.capture.large_gradients import KeptMemory, keep_gradients
from kbtrain.backends.torch.capture.overlap import start_early
from kbtrain.backends.torch.capture.predication import drop_selections
from kbtrain.backends.torch.capture.simplify import (
    delay_assignments,
    fuse_bias,
    known_number,
    simplify,
)
from kbtrain.backends.torch.capture.views import (
    allow_other_strides,
    copy_where_needed,
    plain_products,
    shorten_views,
)
from kbtrain.backends.torch.device import accelerator

aten = torch.ops.aten
logger = logging.getLogger("kbtrain")

GUARD = aten._assert_async.default
"""Marks, in a recorded graph, that everything after it requires its argument to be true."""


class PureRegion(NamedTuple):
    """The operations of a recorded step without side effects, as a function.

    Attributes:
        inputs: The inputs.
        constants: Nodes that represent constant tensors, with these tensors.
        nodes: The operations, in order.
        results: The results that the rest of the step uses.
    """

    inputs: list[Node]
    constants: dict[Node, torch.Tensor]
    nodes: list[Node]
    results: list[Node]


class StepProgram(NamedTuple):
    """A recorded step in executable form.

    Attributes:
        run: A function of the step's inputs that returns a list of tensors.
        changes: Indices of the inputs that it changes.
        holds: Constant tensors that it uses.
        waits: Why the host must wait for the device (it reads a value); None if it need not.
    """

    run: Callable[..., list[Any]]
    changes: list[int]
    holds: list[torch.Tensor]
    waits: str | None


def same_random_state() -> contextlib.AbstractContextManager[Any]:
    """Context that restores the random state, so that capturing a step does not affect the run."""
    device = accelerator()
    result: contextlib.AbstractContextManager[Any]
    if device is None or device.type == "mps":  # has one generator, which a record does not use
        result = torch.random.fork_rng([])
    else:
        result = torch.random.fork_rng([device], device_type=device.type)
    return result


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Context without garbage collection, which is slow with hundreds of thousands of objects."""
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
    module: torch.nn.Module, examples: Sequence[torch.Tensor], inductor: bool, kept: KeptMemory
) -> StepProgram:
    """Compile a recorded step.

    Args:
        module: The recorded step: a ``torch.nn.Module`` with a ``graph``.
        examples: A value for each of its inputs.
        inductor: Whether to compile the pure region with ``torch.compile``.
        kept: Memory that the programs of one step share (``large_gradients``).

    Raises:
        NotCapturable: The state is changed before a check.
        fusion.Failure: It could not be rewritten for a GPU; recorded again, it runs as it is.
    """
    if any(_has_unknown_shape(node) for node in module.graph.nodes):
        raise NotCapturable("the shape of a result depends on values")
    on_gpu = fusion.applies_to(examples)
    if on_gpu:
        fusion.use_arguments(module.graph)
    drop_selections(module.graph)
    simplify(module)
    delay_assignments(module.graph)
    plain_products(module.graph)
    shorten_views(module.graph)
    copy_where_needed(module.graph)
    fuse_bias(module.graph)
    allow_other_strides(module.graph)
    if not inductor:  # inductor plans memory itself
        keep_gradients(module, kept)
    analysis = AliasAnalysis(module.graph)
    pure, late, conditions = _sort(module, analysis)
    if any(condition in late for condition in conditions):
        raise NotCapturable("its loss depends on a value that Python reads, or on changed state")
    pure_set = set(pure)
    nodes = list(module.graph.nodes)
    placeholders = [n for n in nodes if n.op == "placeholder"]
    returned = nodes_in(next(n for n in nodes if n.op == "output").args[0])
    constants = {n: getattr(module, str(n.target)) for n in nodes if n.op == "get_attr" and n.users}
    needed = [*returned, *(n for node in late for n in node.all_input_nodes), *conditions]
    results = list(dict.fromkeys(n for n in needed if n in pure_set))
    used = start_early(_erase_unused(module.graph, pure, results), analysis)
    results += [n for n in used if is_collective(n) and not n.users]  # or inductor drops them
    region = PureRegion(placeholders, constants, used, results)
    compiled = _inductor(region, examples) if inductor else None
    changed = {owner for node in late for owner in _written(node, analysis)}
    reason = _reason_to_wait([*region.nodes, *late], changed)
    waits = "a condition is checked" if conditions else reason
    if on_gpu and compiled is None and not conditions:
        used, late = fusion.fewer_kernels(used, late, analysis, constants), []
        returned = nodes_in(next(n for n in nodes if n.op == "output").args[0])

    source = FunctionSource(
        placeholders, constants, _last_uses([*used, *late], [*returned, *conditions])
    )
    if compiled is not None:
        source.assign(results, compiled, placeholders)
    else:
        for node in used:
            source.operation(node)
    if conditions:
        source.call(_check, conditions)
    for node in late:
        source.operation(node)
    return StepProgram(
        source.compile(returned),
        [i for i, node in enumerate(placeholders) if node in changed],
        list(constants.values()),
        waits,
    )


def _reason_to_wait(nodes: Sequence[Node], changed: set[Node]) -> str | None:
    if any(node.op == "get_attr" for node in changed):
        return "it changes a tensor that is no variable"
    for node in nodes:
        if is_collective(node):
            return "processes exchange tensors in it"
        if _reads_value(node):
            return "a number is read from a tensor"
        if _UNSAFE in getattr(node.target, "tags", ()):
            return f"{node.target} reads values"
    return None


_UNSAFE = getattr(torch.Tag, "cudagraph_unsafe", None)  # since torch 2.9


def _has_unknown_shape(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and any(known_number(n) is None for n in value.shape)


def _sort(
    module: torch.nn.Module, analysis: AliasAnalysis
) -> tuple[list[Node], list[Node], list[Node]]:
    """Nodes that can run before any state changes, the other nodes, and the guards' conditions.

    Each list keeps the recorded order. A node may move before the state changes if it neither reads
    memory they have written (the state, or a tensor that a fused optimizer updates in place) nor
    overwrites memory they have read, and reads no value on the host. Collective operations stay in
    their order among each other.
    """
    owners = analysis.owners
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
        written = _written(node, analysis)
        read = {owner for source in node.all_input_nodes for owner in owners(source)}
        waits = read & changed or any(source in late for source in node.all_input_nodes)
        waits = waits or (is_collective(node) and any(map(is_collective, late)))
        unmovable = any(map(_is_state, written)) or written & read_late
        if unmovable or waits or _reads_value(node):
            late[node] = None
            changed |= written
            read_late |= read
        else:
            pure.append(node)
    return pure, list(late), list(conditions)


def _reads_value(node: Node) -> bool:
    """Whether the result is a number read from a tensor, for which the host must wait.

    Keras' SGD reads its learning rate this way, for an operation that only takes numbers.
    """
    value = node.meta.get("val")
    symbols = torch.SymInt | torch.SymFloat | torch.SymBool
    return isinstance(value, symbols) and known_number(value) is None


def _written(node: Node, analysis: AliasAnalysis) -> set[Node]:
    """The owners of the memory that a node writes to."""
    return {owner for target in aliases(node, write=True) for owner in analysis.owners(target)}


def _is_state(owner: Node) -> bool:
    """Whether memory outlives the step, as opposed to a temporary of the step."""
    result: bool = owner.op != "call_function"
    return result


# --- the pure region ------------------------------------------------------------------------------


def _erase_unused(graph: Graph, nodes: list[Node], results: list[Node]) -> list[Node]:
    """Remove nodes that the results do not need and that have no side effects; return the rest."""
    needed = set(results)
    used = []
    for node in reversed(nodes):
        if node in needed or node.is_impure() or is_collective(node):
            used.append(node)
            needed.update(node.all_input_nodes)
        else:
            graph.erase_node(node)
    return used[::-1]


def _last_uses(nodes: Sequence[Node], kept: Sequence[Node]) -> dict[Node, Node]:
    """The last user of each node, except for nodes that are kept."""
    last: dict[Node, Node] = {}
    for node in nodes:
        for source in node.all_input_nodes:
            last[source] = node
    return {s: user for s, user in last.items() if s.op == "call_function" and s not in kept}


def _as_module(region: PureRegion) -> GraphModule:
    """The region as a module that runs in Python."""
    graph, mapping, root = Graph(), {}, torch.nn.Module()
    for node in region.inputs:
        mapping[node] = graph.placeholder(node.name)
    for node, tensor in region.constants.items():
        name = f"constant{len(mapping)}"
        root.register_buffer(name, tensor)
        mapping[node] = graph.get_attr(name)
    for node in region.nodes:
        mapping[node] = graph.node_copy(node, lambda n: mapping[n])
    graph.output(tuple(mapping[n] for n in region.results))
    return GraphModule(root, graph)


def _inductor(region: PureRegion, examples: Sequence[torch.Tensor]) -> Callable[..., Any] | None:
    """The region compiled by ``torch.compile``; None if that fails."""
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compiled = torch.compile(_as_module(region), fullgraph=True, dynamic=False)
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
