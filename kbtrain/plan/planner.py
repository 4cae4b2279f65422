"""Makes the plan of a run: compiles it as it is, with other batch sizes, and its alternatives."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kbtrain.errors import ConfigurationError, KbtrainError, OutOfMemoryError, first_lines
from kbtrain.plan.alternatives import HALF, LAUNCHING, advise, candidates
from kbtrain.plan.compile import compile_program
from kbtrain.plan.devices import device_named
from kbtrain.plan.fitting import LargestBatch, SearchStopped, largest_batch
from kbtrain.plan.plan import BATCH, Advice, Case, Plan
from kbtrain.plan.program import ProgramFacts
from kbtrain.plan.roofline import roofline
from kbtrain.plan.run_backend import JAX, RunBackend
from kbtrain.utils.machine.devices import DeviceSpec

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
    backend: RunBackend = JAX,
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
        backend: The backend of the run, if that is not JAX.
        tell: Is told what is being compiled.

    Raises:
        ConfigurationError: An argument is invalid, or the run cannot be compiled ahead of time.
    """
    spec = device_named(device)
    check_numbers(count, batch)
    chosen = dict(changes or {})
    if batch:
        chosen[BATCH] = batch[0]
    backend.check_division(trainer.args.replace(**chosen))  # also checks names and values

    def compile_run(changed: Mapping[str, Any]) -> ProgramFacts:
        shown = ", ".join(f"{name}={value!r}" for name, value in changed.items())
        tell(f"compiling for {count} x {spec.title}: {shown or 'the run as it is'}")
        return compile_program(trainer, device=spec, count=count, changes=changed, backend=backend)

    cases = _Cases(spec, compile_run, chosen, _Settings(trainer, backend))
    run = cases.case("as it is", {}, optional=False)
    sizes = tuple(cases.case(f"batch {size}", {BATCH: size}) for size in batch[1:])
    alternatives: list[Case] = []
    largest = None
    advice = Advice("", {})
    if not quick:
        change_of = candidates(trainer, spec, count, chosen, backend)
        alternatives = [cases.case(name, change) for name, change in change_of.items()]
        if not run.fits and (together := cases.combined(alternatives)) is not None:
            alternatives.append(together)
        largest = cases.largest(chosen.get(BATCH, trainer.args.per_device_train_batch_size))
        advice = advise(run, alternatives, largest)
    said = [*notes, *notes_of_run(trainer), *_notes(run, spec, cases.dtype_of_run, backend)]
    said += cases.notes
    return Plan(
        device=spec,
        count=count,
        model=str(trainer.model.name),
        run=run,
        batches=sizes,
        alternatives=tuple(alternatives),
        largest=largest,
        advice=advice,
        notes=tuple(dict.fromkeys(said)),
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


class _Settings:
    """What a run's arguments say, with some of them changed."""

    def __init__(self, trainer: TrainerBase, backend: RunBackend) -> None:
        self._trainer, self._backend = trainer, backend

    def dtype(self, changes: Mapping[str, Any]) -> str:
        """The dtype that it computes in."""
        args = self._trainer.args
        for name, dtype in HALF.items():
            if changes.get(name, getattr(args, name)):
                return dtype
        if args.bf16 or args.fp16:  # taken back by the changes
            return "float32"
        return str(self._trainer.model.compute_dtype)

    def tf32(self, changes: Mapping[str, Any]) -> bool:
        """Whether products in float32 use TensorFloat-32."""
        asked = changes.get("tf32", self._trainer.args.tf32)
        if asked is None:
            asked = self._backend.tf32
        return self._trainer.backend.tf32_is_on() if asked is None else bool(asked)

    def real(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        """The changes without those to what the arguments say already."""
        args = self._trainer.args
        changed = args.replace(**changes)
        return {
            name: value
            for name, value in changes.items()
            if getattr(changed, name, value) != getattr(args, name, None)
        }


class _Cases:
    """Compiles the cases of a plan, each set of changes once.

    Args:
        device: The device.
        compile_run: Compiles the run with changes.
        chosen: Changes that are made in any case.
        settings: What the run's arguments say.
    """

    def __init__(
        self,
        device: DeviceSpec,
        compile_run: Compile,
        chosen: Mapping[str, Any],
        settings: _Settings,
    ) -> None:
        self._device, self._compile, self._chosen = device, compile_run, chosen
        self._settings = settings
        self._known: dict[str, ProgramFacts] = {}
        self.notes: list[str] = []

    @property
    def dtype_of_run(self) -> str:
        """The dtype that the run computes in."""
        return self._settings.dtype(self._chosen)

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
        except Exception as error:  # of a compiler or the model; other cases may be well
            if not optional:
                raise
            problem = f"{type(error).__name__}: {first_lines(error, 1)}"
        else:
            dtype, tf32 = self._settings.dtype(made), self._settings.tf32(made)
            bound = roofline(facts, self._device, dtype, tf32)
            return Case(name, changes, facts, bound, usable)
        return Case(name, changes, None, None, usable, problem)

    def _facts(self, made: Mapping[str, Any]) -> ProgramFacts:
        made = self._settings.real(made)
        key = repr(sorted(made.items(), key=str))
        if key not in self._known:
            self._known[key] = self._compile(made)
        return self._known[key]

    def largest(self, start: int) -> LargestBatch | None:
        """The largest batch of a device that fits; the search begins with ``start``.

        None if it could not be found out; a note says why.
        """

        def peak(size: int) -> int | None:
            try:
                return self._facts({**self._chosen, BATCH: size}).peak_bytes
            except OutOfMemoryError:
                return None
            except Exception as error:
                self.notes.append(
                    f"The search for the largest batch stopped at {size}, which cannot be "
                    f"compiled: {first_lines(error, 1)}"
                )
                raise SearchStopped from error

        found = largest_batch(peak, self._device.usable_bytes, start)
        return found if found.batch_size or 1 in found.tried else None

    def combined(self, found: Sequence[Case]) -> Case | None:
        """All alternatives that can be compiled together; None if one alone is enough."""
        useful = [each for each in found if each.facts is not None]
        if len(useful) < 2 or any(each.fits for each in useful):
            return None
        together = {k: v for each in useful for k, v in each.changes.items()}
        return self.case(" + ".join(each.name for each in useful), together)


def notes_of_run(trainer: TrainerBase) -> list[str]:
    """What a plan leaves out of the run of a Trainer."""
    found = []
    inputs = getattr(trainer.model, "inputs", None)
    if not inputs or any(None in x.shape[1:] for x in inputs):
        found.append(
            "The samples have the shapes of the first batch: where data are not of one size, "
            "larger samples need more."
        )
    if trainer.args.eval_strategy != "no":
        found.append("Evaluation is not planned: its batches need memory of their own.")
    return found


def _notes(run: Case, device: DeviceSpec, dtype: str, backend: RunBackend) -> list[str]:
    facts = run.facts
    if facts is None:
        return []
    found = [f"{what}, {how}" for what, how in facts.exact.items()]
    if device.kind == "gpu" and dtype == "bfloat16" and dtype not in device.peak_flops:
        found.append(f"{device.title} has no bfloat16: fp16=True in place of bf16=True.")
    if run.roofline is not None and run.roofline.seconds < LAUNCHING:
        found.append("The bound is shorter than launching an update takes: expect far less.")
    preallocates = backend.name == "jax" and device.kind == "gpu"
    if preallocates and run.fits and facts.peak_bytes > PREALLOCATED * device.memory_bytes:
        found.append(
            f"JAX takes {PREALLOCATED:.0%} of a GPU's memory unless it is told otherwise: start "
            f"with XLA_PYTHON_CLIENT_MEM_FRACTION={1 - device.reserve:.2f}."
        )
    return found
