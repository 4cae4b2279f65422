"""TensorFlow: one optimizer update, compiled by XLA where memory bandwidth dominates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from kbtrain.backends.scopes import is_overwritten
from kbtrain.utils.fallback import PrivateApi

LARGE_BYTES = 1 << 20
"""Total size of trained variables above which memory bandwidth dominates."""

BYTES_PER_VARIABLE = 1 << 18
"""Mean size above which compiling pays off; compiling takes megabytes per variable."""

# fmt: off
_ELEMENTWISE = frozenset([
    "Abs", "Add", "AddN", "AddV2", "AssignAddVariableOp", "AssignSubVariableOp",
    "AssignVariableOp", "Bitcast", "Cast", "Const", "Cos", "Div", "DivNoNan", "Equal", "Exp",
    "Expm1", "Floor", "FloorMod", "Greater", "GreaterEqual", "Identity", "IdentityN", "Less",
    "LessEqual", "Log", "Log1p", "LogicalAnd", "LogicalNot", "LogicalOr", "Maximum", "Minimum",
    "Mul", "Neg", "NoOp", "NotEqual", "OnesLike", "Placeholder", "PopulationCount", "Pow",
    "ReadVariableOp", "RealDiv", "Reciprocal", "Reshape", "RightShift", "Rsqrt", "Select",
    "SelectV2", "Sigmoid", "Sign", "Slice", "Sqrt", "Square", "SquaredDifference", "StopGradient",
    "Sub", "Tanh", "ZerosLike",
])
# fmt: on
"""Operations that XLA fuses into one pass and always compiles."""


def apply_optimizer(
    optimizer: keras.optimizers.Optimizer,
    gradients: Sequence[Any],
    factor: Any,
    variables: Sequence[keras.Variable],
) -> None:
    """Apply the gradients, multiplied by the scalar ``factor``, to ``variables``.

    Gradients that overwrite their variable are not multiplied.

    In a graph each operation of the rule is a pass over memory. If the rule is elementwise and the
    variables are large, XLA therefore compiles the update, even in a step that runs as a graph.
    """

    def apply(gradients: Sequence[Any], factor: Any) -> None:
        optimizer.apply(_scale(gradients, factor, variables), list(variables))

    gradients = list(gradients)
    least = max(LARGE_BYTES, len(gradients) * BYTES_PER_VARIABLE)
    if tf.inside_function() and sum(map(size_of, gradients)) >= least:
        compiled = tf.function(apply, jit_compile=True, autograph=False)
        traced = compiled.get_concrete_function(gradients, factor)
        if all(operation.type in _ELEMENTWISE for operation in traced.graph.get_operations()):
            compiled(gradients, factor)
            return
    apply(gradients, factor)


def size_of(tensor: Any) -> int:
    """Bytes of a tensor; 0 if its shape is unknown."""
    result: int = (tensor.shape.num_elements() or 0) * tensor.dtype.size
    return result


def global_norm(gradients: Sequence[Any]) -> Any:
    """The Euclidean norm over all gradients, in float32, or in float64 if any of them is."""
    dtype = "float64" if any(g.dtype == tf.float64 for g in gradients) else "float32"
    square = _squared_norm if _for_xla_on_cpu() else _squared_norm_of_a_graph
    return tf.sqrt(tf.add_n([square(tf.cast(g, dtype)) for g in gradients]))


def _for_xla_on_cpu() -> bool:
    """Whether the current trace is compiled by XLA for a CPU."""
    return _for_xla() and not tf.config.list_logical_devices("GPU")


def _asks_the_graph() -> bool:
    from tensorflow.python.ops import control_flow_util

    graph = tf.compat.v1.get_default_graph()
    return bool(control_flow_util.GraphOrParentsInXlaContext(graph))


_for_xla = PrivateApi(
    "Asking a graph whether XLA compiles it",
    "tensorflow",
    _asks_the_graph,
    lambda: False,
    "The gradient norm takes longer under XLA on a CPU.",
)


def _squared_norm_of_a_graph(tensor: Any) -> Any:
    return 2.0 * tf.nn.l2_loss(tensor)  # does not store the squares


SLICES = 16
"""A power of two."""


def _squared_norm(tensor: Any) -> Any:
    """The sum of squares, vectorised: XLA on a CPU reduces sequentially."""
    count = tensor.shape.num_elements()
    if count is None or count < 1 << 12:
        return tf.reduce_sum(tensor * tensor)
    flat = tf.reshape(tensor, [-1])
    even = count - count % SLICES
    slices = tf.unstack(tf.reshape(flat[:even] if even < count else flat, [SLICES, -1]))
    # Squares of slices, not slices of the square, which XLA would materialise.
    sums = [part * part for part in slices]
    while len(sums) > 1:
        sums = [a + b for a, b in zip(sums[::2], sums[1::2], strict=True)]
    rest = flat[even:]
    return tf.reduce_sum(sums[0]) + (tf.reduce_sum(rest * rest) if even < count else 0.0)


def _scale(gradients: Sequence[Any], factor: Any, variables: Sequence[keras.Variable]) -> list[Any]:
    """Multiply every gradient by one scalar, keeping dtypes."""
    return [
        g if is_overwritten(v) else g * tf.cast(factor, g.dtype)
        for g, v in zip(gradients, variables, strict=True)
    ]
