"""TensorFlow: one update of the optimizer, compiled by XLA where passes over memory count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

LARGE_BYTES = 1 << 20
"""Size of trained variables from which on passes over memory count."""

BYTES_PER_VARIABLE = 1 << 18
"""Their mean size from which on compiling the update pays: each takes megabytes to compile."""

# fmt: off
_ELEMENTWISE = frozenset([
    "Abs", "Add", "AddN", "AddV2", "AssignAddVariableOp", "AssignSubVariableOp",
    "AssignVariableOp", "Cast", "Const", "Cos", "Div", "DivNoNan", "Equal", "Exp", "Expm1",
    "Floor", "FloorMod", "Greater", "GreaterEqual", "Identity", "IdentityN", "Less", "LessEqual",
    "Log", "Log1p", "LogicalAnd", "LogicalNot", "LogicalOr", "Maximum", "Minimum", "Mul", "Neg",
    "NoOp", "NotEqual", "OnesLike", "Placeholder", "Pow", "ReadVariableOp", "RealDiv",
    "Reciprocal", "Rsqrt", "Select", "SelectV2", "Sigmoid", "Sign", "Sqrt", "Square",
    "SquaredDifference", "StopGradient", "Sub", "Tanh", "ZerosLike",
])
# fmt: on
"""What XLA makes one pass of, and certainly compiles."""


def apply_optimizer(
    optimizer: keras.optimizers.Optimizer,
    gradients: Sequence[Any],
    factor: Any,
    variables: Sequence[keras.Variable],
) -> None:
    """Update ``variables`` with the gradients times ``factor``, a scalar.

    In a graph each operation of the rule is a pass over memory. So where the rule is elementwise
    and the variables are large, XLA compiles it, also in a step that otherwise runs as a graph.
    """

    def apply(gradients: Sequence[Any], factor: Any) -> None:
        optimizer.apply(_scale(gradients, factor), list(variables))

    gradients = list(gradients)
    least = max(LARGE_BYTES, len(gradients) * BYTES_PER_VARIABLE)
    if tf.inside_function() and sum(map(size_of, gradients)) >= least:
        traced = tf.function(apply, autograph=False).get_concrete_function(gradients, factor)
        if all(operation.type in _ELEMENTWISE for operation in traced.graph.get_operations()):
            compiled = tf.function(lambda *given: traced(*given), jit_compile=True, autograph=False)
            compiled(gradients, factor)
            return
    apply(gradients, factor)


def size_of(tensor: Any) -> int:
    """Bytes of a tensor; 0 if its shape is not known."""
    return (tensor.shape.num_elements() or 0) * tensor.dtype.size


def global_norm(gradients: Sequence[Any]) -> Any:
    """Euclidean norm over all elements of all gradients, in float32."""
    halves = [tf.nn.l2_loss(tf.cast(g, "float32")) for g in gradients]  # needs no squares in memory
    return tf.sqrt(2.0 * tf.add_n(halves))


def _scale(gradients: Sequence[Any], factor: Any) -> list[Any]:
    """Multiply every gradient by one scalar, keeping dtypes."""
    return [g * tf.cast(factor, g.dtype) for g in gradients]
