"""Which tensors the kernels made of rules update together, on a GPU.

Rules that differ in numbers only (decays, multiples of the learning rate, hyperparameters of
parameter groups) have the same kernels and are updated by one call. A rule without decay has none
of the operations for it, so its tensors would need kernels of their own; they get a decay of 0.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from optim.core.fallback import logger, report
from optim.kernels.torch import custom_op
from optim.kernels.torch.custom_op import NumberedObjects, settings_of
from optim.kernels.torch.recording import EXAMPLE, NotElementwise, RecordedRule
from optim.kernels.torch.triton_kernels.check import check
from optim.kernels.torch.triton_kernels.coded import coding_of
from optim.kernels.torch.triton_kernels.expressions import Untranslatable
from optim.kernels.torch.triton_kernels.launch import Group, is_available, number_of
from optim.kernels.torch.triton_kernels.source import RuleSource
from optim.kernels.torch.triton_kernels.storage import Storage

_LOW_PRECISION = (torch.bfloat16, torch.float16)
_PARTS = ("codes", "scales")


@dataclass
class _Tensors:
    """Tensors that have the same rule, apart from its decay, and are stored in the same way."""

    parameters: list[torch.Tensor] = field(default_factory=list)
    gradients: list[torch.Tensor] = field(default_factory=list)
    slots: list[dict[str, torch.Tensor]] = field(default_factory=list)
    decays: list[float] = field(default_factory=list)
    multipliers: list[float] = field(default_factory=list)
    coded: list[bool] = field(default_factory=list)

    def take(self, other: _Tensors, names: tuple[str, ...]) -> None:
        """Take tensors of the same rule with float32 state, beside those with 8-bit state.

        Args:
            other: The tensors.
            names: The names of their slots that have codes and scales here.
        """
        for each in ("parameters", "gradients", "decays", "multipliers"):
            getattr(self, each).extend(getattr(other, each))
        for slots in other.slots:
            twice = {f"{name}_{part}": slots[name] for name in names for part in _PARTS}
            self.slots.append(slots | twice)
        self.coded += [False] * len(other.slots)


class RuleGroups:
    """The tensors of an update that kernels made of their rules will update."""

    def __init__(self) -> None:
        self._tensors: dict[tuple[Any, Storage, torch.device], _Tensors] = {}
        self._settings: dict[Any, tuple[Any, ...]] = {}

    def add(
        self,
        update_rule: Any,
        parameter: torch.Tensor,
        gradient: torch.Tensor,
        slots: dict[str, torch.Tensor],
    ) -> bool:
        """Take a tensor, if there are kernels for its rule.

        Args:
            update_rule: Its `optim.core.rule.UpdateRule`.
            parameter: Contiguous.
            gradient: Of the same shape.
            slots: Slot name -> tensor, with the residual of a low-precision parameter.
        """
        device = parameter.device
        storage = storage_of(parameter, gradient)
        if storage is None or any(slot.device != device for slot in slots.values()):
            return False
        rule, decay = update_rule.optimizer, update_rule.weight_decay
        if not _has_triton():
            return False
        if rule not in self._settings:  # once for all tensors of an update
            self._settings[rule] = settings_of(rule)
        if _source(rule, decay, storage, device, self._settings[rule]) is None:
            return False
        tensors = self._tensors.setdefault((rule, storage, device), _Tensors())
        tensors.parameters.append(parameter)
        tensors.gradients.append(gradient if gradient.is_contiguous() else gradient.contiguous())
        tensors.slots.append(slots)
        tensors.decays.append(decay)
        tensors.multipliers.append(update_rule.learning_rate_multiplier)
        tensors.coded.append(coding_of(rule) is not None)
        return True

    def _join(self) -> None:
        """Give tensors with the full-precision rule of an 8-bit one to that, where both are there.

        Their kernels are the same, so they need no launches of their own.
        """
        for (rule, storage, device), tensors in list(self._tensors.items()):
            key = getattr(rule, "full", None), storage, device
            if coding_of(rule) is None or key not in self._tensors:
                continue
            codes = [name for name in tensors.slots[0] if name.endswith("_codes")]
            names = tuple(name.removesuffix("_codes") for name in codes)
            tensors.take(self._tensors.pop(key), names)

    def run(self, step: torch.Tensor, learning_rate: torch.Tensor) -> None:
        """Update them, in place: one call for all that have the same kernels."""
        self._join()
        calls: dict[Any, tuple[Any, RuleSource, list[Any]]] = {}
        for (rule, storage, device), tensors in self._tensors.items():
            decays = tuple(sorted(set(tensors.decays)))
            found = _numbers(rule, storage, device, decays, self._settings[rule])
            for i, decay in enumerate(tensors.decays):
                source, numbers = found[decay]
                key = source.text, storage, source.slots, device
                _, _, members = calls.setdefault(key, (rule, source, []))
                first = [tensors.multipliers[i]]
                first += [float(tensors.coded[i])] * source.is_coded
                members.append((tensors, i, (*first, *numbers[len(first) :])))
        for (*_, device), (rule, source, members) in calls.items():
            group = Group.of(source, [numbers for _, _, numbers in members])
            slots = [t.slots[i][name] for name in source.slots for t, i, _ in members]
            torch.ops.optim.run_rules(
                [t.parameters[i] for t, i, _ in members],
                [t.gradients[i] for t, i, _ in members],
                slots,
                on_device(step, device),
                on_device(learning_rate, device),
                number_of(rule, group),
            )


def recorded_source(
    rule: Any, weight_decay: float, storage: Storage, device: torch.device
) -> RuleSource:
    """The kernels of a rule; of one with 8-bit state, those of its full-precision rule with codes.

    Args:
        rule: The rule.
        weight_decay: Its decay.
        storage: How its tensors are stored.
        device: Where they are.

    Raises:
        Untranslatable: If it has an operation that is not written for Triton.
    """
    coding = coding_of(rule)
    recorded = RecordedRule(rule if coding is None else rule.full, weight_decay, device)
    if coding is not None:
        coded = {f"{name}_{part}" for name in recorded.wide_slots for part in _PARTS}
        if missing := coded - {*rule.slot_shapes((EXAMPLE,))}:
            raise Untranslatable(f"it has no {', '.join(sorted(missing))}")
    return RuleSource(recorded, storage, coding)


def on_device(scalar: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A scalar of an update, on the device of some of its tensors."""
    return scalar if scalar.device == device else scalar.to(device)


