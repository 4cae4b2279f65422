"""JAX on a CPU: a rule whose results overwrite their old values.

See `optim.kernels.inplace_order`.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun

from optim.kernels.inplace_order import Pure, ResultOrder, flattened
from optim.kernels.jax.wait import after, zero_after


def in_place(pure: Pure, value: Any, gradient: Any, slots: dict[str, Any]) -> tuple[Any, bool]:
    """``pure(value, gradient, slots)`` with results that wait for the readers of their old values.

    Args:
        pure: An elementwise rule.
        value: The variable's value.
        gradient: float32 tensor.
        slots: Slot name -> tensor.

    Returns:
        The result, and whether each part of it can overwrite its old value and nothing as large has
        to be kept in between.
    """
    flat = flattened(pure, list(slots))
    inputs = [value, *slots.values(), gradient]
    closed = jax.make_jaxpr(flat)(*inputs)
    traced = closed.jaxpr
    order = _result_order(traced)
    known = dict(zip(traced.constvars, closed.consts, strict=True))
    known |= dict(zip(traced.invars, inputs, strict=True))
    known |= {var: var.val for var in traced.outvars if isinstance(var, Literal)}
    sums = [var for eqn in traced.eqns if _shrinks(eqn) for var in eqn.outvars]

    def evaluate(result: Any, known: dict[Any, Any]) -> Any:
        return _evaluate(traced, order, result, known)

    results, complete = order.run(known, sums, evaluate, zero_after, after)
    return (results[0], dict(zip(slots, results[1:], strict=True))), complete and not sums


def _result_order(traced: Jaxpr) -> ResultOrder:
    """Which result of a traced rule reads what."""
    made_of = {
        var: [operand for operand in eqn.invars if not isinstance(operand, Literal)]
        for eqn in traced.eqns
        for var in eqn.outvars
    }
    every = [*traced.invars, *traced.constvars, *made_of]
    tensors = frozenset(var for var in every if var.aval.shape)
    return ResultOrder(traced.invars, traced.outvars, made_of, tensors)


def _evaluate(traced: Jaxpr, order: ResultOrder, result: Any, known: dict[Any, Any]) -> Any:
    """The value of a variable, made from known ones."""
    needed = order.needed(result, known)
    used = {var: value for var, value in known.items() if var in needed}
    eqns = [
        eqn for eqn in traced.eqns if any(var in needed and var not in used for var in eqn.outvars)
    ]
    part = traced.replace(constvars=[], invars=list(used), outvars=[result], eqns=eqns)
    return jaxpr_as_fun(ClosedJaxpr(part, []))(*used.values())[0]


def _shrinks(eqn: Any) -> bool:
    """Whether an operation makes something smaller of a tensor: a sum, say."""
    before = max((v.aval.size for v in eqn.invars), default=0)
    return any(v.aval.size < before for v in eqn.outvars)
