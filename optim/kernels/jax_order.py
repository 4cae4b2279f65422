"""JAX on a CPU: the results of a rule in an order in which each can overwrite its old value.

XLA makes a loop of its own of every result there. Where two of them read the same old value, it
does not know which one comes last, and copies the old value for the other. So the result that
overwrites a value is told to wait for the others that read it.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import jax
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun

Pure = Callable[..., tuple[Any, dict[str, Any]]]
"""``(value, gradient, slots) -> (new value, new slots)``."""


def zero_after(value: Any) -> Any:
    """A zero that is not known before ``value`` is, and that XLA does not know to be one."""
    first = lax.convert_element_type(value[(slice(1),) * value.ndim], "float32")
    bits = lax.bitcast_convert_type(first, "int32")
    return lax.convert_element_type(lax.population_count(bits).sum() >> 6, "float32")


def after(zero: Any, value: Any) -> Any:
    """``value``, not before ``zero`` is known."""
    return value + lax.convert_element_type(zero, value.dtype)


def in_place(pure: Pure, value: Any, gradient: Any, slots: dict[str, Any]) -> tuple[Any, bool]:
    """``pure(value, gradient, slots)`` with results that wait for the readers of their old values.

    Args:
        pure: an elementwise rule.
        value: the variable's value.
        gradient: float32 tensor.
        slots: slot name -> tensor.

    Returns:
        The result, and whether each part of it can overwrite its old value and nothing as large has
        to be kept in between.
    """
    names = list(slots)

    def flat(*old: Any) -> list[Any]:
        new_value, new = pure(old[0], old[-1], dict(zip(names, old[1:-1], strict=True)))
        return [new_value, *(new[name] for name in names)]

    inputs = [value, *slots.values(), gradient]
    closed = jax.make_jaxpr(flat)(*inputs)
    plan = _Plan(closed.jaxpr)
    known = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    results, one_loop = plan.run(known, inputs)
    return (results[0], dict(zip(names, results[1:], strict=True))), one_loop


@dataclass
class _Plan:
    """Which result of a traced rule reads what, and so which one comes first.

    Attributes:
        jaxpr: the rule; result i overwrites input i.
        large: numbers of the results that are tensors.
        made_by: variable -> the operation that makes it.
        reuses: number of a result -> the other results that it is made from.
        reads: number of a result -> the tensors among the inputs that it is made from besides.
    """

    jaxpr: Jaxpr
    large: list[int] = field(init=False)
    made_by: dict[Any, Any] = field(init=False)
    reuses: dict[int, set[int]] = field(init=False, default_factory=dict)
    reads: dict[int, set[Any]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        outs = self.jaxpr.outvars
        self.large = [i for i, var in enumerate(outs) if var.aval.shape]
        self.made_by = {var: eqn for eqn in self.jaxpr.eqns for var in eqn.outvars}
        for i in self.large:
            # Made from other new values where they are there, unless their old ones are read, too.
            others = {j for j in self.large if outs[j] in self.made_by and outs[j] is not outs[i]}
            while True:
                reached = set(self.operands(outs[i], {outs[j] for j in others}))
                both = {j for j in others if self.jaxpr.invars[j] in reached}
                if not both:
                    break
                others -= both
            self.reuses[i] = {j for j in others if outs[j] in reached}
            self.reads[i] = reached & set(self.jaxpr.invars)

    def operands(self, result: Any, stop: Iterable[Any]) -> list[Any]:
        """The tensors that a result is made from: inputs, and those at which to stop."""
        stop = set(stop)
        found, seen, todo = [], set(), [result]
        while todo:
            var = todo.pop()
            if isinstance(var, Literal) or var in seen or not var.aval.shape:
                continue
            seen.add(var)
            if var in stop or var not in self.made_by:
                found.append(var)
            else:
                todo += self.made_by[var].invars
        return found

    def readers(self, i: int) -> list[int]:
        """The other results that are made from the old value of result ``i``."""
        return [j for j in self.large if j != i and self.jaxpr.invars[i] in self.reads[j]]

    def order(self) -> tuple[list[int], bool]:
        """The results, each after those it is made from and the readers of its old value.

        Returns:
            Their numbers, and whether there is such an order. Where there is none, a result comes
            before a reader of its old value, which is then copied.
        """
        done: list[int] = []
        complete = True
        while left := [i for i in self.large if i not in done]:
            made = [i for i in left if self.reuses[i] <= set(done)]
            ready = [i for i in made if set(self.readers(i)) <= set(done)]
            complete = complete and bool(ready)
            done.append((ready or made)[0])
        return done, complete

    def run(self, known: dict[Any, Any], inputs: list[Any]) -> tuple[list[Any], bool]:
        """The results, and whether nothing has to be kept besides them."""
        outs = self.jaxpr.outvars
        known = {**known, **dict(zip(self.jaxpr.invars, inputs, strict=True))}
        sums = [var for eqn in self.jaxpr.eqns if _shrinks(eqn) for var in eqn.outvars]
        for var in [*sums, *(var for var in outs if not var.aval.shape)]:
            self.evaluate(var, known)
        order, complete = self.order()
        done: dict[int, Any] = {}
        for i in order:
            readers = [done[j] for j in self.readers(i) if j in done]
            if not readers:
                done[i] = self.evaluate(outs[i], known)
                continue
            # Anew from operands that wait, so that it shares nothing with those it waits for.
            zero = sum(map(zero_after, readers[1:]), zero_after(readers[0]))
            waiting = {var: value for var, value in known.items() if not var.aval.shape}
            for var in self.operands(outs[i], [outs[j] for j in self.reuses[i]]):
                waiting[var] = after(zero, known[var])
            done[i] = known[outs[i]] = self.evaluate(outs[i], waiting)
        results = [done[i] if i in done else known[var] for i, var in enumerate(outs)]
        return results, complete and not sums

    def evaluate(self, result: Any, known: dict[Any, Any]) -> Any:
        """The value of a variable, made from known ones; it is then known, too."""
        if isinstance(result, Literal):
            return result.val
        used, needed, todo = {}, set(), [result]
        while todo:
            var = todo.pop()
            if isinstance(var, Literal):
                continue
            if var in known:
                used[var] = known[var]
            elif id(eqn := self.made_by[var]) not in needed:
                needed.add(id(eqn))
                todo += eqn.invars
        part = self.jaxpr.replace(
            constvars=[],
            invars=list(used),
            outvars=[result],
            eqns=[eqn for eqn in self.jaxpr.eqns if id(eqn) in needed],
        )
        (known[result],) = jaxpr_as_fun(ClosedJaxpr(part, []))(*used.values())
        return known[result]


def _shrinks(eqn: Any) -> bool:
    """Whether an operation makes something smaller of a tensor: a sum, say."""
    before = max((v.aval.size for v in eqn.invars), default=0)
    return any(v.aval.size < before for v in eqn.outvars)