def storage_of(parameter: torch.Tensor, gradient: torch.Tensor) -> Storage | None:
    """How two tensors are stored; None if no kernels are made for that."""
    if not custom_op.on_gpu(parameter.device) or gradient.device != parameter.device:
        return None
    kinds = [t.dtype for t in (parameter, gradient)]
    if any(kind not in (torch.float32, *_LOW_PRECISION) for kind in kinds):
        return None
    return Storage(*(str(kind).removeprefix("torch.") for kind in kinds))


_warned: list[bool] = []


def _has_triton() -> bool:
    if is_available():
        return True
    if not _warned:
        _warned.append(True)
        logger.warning(
            "Triton is not installed, so optimizers run by PyTorch's own operations on the GPU, "
            "which takes longer. Install the package `triton`, if it has a wheel for this system."
        )
    return False


# ---- sources, made once --------------------------------------------------------------------------

_SOURCES: NumberedObjects[RuleSource | None] = NumberedObjects()
_FOUND: NumberedObjects[dict[float, tuple[RuleSource, list[float]]]] = NumberedObjects()


def _source(
    rule: Any,
    weight_decay: float,
    storage: Storage,
    device: torch.device,
    settings: tuple[Any, ...],
) -> RuleSource | None:
    """The source for a rule, tried on a few numbers; None if there is none, which is reported."""
    key = weight_decay, storage, device, settings
    return _SOURCES[_SOURCES.number(rule, key, lambda: _made(rule, weight_decay, storage, device))]


def _made(
    rule: Any, weight_decay: float, storage: Storage, device: torch.device
) -> RuleSource | None:
    try:
        source = recorded_source(rule, weight_decay, storage, device)
        # In a thread: what records operations in this one does not see those of another.
        with ThreadPoolExecutor(1) as pool:
            pool.submit(check, rule, weight_decay, source, storage, device).result()
    except NotElementwise:
        raise
    except Exception as error:
        report(
            f"Making a kernel for the GPU of {type(rule).__name__}.update",
            "triton",
            error,
            "It runs by operations of PyTorch, which takes longer.",
        )
        return None
    return source


def _numbers(
    rule: Any,
    storage: Storage,
    device: torch.device,
    decays: tuple[float, ...],
    settings: tuple[Any, ...],
) -> dict[float, tuple[RuleSource, list[float]]]:
    """For each decay that is used together with others a source, and the numbers in it."""
    key = storage, device, decays, settings
    return _FOUND[
        _FOUND.number(rule, key, lambda: _find_numbers(rule, storage, device, decays, settings))
    ]


def _find_numbers(
    rule: Any,
    storage: Storage,
    device: torch.device,
    decays: tuple[float, ...],
    settings: tuple[Any, ...],
) -> dict[float, tuple[RuleSource, list[float]]]:
    found = {}
    for decay in decays:
        source = _source(rule, decay, storage, device, settings)
        assert source is not None  # it was asked for when the tensor was added
        found[decay] = source, source.numbers
    some = max(decays)
    if 0.0 in found and some:
        with_decay = found[some][0]
        doubled = recorded_source(rule, 2.0 * some, storage, device)
        pairs = list(zip(with_decay.numbers, doubled.numbers, strict=False))
        # What is twice as much with twice the decay is nothing without.
        if doubled.text == with_decay.text and all(y in (x, 2.0 * x) for x, y in pairs):
            found[0.0] = with_decay, [x if x == y else 0.0 for x, y in pairs]
    return found
