"""Execution on TensorFlow: the rule is traced by the caller's ``tf.function``, or runs eagerly."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import keras
import tensorflow as tf

FUSED: dict[str, Callable[..., None]] = {}


def no_gradient() -> AbstractContextManager[Any]:
    """TensorFlow records only under a tape, and a tape of the caller's is the caller's wish."""
    return nullcontext()


def colocated(variable: Any) -> AbstractContextManager[Any]:
    """Create variables on the device, and under the distribution strategy, of ``variable``."""
    native = getattr(variable, "value", variable)
    # tf.Variable.value is a method, keras.Variable.value the tf.Variable itself.
    native = variable if callable(native) else native
    return tf.distribute.get_strategy().extended.colocate_vars_with(native)


def outside_of_tracing() -> AbstractContextManager[Any]:
    """Read variables as they are now, also while a ``tf.function`` is traced."""
    return tf.init_scope()


def float32_gradient(gradient: Any, variable: Any) -> Any:
    """The gradient as a dense float32 tensor; rows that an `IndexedSlices` repeats are added up.

    Made dense before anything else sees it: a norm over the unsummed rows would be wrong, and the
    momentum of a row without a gradient decays like any other on every backend.
    """
    if isinstance(gradient, tf.IndexedSlices):
        return tf.math.unsorted_segment_sum(
            tf.cast(gradient.values, tf.float32), gradient.indices, variable.shape[0]
        )
    if isinstance(gradient, tf.SparseTensor):
        gradient = tf.sparse.to_dense(gradient)
    return tf.cast(gradient, tf.float32)


def execute(
    optimizer: Any, gradients: list[Any], variables: list[Any], step: Any, learning_rate: Any
) -> None:
    """Run the rule once per variable.

    Under a `tf.distribute` strategy Keras' own walk does it (sum over the replicas, then
    `Optimizer.update_step` in every variable's update context).
    """
    if tf.distribute.has_strategy():
        keras.optimizers.Optimizer._backend_update_step(
            optimizer, gradients, variables, learning_rate
        )
        return
    for gradient, variable in zip(gradients, variables, strict=True):
        optimizer.update_variable(gradient, variable, step, learning_rate)


def refresh(due: Any, compute: Callable[[Any, Any], Any], operand: Any, current: Any) -> Any:
    """``compute(operand, current)`` if it is due, else ``current``; one of the two is executed."""
    # The same shape on both sides: what a slice of a decomposition has is not known to a trace.
    return tf.cond(
        due,
        lambda: tf.ensure_shape(compute(operand, current), current.shape),
        lambda: tf.identity(current),
    )


def take(table: Any, indices: Any) -> Any:
    """``table[indices]``, as it is."""
    return tf.gather(table, indices)


def singular_vectors(matrix: Any) -> Any:
    """The singular vectors on the smaller side of a matrix, as columns, the largest first."""
    left, _, right = keras.ops.svd(matrix, full_matrices=False)
    return left if matrix.shape[0] < matrix.shape[1] else keras.ops.transpose(right)
