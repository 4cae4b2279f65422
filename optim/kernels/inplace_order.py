"""The results of a rule in an order in which each can overwrite its old value.

On a CPU XLA compiles every result to a loop of its own. Where two of them read the same old value,
it does not know which one comes last, and copies the old value for the other. So the result that
overwrites a value is made to depend on the others that read it. What a rule reads comes from a
trace, which each framework represents in its own way (`optim.kernels`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Pure = Callable[..., tuple[Any, dict[str, Any]]]
"""``(value, gradient, slots) -> (new value, new slots)``."""

LARGE = 1 << 14
"""Elements from which on it matters whether a tensor is copied."""


def flattened(pure: Pure, names: Sequence[str]) -> Callable[..., list[Any]]:
    """A rule of which result i overwrites argument i.

    Args:
        pure: The rule.
        names: Of its slots.

    Returns:
        A function of the value, the slots and the gradient; it returns the new value and slots.
    """

    def flat(value: Any, *others: Any) -> list[Any]:
        *old, gradient = others
        new_value, new = pure(value, gradient, dict(zip(names, old, strict=True)))
        return [new_value, *(new[name] for name in names)]

    return flat


@dataclass
class ResultOrder:
    """Which result of a traced rule reads what, and so which one comes first.

    Attributes:
        inputs: Names of what the rule is given; result i overwrites input i.
        outputs: Names of its results.
        made_of: Name -> the names that an operation of the rule makes it of, constants left out.
        tensors: Names of all that is not a scalar.
        large: Numbers of the results that are tensors.
        reuses: Number of a result -> the other results that it is made from.
        reads: Number of a result -> the tensors among the inputs that it is made from besides.
    """

    inputs: Sequence[Hashable]
    outputs: Sequence[Hashable]
    made_of: Mapping[Hashable, Sequence[Hashable]]
    tensors: frozenset[Hashable]
    large: list[int] = field(init=False)
    reuses: dict[int, set[int]] = field(init=False, default_factory=dict)
    reads: dict[int, set[Hashable]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        outs = self.outputs
        self.large = [i for i, name in enumerate(outs) if name in self.tensors]
        for i in self.large:
            # Made from other new values where they are there, unless their old ones are read, too.
            others = {j for j in self.large if outs[j] in self.made_of and outs[j] != outs[i]}
            while True:
                reached = set(self.operands(outs[i], {outs[j] for j in others}))
                both = {j for j in others if self.inputs[j] in reached}
                if not both:
                    break
                others -= both
            self.reuses[i] = {j for j in others if outs[j] in reached}
            self.reads[i] = reached & set(self.inputs)

    def operands(self, result: Hashable, stop: Iterable[Hashable]) -> list[Hashable]:
        """The tensors that a result is made from: inputs, and those at which to stop."""
        stop = set(stop)
        found: list[Hashable] = []
        seen: set[Hashable] = set()
        todo = [result]
        while todo:
            name = todo.pop()
            if name in seen or name not in self.tensors:
                continue
            seen.add(name)
            if name in stop or name not in self.made_of:
                found.append(name)
            else:
                todo += self.made_of[name]
        return found

    def needed(self, result: Hashable, known: Iterable[Hashable]) -> set[Hashable]:
        """Known names, and names to make, that a result needs."""
        known = set(known)
        found: set[Hashable] = set()
        todo = [result]
        while todo:
            name = todo.pop()
            if name not in found:
                found.add(name)
                todo += () if name in known else self.made_of.get(name, ())
        return found

    def readers(self, i: int) -> list[int]:
        """The other results that are made from the old value of result ``i``."""
        return [j for j in self.large if j != i and self.inputs[i] in self.reads[j]]

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

    def run(
        self,
        known: dict[Hashable, Any],
        first: Iterable[Hashable],
        evaluate: Callable[[Hashable, dict[Hashable, Any]], Any],
        zero_after: Callable[[Any], Any],
        after: Callable[[Any, Any], Any],
    ) -> tuple[list[Any], bool]:
        """Make the results in their order.

        Args:
            known: Name -> value, of the inputs and constants; what is made is added.
            first: Names to make before all results.
            evaluate: Makes one name from known ones.
            zero_after: A scalar 0 that is not there before a value is.
            after: ``after(zero, value)`` is the value, not before the zero is there.

        Returns:
            The results, and whether each can overwrite its old value.
        """
        outs = self.outputs
        for name in [*first, *(name for name in outs if name not in self.tensors)]:
            if name not in known:
                known[name] = evaluate(name, known)
        order, complete = self.order()
        done: dict[int, Any] = {}
        for i in order:
            readers = [done[j] for j in self.readers(i) if j in done]
            if not readers:
                if outs[i] not in known:
                    known[outs[i]] = evaluate(outs[i], known)
                done[i] = known[outs[i]]
                continue
            # Anew from operands that wait, so that it shares nothing with those it waits for.
            zero = sum(map(zero_after, readers[1:]), zero_after(readers[0]))
            waiting = {name: value for name, value in known.items() if name not in self.tensors}
            for name in self.operands(outs[i], [outs[j] for j in self.reuses[i]]):
                waiting[name] = after(zero, known[name])
            if outs[i] not in waiting:
                waiting[outs[i]] = evaluate(outs[i], waiting)
            done[i] = known[outs[i]] = waiting[outs[i]]
        return [done[i] if i in done else known[name] for i, name in enumerate(outs)], complete
