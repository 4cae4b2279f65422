"""JAX: convolutions in the layout that is fast inside loops.

On CPUs XLA has a fast convolution for channels-last data and kernels. It converts other layouts,
such as those of a kernel's gradient, to that one, but not inside a loop, where they take ten to
thirty times as long. Convolutions in loops are therefore transposed in advance. The same applies to
batch groups, as in the gradient of a depthwise kernel.

This rewrites jaxprs, whose API JAX does not guarantee to be stable, so callers have a fallback
(``kbtrain.utils.fallback``).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxpr_as_fun


def as_function(closed: Any, with_fast_convolutions: bool) -> Any:
    """Turn a traced function into a function of flat arguments."""
    if with_fast_convolutions and _has_unusual(closed.jaxpr):
        closed = _rewritten(closed)
    return jaxpr_as_fun(closed)


def _inner(value: Any) -> list[Jaxpr]:
    """The traced functions in a parameter of an operation, such as the body of a loop."""
    if isinstance(value, tuple | list):
        return [jaxpr for item in value for jaxpr in _inner(item)]
    if isinstance(value, ClosedJaxpr):
        return [value.jaxpr]
    return [value] if isinstance(value, Jaxpr) else []


def _has_unusual(jaxpr: Jaxpr) -> bool:
    return any(
        _is_unusual(eqn)
        or any(_has_unusual(inner) for value in eqn.params.values() for inner in _inner(value))
        for eqn in jaxpr.eqns
    )


def _is_unusual(eqn: Any) -> bool:
    """Whether an equation is a convolution in a layout other than the fast one."""
    if eqn.primitive.name != "conv_general_dilated":
        return False
    given = eqn.params["dimension_numbers"]
    usual = tuple(given) == tuple(_usual_order(len(given.lhs_spec)))
    return not usual or eqn.params["batch_group_count"] != 1


def _usual_order(rank: int) -> Any:
    """Batch, space, channels; for a kernel: space, channels in, channels out."""
    space = range(1, rank - 1)
    data = (0, rank - 1, *space)
    return jax.lax.ConvDimensionNumbers(data, (rank - 1, rank - 2, *range(rank - 2)), data)


def _rewritten(value: Any) -> Any:
    """Evaluate a jaxpr with convolutions in the fast layout, also inside loops and calls."""
    if isinstance(value, tuple | list):
        return type(value)(_rewritten(item) for item in value) if _inner(value) else value
    # In this order: since JAX 0.12 the two are one class, whose `jaxpr` is itself.
    if isinstance(value, Jaxpr):
        return value.replace(eqns=[_rewritten_operation(eqn) for eqn in value.eqns])
    if isinstance(value, ClosedJaxpr):
        return value.replace(jaxpr=_rewritten(value.jaxpr))
    return value


def _rewritten_operation(eqn: Any) -> Any:
    if not _is_unusual(eqn):
        return eqn.replace(params={name: _rewritten(value) for name, value in eqn.params.items()})
    turned = jax.jit(functools.partial(_convolve, eqn.primitive, eqn.params))
    shapes = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.invars]
    call = jax.make_jaxpr(turned)(*shapes).jaxpr.eqns[0]
    return eqn.replace(primitive=call.primitive, params=call.params)


def _convolve(primitive: Any, params: dict[str, Any], data: Any, kernel: Any) -> Any:
    """Evaluate a convolution with transposed arguments and result."""
    given, usual = params["dimension_numbers"], _usual_order(data.ndim)

    def turned(array: Any, before: tuple[int, ...], after: tuple[int, ...]) -> Any:
        source = dict(zip(after, before, strict=True))
        return jnp.transpose(array, [source[axis] for axis in range(array.ndim)])

    data = turned(data, given.lhs_spec, usual.lhs_spec)
    kernel = turned(kernel, given.rhs_spec, usual.rhs_spec)
    changed = {"dimension_numbers": usual}
    if (groups := params["batch_group_count"]) > 1:
        # As in the gradient of a depthwise kernel: batch groups become feature groups.
        batch, *space, channels = data.shape
        data = data.reshape(groups, batch // groups, *space, channels)
        data = jnp.moveaxis(data, 0, -2).reshape(batch // groups, *space, groups * channels)
        changed |= {"batch_group_count": 1, "feature_group_count": groups}
    result = primitive.bind(data, kernel, **{**params, **changed})
    return turned(result, usual.out_spec, given.out_spec)
