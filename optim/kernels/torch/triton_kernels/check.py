"""Kernels made of a rule, compared with the rule as it is written, before anything is updated."""

from __future__ import annotations

from typing import Any

import torch

from optim.kernels.torch.triton_kernels.launch import Group, GroupKernels, with_few_kernels
from optim.kernels.torch.triton_kernels.source import BLOCK, RuleSource
from optim.kernels.torch.triton_kernels.storage import Storage

_MEMBERS = ((BLOCK + 5, 1.0), (3, 0.5))
"""Elements, and multiples of the learning rate: one whole block, and two that are not."""
_WITH_FLOAT32 = (7, 2.0)
"""Of a rule with 8-bit state one more, whose state is float32."""
_STEPS = (3.0, 1000.0)  # some rules begin in another way than they go on

_WRONG = "its results are not those of the rule ({})"

_RELATIVE = 1e-3
_ROUNDING = 5e-7
"""Of a number of the size of 1: a few roundings in float32."""


def check(
    rule: Any, weight_decay: float, source: RuleSource, storage: Storage, device: torch.device
) -> None:
    """Update small tensors by the kernels and by the rule as it is written, and compare.

    The kernels divide the gradients and read a flag, as in a training step. What is compared is
    what an update has added, in which a wrong decay shows as well as a wrong average.

    Args:
        rule: The rule.
        weight_decay: Its decay.
        source: The kernels.
        storage: How the tensors are stored.
        device: Where.

    Raises:
        RuntimeError: If the results differ.
    """
    numbers = [(m, *source.numbers[1:]) for _, m in _MEMBERS]
    if source.is_coded:
        numbers.append((_WITH_FLOAT32[1], 0.0, *source.numbers[2:]))
    group = Group.of(source, numbers)
    kernels = GroupKernels(with_few_kernels(rule, group))
    with torch.no_grad():
        for step in _STEPS:
            _check_at(step, rule, weight_decay, source, storage, device, kernels)


def _check_at(
    at: float,
    rule: Any,
    weight_decay: float,
    source: RuleSource,
    storage: Storage,
    device: torch.device,
    kernels: GroupKernels,
) -> None:
    from optim.core.rule import advance  # it imports the kernels

    def ramp(size: int, low: float, high: float, kind: str = "float32") -> torch.Tensor:
        values = torch.linspace(low, high, size, dtype=torch.float32, device=device)
        return values.to(getattr(torch, kind))

    def number(value: float) -> torch.Tensor:
        return torch.full((), value, dtype=torch.float32, device=device)

    def state_of(own: Any, size: int) -> dict[str, torch.Tensor]:
        """A parameter and its slots."""
        state = {"parameter": ramp(size, -2.0, 3.0, storage.parameter)}
        if "residual" in source.slots:
            state["residual"] = ramp(size, 0.0, 0.0)
        for name, slot in own.slot_shapes((size,)).items():
            shape = tuple(getattr(slot, "shape", slot))
            state[name] = ramp(size, 0.2, 0.7) if shape == (size,) else number(0.5)
            if name.endswith("_codes") and source.is_coded:
                state[name] = torch.arange(shape[0] * shape[1], device=device) % 90 + 130
                state[name] = state[name].to(torch.uint8).view(shape)
                state[name].view(-1)[size:] = slot.initializer
            elif name.endswith("_scales") and source.is_coded:
                state[name] = ramp(shape[0], 0.3, 0.7)
        return state

    members = [(rule, size, multiple) for size, multiple in _MEMBERS]
    if source.is_coded:
        members.append((rule.full, *_WITH_FLOAT32))
    states = [state_of(own, size) for own, size, _ in members]
    gradients = [ramp(size, 1.0, -0.9, storage.gradient) for _, size, _ in members]
    step, rate = number(at), number(0.1)
    before = [{name: x.clone() for name, x in state.items()} for state in states]
    expected = []
    for (own, _, multiple), old, gradient in zip(members, before, gradients, strict=True):
        given = {name: x.clone() for name, x in old.items()}
        parameter = given.pop("parameter")
        new, left = advance(
            own, parameter, gradient.float(), given, step, rate * multiple, weight_decay
        )
        expected.append({"parameter": new, **left})
    kernels.run(
        [state["parameter"] for state in states],
        [2.0 * gradient for gradient in gradients],
        [_slot(state, name) for name in source.slots for state in states],
        step,
        rate,
        number(0.0),
        number(2.0),
    )
    for values in zip(before, expected, states, strict=True):
        _compare(*map(_joined, values))


def _slot(state: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """A slot as the kernels take it: float32 in place of codes and of scales."""
    return state[name] if name in state else state[name.rpartition("_")[0]]


def _joined(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """With the parameter as it is with its residual."""
    parameter = values["parameter"].float() + values.get("residual", 0.0)
    return {n: x for n, x in values.items() if n != "residual"} | {"parameter": parameter}


def _compare(
    before: dict[str, torch.Tensor],
    expected: dict[str, torch.Tensor],
    found: dict[str, torch.Tensor],
) -> None:
    for name, value in expected.items():
        old = before[name]
        if value.dtype is torch.uint8:
            # A last digit decides between two codes, at a border and where they are drawn.
            if bool(((found[name].int() - value.int()).abs() > 1).any()):
                raise RuntimeError(_WRONG.format(name))
            continue
        floor = _ROUNDING * torch.maximum(old.abs(), value.abs()).clamp_min(1.0)
        wrong = (found[name] - value).abs() > _RELATIVE * (value - old).abs() + floor
        unlike = found[name].isfinite() != value.isfinite()
        if bool((wrong | unlike).any()):
            raise RuntimeError(_WRONG.format(name))
