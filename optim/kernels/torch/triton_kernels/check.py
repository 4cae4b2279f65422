"""Kernels made of a rule, compared with the rule as it is written, before anything is updated."""

from __future__ import annotations

from typing import Any

import torch

from optim.kernels.torch.recording import EXAMPLE
from optim.kernels.torch.triton_kernels.launch import Group, GroupKernels, with_few_kernels
from optim.kernels.torch.triton_kernels.source import BLOCK, RuleSource, Storage

_SIZES = (BLOCK + 5, 3)  # one whole block, and two that are not
_MULTIPLES = (1.0, 0.5)  # of the learning rate
_STEPS = (3.0, 1000.0)  # some rules begin in another way than they go on

_RELATIVE = 1e-3
_ROUNDING = 5e-7
"""Of a number of the size of 1: a few roundings in float32."""


def check(
    rule: Any, weight_decay: float, source: RuleSource, storage: Storage, device: torch.device
) -> None:
    """Update two small tensors by the kernels and by the rule as it is written, and compare.

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
    group = Group.of(source, [(m, *source.numbers[1:]) for m in _MULTIPLES])
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

    shapes = {name: getattr(s, "shape", s) for name, s in rule.slot_shapes((EXAMPLE,)).items()}

    def slot(name: str, size: int) -> torch.Tensor:
        if name == "residual":
            return ramp(size, 0.0, 0.0)
        return ramp(size, 0.2, 0.7) if tuple(shapes[name]) != () else number(0.5)

    parameters = [ramp(size, -2.0, 3.0, storage.parameter) for size in _SIZES]
    gradients = [ramp(size, 1.0, -0.9, storage.gradient) for size in _SIZES]
    slots = {name: [slot(name, size) for size in _SIZES] for name in source.slots}
    step, rate = number(at), number(0.1)

    def state(i: int) -> dict[str, torch.Tensor]:
        own = {name: values[i].clone() for name, values in slots.items()}
        return {"parameter": parameters[i].clone(), **own}

    before, expected = [state(i) for i in range(len(_SIZES))], []
    for i, multiple in enumerate(_MULTIPLES):
        given = state(i)
        parameter, gradient = given.pop("parameter"), gradients[i].float()
        new, left = advance(rule, parameter, gradient, given, step, rate * multiple, weight_decay)
        expected.append({"parameter": new, **left})
    kernels.run(
        parameters,
        [2.0 * gradient for gradient in gradients],
        [value for values in slots.values() for value in values],
        step,
        rate,
        number(0.0),
        number(2.0),
    )
    for i, values in enumerate(expected):
        _compare(*(_joined(part) for part in (before[i], values, state(i))))


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
        floor = _ROUNDING * torch.maximum(old.abs(), value.abs()).clamp_min(1.0)
        wrong = (found[name] - value).abs() > _RELATIVE * (value - old).abs() + floor
        unlike = found[name].isfinite() != value.isfinite()
        if bool((wrong | unlike).any()):
            raise RuntimeError(f"its results are not those of the rule ({name})")
