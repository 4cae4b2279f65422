"""Execution on TensorFlow: the rule is traced by the caller's ``tf.function``, or runs eagerly."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import keras
import tensorflow as tf

from optim.core.fallback import PrivateApi
from optim.core.precision import working_dtype
from optim.kernels.tensorflow import inplace_order
from optim.kernels.tensorflow.inplace_order import for_xla_on_cpu

FUSED: dict[str, Callable[..., None]] = {}


def no_gradient() -> AbstractContextManager[Any]:
    """TensorFlow records only under a tape, and one that the caller has opened is intended."""
    return nullcontext()


def colocated(variable: Any) -> AbstractContextManager[Any]:
    """Create variables on the device, and under the distribution strategy, of ``variable``."""
    native = getattr(variable, "value", variable)
    # tf.Variable.value is a method, keras.Variable.value the tf.Variable itself.
    native = variable if callable(native) else native
    result: AbstractContextManager[Any] = tf.distribute.get_strategy().extended.colocate_vars_with(
        native
    )
    return result


def outside_of_tracing() -> AbstractContextManager[Any]:
    """Read variables as they are now, also while a ``tf.function`` is traced."""
    result: AbstractContextManager[Any] = tf.init_scope()
    return result


def dense_gradient(gradient: Any, variable: Any, as_it_is: bool = False) -> Any:
    """The gradient, dense, of the working dtype; rows that `IndexedSlices` repeat are added up.

    Made dense before anything else sees it: a norm over the unsummed rows would be wrong, and the
    momentum of a row without a gradient decays like any other on every backend.
    """
    dtype = working_dtype(variable)
    if isinstance(gradient, tf.IndexedSlices):
        return tf.math.unsorted_segment_sum(
            tf.cast(gradient.values, dtype), gradient.indices, variable.shape[0]
        )
    if isinstance(gradient, tf.SparseTensor):
        gradient = tf.sparse.to_dense(gradient)
    return tf.cast(gradient, dtype)


def next_step(iterations: Any, dtype: str) -> Any:
    """The number of the update, 1 at the first, as a scalar."""
    return keras.ops.cast(iterations + 1, dtype)


def execute(
    optimizer: Any, gradients: list[Any], variables: list[Any], step: Any, learning_rate: Any
) -> None:
    """Run the rule once per variable.

    Under a `tf.distribute` strategy Keras' own loop does it (sum over the replicas, then
    `Optimizer.update_step` in every variable's update context). Where XLA compiles for a CPU,
    the results of an elementwise rule wait for those that read their old values
    (`optim.kernels.tensorflow.inplace_order`).
    """
    if tf.distribute.has_strategy():
        keras.optimizers.Optimizer._backend_update_step(
            optimizer, gradients, variables, learning_rate
        )
        return
    ordered = for_xla_on_cpu()
    for gradient, variable in zip(gradients, variables, strict=True):
        rule = type(optimizer.rule_of(variable)).update
        through = _in_place if ordered and getattr(rule, "elementwise", False) else None
        optimizer.update_variable(gradient, variable, step, learning_rate, through)


def _ordered(pure: Any, value: Any, gradient: Any, slots: dict[str, Any]) -> Any:
    return inplace_order.in_place(pure, value, gradient, slots)


_in_place = PrivateApi(
    "Taking an optimizer's rule apart (to update large variables in place)",
    "tensorflow",
    _ordered,
    lambda pure, value, gradient, slots: pure(value, gradient, slots),
    "The update of large variables takes longer under XLA on a CPU.",
)


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


def squared_norm(x: Any) -> Any:
    """The sum of the squares of all elements of a tensor."""
    return _sum_of_products(x, x)


def mean_product(x: Any, y: Any) -> Any:
    """The mean of the products of the elements of two tensors."""
    count = tf.size(x) if x.shape.num_elements() is None else x.shape.num_elements()
    return _sum_of_products(x, y) / tf.cast(count, x.dtype)


def _sum_of_products(x: Any, y: Any) -> Any:
    """On a CPU XLA adds one number after the other. Slices of the tensors are added as vectors."""
    count = x.shape.num_elements()
    if count is None or count < 1 << 12 or not for_xla_on_cpu():
        return tf.reduce_sum(x * y)
    x, y = tf.reshape(x, [-1]), tf.reshape(y, [-1])
    even = count - count % SLICES
    left, right = (tf.unstack(tf.reshape(z[:even], [SLICES, -1])) for z in (x, y))
    # Products of slices, not slices of products, which XLA would keep in memory.
    sums = [a * b for a, b in zip(left, right, strict=True)]
    while len(sums) > 1:
        sums = [a + b for a, b in zip(sums[::2], sums[1::2], strict=True)]
    return tf.reduce_sum(sums[0]) + tf.reduce_sum(x[even:] * y[even:])


SLICES = 16
"""A power of two."""


def singular_vectors(matrix: Any) -> Any:
    """The singular vectors on the smaller side of a matrix, as columns, the largest first."""
    left, _, right = keras.ops.svd(matrix, full_matrices=False)
    return left if matrix.shape[0] < matrix.shape[1] else keras.ops.transpose(right)


def matrix_dtype(x: Any) -> str:
    """bfloat16 where products of matrices are much faster in it: on a GPU or TPU."""
    devices = tf.config.list_physical_devices("GPU")
    if not devices:
        return "float32"
    details = tf.config.experimental.get_device_details(devices[0])
    return "bfloat16" if details.get("compute_capability", (0, 0)) >= (8, 0) else "float32"
