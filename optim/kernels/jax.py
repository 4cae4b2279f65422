"""Execution on JAX: the rule is traced by the caller's ``jax.jit``, or runs eagerly, op by op.

XLA fuses the whole rule into one pass over a tensor, so there is nothing left to gain from a
hand-written kernel here.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from jax import lax
from jax.core import Tracer
from jax.experimental.sparse import JAXSparse
from keras import ops

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


def float32_gradient(gradient: Any, variable: Any) -> Any:
    """The gradient as a dense float32 array, of the shape it came in."""
    if isinstance(gradient, JAXSparse):
        gradient = gradient.todense()
    return ops.cast(gradient, "float32")


def execute(
    optimizer: Any, gradients: list[Any], variables: list[Any], step: Any, learning_rate: Any
) -> None:
    """Run the rule once per variable; assignments go through a `keras.StatelessScope`, if any.

    XLA is free to begin with the first operation of all variables, and keeps what a rule needs in
    between for all of them. So a rule that cannot be one loop over its tensor waits for the one
    before it.
    """
    zero = None
    for gradient, variable in zip(gradients, variables, strict=True):
        if zero is not None:
            gradient = gradient + zero
        optimizer.update_variable(gradient, variable, step, learning_rate)
        one_loop = getattr(type(optimizer.rule_of(variable)).update, "elementwise", False)
        if not one_loop and isinstance(gradient, Tracer):
            zero = _zero_after(ops.convert_to_tensor(variable))


def _zero_after(value: Any) -> Any:
    """A zero that is not known before ``value`` is, and that XLA does not know to be one."""
    first = lax.convert_element_type(value[(slice(1),) * value.ndim], "float32")
    bits = lax.bitcast_convert_type(first, "int32")
    return lax.convert_element_type(lax.population_count(bits).sum() >> 6, "float32")


def refresh(due: Any, compute: Callable[[Any, Any], Any], operand: Any, current: Any) -> Any:
    """``compute(operand, current)`` if it is due, else ``current``; XLA executes one of the two."""
    return lax.cond(due, compute, lambda operand, current: current, operand, current)


def take(table: Any, indices: Any) -> Any:
    """``table[indices]``, as it is."""
    return table.at[indices].get(mode="promise_in_bounds")
