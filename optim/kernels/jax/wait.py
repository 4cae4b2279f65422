"""JAX: operations that wait for others."""

from __future__ import annotations

from typing import Any

from jax import lax


def zero_after(value: Any) -> Any:
    """A zero that is not known before ``value`` is, and that XLA does not know to be one."""
    first = lax.convert_element_type(value[(slice(1),) * value.ndim], "float32")
    bits = lax.bitcast_convert_type(first, "int32")
    return lax.convert_element_type(lax.population_count(bits).sum() >> 6, "float32")


def after(zero: Any, value: Any) -> Any:
    """``value``, not before ``zero`` is known."""
    return value + lax.convert_element_type(zero, value.dtype)
