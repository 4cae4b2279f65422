"""JAX: the floating-point operations of a step, counted in its jaxpr.

XLA's own count (``cost_analysis``) takes the body of a loop once, however often it runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import keras

from kbtrain.backends.jax.scope import context, run_stateless
from kbtrain.backends.uncounted import warn_of_uncounted
from kbtrain.utils.packages.keras_private import read_values


def count_flops(
    fn: Callable[[Any], Any], variables: Sequence[keras.Variable], inputs: Any
) -> float:
    """The floating-point operations of products and convolutions in ``fn(inputs)``.

    Of the branches of a condition the most expensive one counts, of a loop whose length is not
    known one round. A kernel of Pallas counts what its author estimates.
    """

    def pure(values: list[Any], inputs: Any) -> Any:
        with context.tracing(variables):
            return run_stateless(lambda: fn(inputs), values)[0]

    known = list(context.undeclared)
    try:
        jaxpr = jax.make_jaxpr(pure)(read_values(variables), inputs).jaxpr
    finally:
        context.undeclared[:] = known
    unknown: list[str] = []
    count = _of_jaxpr(jaxpr, unknown)
    warn_of_uncounted(unknown)
    return count


def flops_of_jaxpr(jaxpr: Any) -> float:
    """The same for a function that has been traced; kernels that nothing is known of count 0."""
    return _of_jaxpr(jaxpr, [])


def tf32_is_on() -> bool:
    """Whether products in float32 use TensorFloat-32 on a GPU that has it: JAX's default."""
    precision = jax.config.jax_default_matmul_precision
    return precision in (None, "default", "fastest", "tensorfloat32", "bfloat16", "bfloat16_3x")


def _of_jaxpr(jaxpr: Any, unknown: list[str]) -> float:
    """Of all equations; kernels that nothing is known about are added to ``unknown``."""
    return sum(_of_equation(equation, unknown) for equation in jaxpr.eqns)


def _of_equation(equation: Any, unknown: list[str]) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return 2.0 * float(equation.outvars[0].aval.size * math.prod(left[i] for i in contracted))
    if name == "conv_general_dilated":
        return _of_convolution(equation)
    if name.startswith("dot_product_attention_"):
        return _of_attention(equation)
    if name in ("pallas_call", "ffi_call", "custom_call"):
        estimate = params.get("cost_estimate")
        if estimate is None:
            unknown.append(name)
        return 0.0 if estimate is None else float(estimate.flops)
    inner = [_of_jaxpr(jaxpr, unknown) for jaxpr in _inner(params)]
    if name == "cond":
        return max(inner, default=0.0)
    return sum(inner) * (params["length"] if name == "scan" else 1)


def _of_attention(equation: Any) -> float:
    """Of cuDNN's attention, whose backward pass takes twice as much as the forward pass."""
    query, key = (invar.aval.shape for invar in equation.invars[:2])
    keys = key[2] if int(equation.params.get("layout", 0)) else key[1]  # BNTH, or BTNH
    flops = 2.0 * float(2 * math.prod(query) * keys)
    return 2 * flops if "bwd" in equation.primitive.name else flops


def _of_convolution(equation: Any) -> float:
    numbers = equation.params["dimension_numbers"]
    left, right = (invar.aval.shape for invar in equation.invars)
    out = equation.outvars[0].aval.shape
    count: float = (
        2.0 * out[numbers.out_spec[0]] * out[numbers.out_spec[1]] * right[numbers.rhs_spec[1]]
    )
    places = zip(numbers.lhs_spec[2:], numbers.rhs_spec[2:], numbers.out_spec[2:], strict=True)
    for i, j, k in places:
        # A gradient pads and dilates what it gets from above with zeros, which cost nothing.
        count *= right[j] * min(left[i], out[k])
    return count


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    """The jaxprs in the parameters of an equation."""
    for value in params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            jaxpr = getattr(each, "jaxpr", each)
            if hasattr(jaxpr, "eqns"):
                yield jaxpr
