"""Execution on JAX: the rule is traced by the caller's ``jax.jit``, or runs eagerly, op by op.

XLA fuses the whole rule into one pass over a tensor, so there is nothing left to gain from a
hand-written kernel here.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import jax
from jax import lax
from jax.core import Tracer
from jax.experimental.sparse import JAXSparse
from keras import ops

from optim.core.fallback import PrivateApi
from optim.core.precision import working_dtype
from optim.kernels.inplace_order import LARGE, Pure
from optim.kernels.jax.wait import after, zero_after

FUSED: dict[str, Callable[..., None]] = {}


def no_gradient() -> AbstractContextManager[Any]:
    """JAX records nothing outside of its own transformations."""
    return nullcontext()


def colocated(variable: Any) -> AbstractContextManager[Any]:
    """Placement on JAX is the variable's layout, which the slot receives by itself."""
    return nullcontext()


def outside_of_tracing() -> AbstractContextManager[Any]:
    """Values are concrete wherever state is made on JAX."""
    return nullcontext()


def dense_gradient(gradient: Any, variable: Any, as_it_is: bool = False) -> Any:
    """The gradient as a dense array of the working dtype, of the shape it came in."""
    if isinstance(gradient, JAXSparse):
        gradient = gradient.todense()
    return ops.cast(gradient, working_dtype(variable))


def next_step(iterations: Any, dtype: str) -> Any:
    """The number of the update, 1 at the first, as a scalar."""
    return ops.cast(iterations + 1, dtype)


def execute(
    optimizer: Any, gradients: list[Any], variables: list[Any], step: Any, learning_rate: Any
) -> None:
    """Run the rule once per variable; assignments go through a `keras.StatelessScope`, if any.

    XLA is free to begin with the first operation of all variables, and keeps what a rule needs in
    between for all of them. So a rule that cannot be one loop over its tensor waits for the one
    before it. On a CPU results also wait for those that read their old values
    (`optim.kernels.jax.inplace_order`).
    """
    zero = None
    for gradient, variable in zip(gradients, variables, strict=True):
        rule = type(optimizer.rule_of(variable)).update
        through = _InOrder(zero, getattr(rule, "elementwise", False))
        optimizer.update_variable(gradient, variable, step, learning_rate, through)
        if isinstance(gradient, Tracer) and not through.one_loop:
            zero = zero_after(ops.convert_to_tensor(variable))


@dataclass
class _InOrder:
    """How the rule of one variable is executed.

    Attributes:
        zero: What it waits for, if anything.
        one_loop: Whether the rule is elementwise; after the call, whether it is one loop, too.
    """

    zero: Any
    one_loop: bool

    def __call__(self, pure: Pure, value: Any, gradient: Any, slots: dict[str, Any]) -> Any:
        if self.zero is not None:
            gradient = after(self.zero, gradient)
            slots = {
                name: after(self.zero, slot) if slot.ndim and slot.dtype == "uint8" else slot
                for name, slot in slots.items()
            }
        if not (self.one_loop and isinstance(gradient, Tracer) and _on_cpu()):
            return pure(value, gradient, slots)
        if gradient.size < LARGE:
            return pure(value, gradient, slots)
        result, self.one_loop = _in_place(pure, value, gradient, slots)
        return result


def _ordered(pure: Pure, value: Any, gradient: Any, slots: dict[str, Any]) -> Any:
    from optim.kernels.jax.inplace_order import in_place

    return in_place(pure, value, gradient, slots)


_in_place = PrivateApi(
    "Taking an optimizer's rule apart (to update large variables in place)",
    "jax",
    _ordered,
    lambda pure, value, gradient, slots: (pure(value, gradient, slots), False),
    "The update of large variables takes longer on a CPU.",
)


def _on_cpu() -> bool:
    """Whether what is traced now will run on a CPU."""
    chosen = jax.config.jax_default_device
    platform = jax.default_backend() if chosen is None else getattr(chosen, "platform", chosen)
    return str(platform).startswith("cpu")


def refresh(due: Any, compute: Callable[[Any, Any], Any], operand: Any, current: Any) -> Any:
    """``compute(operand, current)`` if it is due, else ``current``; XLA executes one of the two."""
    return lax.cond(due, compute, lambda operand, current: current, operand, current)


def take(table: Any, indices: Any) -> Any:
    """``table[indices]``, as it is."""
    return table.at[indices].get(mode="promise_in_bounds")


def squared_norm(x: Any) -> Any:
    """The sum of the squares of all elements of a tensor."""
    return ops.sum(x * x)


def mean_product(x: Any, y: Any) -> Any:
    """The mean of the products of the elements of two tensors."""
    return ops.mean(x * y)


def singular_vectors(matrix: Any) -> Any:
    """The singular vectors on the smaller side of a matrix, as columns, the largest first."""
    left, _, right = ops.svd(matrix, full_matrices=False)
    return left if matrix.shape[0] < matrix.shape[1] else ops.transpose(right)


def matrix_dtype(x: Any) -> str:
    """bfloat16 where products of matrices are much faster in it: on a GPU or TPU."""
    if _on_cpu():
        return "float32"
    capability = getattr(jax.devices()[0], "compute_capability", None)  # of GPUs only
    return "bfloat16" if capability is None or float(capability) >= 8.0 else "float32"
