"""Makes the plan of a run: compiles it as it is, with other batch sizes, and its alternatives."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kbtrain.errors import ConfigurationError, KbtrainError, OutOfMemoryError, first_lines
from kbtrain.plan.alternatives import LAUNCHING, advise, candidates
from kbtrain.plan.compile import compile_program
from kbtrain.plan.devices import device_named
from kbtrain.plan.fitting import LargestBatch, largest_batch
from kbtrain.plan.plan import BATCH, Advice, Case, Plan
from kbtrain.plan.program import ProgramFacts
from kbtrain.plan.roofline import roofline
from kbtrain.utils.devices import DeviceSpec

if TYPE_CHECKING:
    from kbtrain.training.trainer_base import TrainerBase

logger = logging.getLogger("kbtrain")

PREALLOCATED = 0.75
"""The part of a GPU's memory that JAX uses by default."""

Compile = Callable[[Mapping[str, Any]], ProgramFacts]
"""Compiles the run with some arguments changed."""


def plan_run(
    trainer: TrainerBase,
    device: Any,
    count: int = 1,
    *,
    batch: Sequence[int] = (),
    quick: bool = False,
    changes: Mapping[str, Any] | None = None,
    notes: Iterable[str] = (),
    tell: Callable[[str], object] = logger.info,
) -> Plan:
    """Plan the run of a Trainer; see ``Trainer.plan``.

    Args:
        trainer: A Trainer on a backend that compiles ahead of time.
        device: A name, a file or a ``DeviceSpec``.
        count: Number of devices.
        batch: Batch sizes of a device; the first is the run's, the others are for comparison.
        quick: Whether to compile the run alone: no alternatives, no largest batch.
        changes: Other fields of ``TrainingArguments`` to change.
        notes: What else to say.
        tell: Is told what is being compiled.

    Raises:
        ConfigurationError: An argument is invalid, or the run cannot be compiled ahead of time.
    """
    spec = device_named(device)
    check_numbers(count, batch)
    chosen = dict(changes or {})
    if batch:
        chosen[BATCH] = batch[0]
    trainer.args.replace(**chosen)  # raises for unknown names and values

    def compile_run(changed: Mapping[str, Any]) -> ProgramFacts:
        shown = ", ".join(f"{name}={value!r}" for name, value in changed.items())
        tell(f"compiling for {count} x {spec.title}: {shown or 'the run as it is'}")
        return compile_program(trainer, device=spec, count=count, changes=changed)

    cases = _Cases(spec, compile_run, chosen, _Precision(trainer))
    run = cases.case("as it is", {}, optional=False)
    sizes = tuple(cases.case(f"batch {size}", {BATCH: size}) for size in batch[1:])
    alternatives: list[Case] = []
    largest = None
    advice = Advice("", {})
    if not quick:
        change_of = candidates(trainer, count, chosen)
        alternatives = [cases.case(name, change) for name, change in change_of.items()]
        if not run.fits and (together := cases.combined(alternatives)) is not None:
            alternatives.append(together)
        largest = cases.largest(chosen.get(BATCH, trainer.args.per_device_train_batch_size))
        advice = advise(run, alternatives, largest)
    return Plan(
        device=spec,
        count=count,
        model=str(trainer.model.name),
        run=run,
        batches=sizes,
        alternatives=tuple(alternatives),
        largest=largest,
        advice=advice,
        notes=(*notes, *_notes(run, spec)),
    )


def check_numbers(count: Any, batch: Any) -> None:
    """Check the number of devices and the batch sizes.

    Raises:
        ConfigurationError: One is not a whole number above 0.
    """
    if not _is_count(count):
        raise ConfigurationError(f"count is a number of devices, 1 or more. Received: {count!r}.")
    if isinstance(batch, str) or not isinstance(batch, Sequence) or not all(map(_is_count, batch)):
        raise ConfigurationError(
            f"batch is a list of batch sizes of one device, such as [8, 16]. Received: {batch!r}."
        )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


class _Precision:
    """The dtype that a run computes in, with some arguments changed."""

    def __init__(self, trainer: TrainerBase) -> None:
        self._trainer = trainer

    def dtype(self, changes: Mapping[str, Any]) -> str:
        args = self._trainer.args
        for field_name, dtype in (("bf16", "bfloat16"), ("fp16", "float16")):
            if changes.get(field_name, getattr(args, field_name)):
                return dtype
        return str(self._trainer.model.compute_dtype)

    def tf32(self) -> bool:
        asked = self._trainer.args.tf32
        return self._trainer.backend.tf32_is_on() if asked is None else bool(asked)


class _Cases:
    """Compiles the cases of a plan, each set of changes once.

    Args:
        device: The device.
        compile_run: Compiles the run with changes.
        chosen: Changes that are made in any case.
        precision: The dtype of a run.
    """

    def __init__(
        self,
        device: DeviceSpec,
        compile_run: Compile,
        chosen: Mapping[str, Any],
        precision: _Precision,
    ) -> None:
        self._device, self._compile, self._chosen = device, compile_run, chosen
        self._precision = precision
        self._known: dict[str, ProgramFacts] = {}

    def case(self, name: str, changes: Mapping[str, Any], optional: bool = True) -> Case:
        """The run with changes; if it is optional, what cannot be compiled is a problem in words.

        Args:
            name: What is different.
            changes: The changes.
            optional: Whether the plan is of use without it.
        """
        made = {**self._chosen, **changes}
        usable = self._device.usable_bytes
        try:
            facts = self._facts(made)
        except OutOfMemoryError as error:
            problem = f"does not fit: {first_lines(error, 1)}"
        except KbtrainError as error:
            if not optional:
                raise
            problem = first_lines(error, 1)
        else:
            bound = roofline(facts, self._device, self._precision.dtype(made), self._tf32)
            return Case(name, changes, facts, bound, usable)
        return Case(name, changes, None, None, usable, problem)

    @property
    def _tf32(self) -> bool:
        return self._precision.tf32()

    def _facts(self, made: Mapping[str, Any]) -> ProgramFacts:
        key = repr(sorted(made.items(), key=str))
        if key not in self._known:
            self._known[key] = self._compile(made)
        return self._known[key]

    def largest(self, start: int) -> LargestBatch:
        """The largest batch of a device that fits; the search begins with ``start``."""

        def peak(size: int) -> int | None:
            try:
                return self._facts({**self._chosen, BATCH: size}).peak_bytes
            except OutOfMemoryError:
                return None

        return largest_batch(peak, self._device.usable_bytes, start)

    def combined(self, found: Sequence[Case]) -> Case | None:
        """All alternatives that can be compiled together; None if one alone is enough."""
        useful = [each for each in found if each.facts is not None]
        if len(useful) < 2 or any(each.fits for each in useful):
            return None
        together = {k: v for each in useful for k, v in each.changes.items()}
        return self.case(" + ".join(each.name for each in useful), together)


def _notes(run: Case, device: DeviceSpec) -> list[str]:
    facts = run.facts
    if facts is None:
        return []
    found = [f"{what}, {how}" for what, how in facts.exact.items()]
    if run.roofline is not None and run.roofline.seconds < LAUNCHING:
        found.append("The bound is shorter than launching an update takes: expect far less.")
    if device.kind == "gpu" and run.fits and facts.peak_bytes > PREALLOCATED * device.memory_bytes:
        found.append(
            f"JAX takes {PREALLOCATED:.0%} of a GPU's memory unless it is told otherwise: start "
            f"with XLA_PYTHON_CLIENT_MEM_FRACTION={1 - device.reserve:.2f}."
        )
    return found
