"""Rules for matrices on a GPU: those of equal shape are stacked and updated together.

A product of small matrices does not fill a GPU, and every operation of a rule would be launched
for each of them. Here a rule runs once on a stack of equal shapes (`torch.vmap`): a matrix product
becomes a batched one. What is stacked at a time is limited, as a stack is memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from optim.core.precision import working_dtype

_MOST_ELEMENTS = 1 << 26
"""Elements of a stack: 256 MiB in float32, of which a rule has about ten."""


def is_stackable(rule: Any) -> bool:
    """Whether a rule is marked with `optim.core.rule.stackable`."""
    return bool(getattr(type(rule).update, "stackable", False))


def stacks(pairs: list[tuple[Any, Any]], optimizer: Any) -> list[list[tuple[Any, Any]]]:
    """Gradients and variables in groups that can be updated together.

    Args:
        pairs: Of a gradient and a variable, of rules that are stackable.
        optimizer: The optimizer that they belong to.
    """
    groups: dict[Any, list[tuple[Any, Any]]] = {}
    for gradient, variable in pairs:
        key = optimizer.update_rule_of(variable), tuple(variable.shape), variable.dtype
        groups.setdefault(key, []).append((gradient, variable))
    result = []
    for group in groups.values():
        most = max(_MOST_ELEMENTS // max(group[0][0].numel(), 1), 1)
        result += [group[i : i + most] for i in range(0, len(group), most)]
    return result


def update_stack(
    group: list[tuple[Any, Any]],
    optimizer: Any,
    step: torch.Tensor,
    learning_rate: torch.Tensor,
    storage: Callable[[Any], torch.Tensor],
) -> None:
    """Update variables of one shape, dtype and rule, in place.

    Args:
        group: Pairs of a gradient and a variable.
        optimizer: The optimizer that they belong to.
        step: float32 scalar.
        learning_rate: float32 scalar, not yet multiplied for these variables.
        storage: The tensor that a variable holds.
    """
    from optim.core.rule import advance  # it imports the kernels

    update_rule = optimizer.update_rule_of(group[0][1])
    rate = update_rule.learning_rate(learning_rate)
    variables = [storage(variable) for _, variable in group]
    slots = [optimizer.slots_of(variable) for _, variable in group]
    held = {name: [storage(own[name]) for own in slots] for name in slots[0]}

    def one(value: Any, gradient: Any, own: dict[str, Any]) -> Any:
        rule, decay = update_rule.optimizer, update_rule.weight_decay
        return advance(rule, value, gradient, own, step, rate, decay)

    value, new = torch.vmap(one)(
        torch.stack(variables),
        torch.stack([gradient for gradient, _ in group]),
        {name: torch.stack(tensors) for name, tensors in held.items()},
    )
    torch._foreach_copy_(variables, list(value.unbind()))
    for name, tensors in held.items():
        torch._foreach_copy_(tensors, list(new[name].unbind()))


def can_stack(variable: Any) -> bool:
    """Whether a variable's arithmetic is float32, as the scalars of a stack are."""
    return working_dtype(variable) == "float32"
