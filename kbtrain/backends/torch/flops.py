"""PyTorch: the floating-point operations of a step, by PyTorch's own formulas."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import keras
import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from kbtrain.backends.torch.capture.guard import NotCapturable
from kbtrain.backends.torch.capture.program import same_random_state
from kbtrain.backends.torch.device import is_oom, on_device
from kbtrain.backends.torch.float32_precision import is_allowed
from kbtrain.backends.torch.runner import UndeclaredVariable, context
from kbtrain.backends.uncounted import warn_of_uncounted
from kbtrain.utils.fallback import PrivateApi


def count_flops(
    fn: Callable[[Any], Any], variables: Sequence[keras.Variable], inputs: Any
) -> float:
    """The floating-point operations of products and convolutions in ``fn(inputs)``.

    The step is recorded as for training; one that cannot be recorded runs once.
    """
    tensors = keras.tree.map_structure(on_device, inputs)
    variables = list(variables)

    def step(inputs: Any) -> Any:
        with torch.no_grad(), context.running(variables, None):
            return fn(inputs)

    count: float = _count(step, variables, tensors)
    return count


def _recorded(step: Callable[[Any], Any], variables: list[keras.Variable], inputs: Any) -> float:
    from kbtrain.backends.torch.capture.step import record_step

    graph = None
    before, context.capturing = context.capturing, True
    try:
        while graph is None:
            try:
                graph = record_step(step, variables, inputs)[0].graph
            except UndeclaredVariable as undeclared:
                variables.append(undeclared.variable)
    except NotCapturable:
        graph = None
    finally:
        context.capturing = before
    if graph is None:
        return _run(step, variables, inputs)
    unknown: list[str] = []
    count = sum(_of_node(node, unknown) for node in graph.nodes if node.op == "call_function")
    warn_of_uncounted(unknown)
    return float(count)


OWN = ("aten", "prim", "prims", "kbtrain", "c10d_functional", "_c10d_functional", "_operator")
"""Namespaces of operations without products besides those that PyTorch has formulas for."""


def _of_node(node: Any, unknown: list[str]) -> float:
    name = str(node.target)
    formula = flop_registry.get(getattr(node.target, "overloadpacket", None))
    if "scaled_dot_product" in name:
        return _of_attention(node)
    if formula is None:
        recurrent = any(part in name for part in ("_rnn", "lstm", "gru"))
        if recurrent or getattr(node.target, "namespace", OWN[0]) not in OWN:
            unknown.append(name)
        return 0.0
    args = torch.fx.map_arg(node.args, lambda each: each.meta["val"])
    kwargs = torch.fx.map_arg(node.kwargs, lambda each: each.meta["val"])
    return float(formula(*args, **kwargs, out_val=node.meta["val"]))


def _of_attention(node: Any) -> float:
    """Of any kernel for attention: PyTorch leaves out that of the CPU.

    Its backward pass takes twice as much; what it computes again does not count.
    """
    backward = "backward" in str(node.target)
    query, key, value = (each.meta["val"].shape for each in node.args[backward : 3 + backward])
    flops: float = 2.0 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])
    return 2 * flops if backward else flops


def _run(step: Callable[[Any], Any], variables: list[keras.Variable], inputs: Any) -> float:
    with same_random_state(), FlopCounterMode(display=False) as counter:
        step(inputs)
    return float(counter.get_total_flops())


_count = PrivateApi(
    "Counting floating-point operations in a recorded step",
    "torch",
    _recorded,
    _run,
    "The step runs once more to be counted.",
    passes=is_oom,
)


def tf32_is_on() -> bool:
    """Whether products in float32 use TensorFloat-32 on a GPU that has it."""
    return is_allowed()
