"""TensorFlow: the floating-point operations of a step, counted in its graph."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from kbtrain.backends.tensorflow.scope import context
from kbtrain.backends.uncounted import warn_of_uncounted
from kbtrain.utils.fallback import PrivateApi


def count_flops(
    fn: Callable[[Any], Any], variables: Sequence[keras.Variable], inputs: Any
) -> float:
    """The floating-point operations of products and convolutions in ``fn(inputs)``.

    Of the branches of a condition the most expensive one counts, of a loop without a known
    maximum of rounds one round, of a tensor whose shape depends on values nothing.
    """

    def traced(inputs: Any) -> Any:
        with context.tracing(variables):
            return fn(inputs)

    graph = (
        tf.function(functools.partial(traced), autograph=False)
        .get_concrete_function(tf.nest.map_structure(tf.convert_to_tensor, inputs))
        .graph
    )
    functions = {f.signature.name: f for f in graph.as_graph_def(add_shapes=True).library.function}
    unknown: list[str] = []
    count = _of_graph(graph, functions, unknown)
    warn_of_uncounted(unknown)
    return count


def tf32_is_on() -> bool:
    """Whether products in float32 use TensorFloat-32 on a GPU that has it."""
    return bool(tf.config.experimental.tensor_float_32_execution_enabled())


def _of_graph(graph: Any, functions: dict[str, Any], unknown: list[str]) -> float:
    """Of the operations that the results depend on: TensorFlow does not run the others."""
    waiting, seen = [tensor.op for tensor in graph.outputs], set()
    total = 0.0
    while waiting:
        op = waiting.pop()
        if op.name not in seen:
            seen.add(op.name)
            total += _of_operation(op, functions, unknown)
            waiting += [tensor.op for tensor in op.inputs]
    return total


def _of_operation(op: Any, functions: dict[str, Any], unknown: list[str]) -> float:
    kind = op.type
    if kind in _FORMULAS:
        return _FORMULAS[kind](op)
    if "CudnnRNN" in kind or "PyFunc" in kind or "CustomCall" in kind:
        unknown.append(kind)

    def inner(attribute: str) -> float:
        function = functions.get(op.get_attr(attribute).name)
        return 0.0 if function is None else float(_of_function(function, functions, unknown))

    if kind in ("PartitionedCall", "StatefulPartitionedCall"):
        return inner("f")
    if kind in ("If", "StatelessIf"):
        return max(inner("then_branch"), inner("else_branch"))
    if kind in ("While", "StatelessWhile"):
        return inner("body") * (_number(op.inputs[1]) if len(op.inputs) > 1 else 1)
    return 0.0


def _number(rounds: Any) -> int:
    """The maximum of rounds of a loop; 1 if it is not known."""
    value = tf.get_static_value(rounds)
    if value is None and rounds.op.type in ("Max", "Identity", "Cast"):
        return _number(rounds.op.inputs[0])  # a Max over one number, from Keras
    known = value is not None and getattr(value, "size", 0) == 1 and value > 0
    return int(value) if known else 1


def _nested(function: Any, functions: dict[str, Any], unknown: list[str]) -> float:
    from tensorflow.python.framework import function_def_to_graph

    graph = function_def_to_graph.function_def_to_graph(function)
    return _of_graph(graph, functions, unknown)


_of_function = PrivateApi(
    "Counting floating-point operations inside a function of a graph",
    "tensorflow",
    _nested,
    lambda function, functions, unknown: 0.0,
    "Those of loops and conditions do not count.",
)


def _of_product(op: Any, transposed: str) -> float:
    left, out = _shape(op.inputs[0]), _shape(op.outputs[0])
    return 2.0 * math.prod(out) * left[-2 if op.get_attr(transposed) else -1]


def _of_einsum(op: Any) -> float:
    terms = op.get_attr("equation").decode().partition("->")[0].split(",")
    sizes: dict[str, int] = {}
    batch = 1
    for term, tensor in zip(terms, op.inputs, strict=True):
        shape = list(_shape(tensor))
        start, dots, end = term.partition("...")
        covered = shape[len(start) : len(shape) - len(end)] if dots else []
        batch = max(batch, math.prod(covered))
        named = [*shape[: len(start)], *(shape[len(shape) - len(end) :] if end else [])]
        sizes |= dict(zip(start + end, named, strict=True))
    return (2.0 if len(terms) > 1 else 0.0) * batch * math.prod(sizes.values())


def _of_convolution(op: Any, filters: Any, result: Any) -> float:
    """Of a convolution, and of its gradients, which multiply the same pairs of numbers.

    Args:
        op: The operation.
        filters: The shape of its filters.
        result: The tensor that has the shape of the convolution's result.
    """
    shape = _shape(result)
    last = op.get_attr("data_format").decode().endswith("C")
    places = shape[1:-1] if last else shape[2:]
    return 2.0 * float(shape[0] * math.prod(places) * math.prod(filters))


def _shape(tensor: Any) -> tuple[int, ...]:
    """The shape of a tensor; one of zeros if it depends on values."""
    shape = tensor.shape
    if shape.rank is None:
        return (0, 0, 0, 0, 0)
    return tuple(0 if size is None else size for size in shape)


_FORMULAS: dict[str, Callable[[Any], float]] = {
    "MatMul": lambda op: _of_product(op, "transpose_a"),
    **{
        name: lambda op: _of_product(op, "adj_x")
        for name in ("BatchMatMul", "BatchMatMulV2", "BatchMatMulV3")
    },
    "Einsum": _of_einsum,
    **{
        name: lambda op: _of_convolution(op, _shape(op.inputs[1]), op.outputs[0])
        for name in ("Conv2D", "Conv3D", "DepthwiseConv2dNative")
    },
    **{
        name: lambda op: _of_convolution(op, _shape(op.inputs[1]), op.inputs[2])
        for name in (
            "Conv2DBackpropInput",
            "Conv3DBackpropInputV2",
            "DepthwiseConv2dNativeBackpropInput",
        )
    },
    **{
        name: lambda op: _of_convolution(op, _shape(op.outputs[0]), op.inputs[2])
        for name in (
            "Conv2DBackpropFilter",
            "Conv3DBackpropFilterV2",
            "DepthwiseConv2dNativeBackpropFilter",
        )
    },
}
