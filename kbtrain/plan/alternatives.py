"""What other arguments would change, and which of them to advise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kbtrain.optimization import registry
from kbtrain.plan.fitting import LargestBatch
from kbtrain.plan.plan import BATCH, Advice, Case
from kbtrain.plan.run_backend import JAX, RunBackend
from kbtrain.utils.machine.devices import DeviceSpec

if TYPE_CHECKING:
    from kbtrain.training.trainer_base import TrainerBase

WORTHWHILE = 0.9
"""An alternative is advised for speed if its bound is at most this part of the run's."""

LAUNCHING = 1e-4
"""Seconds that a host takes to launch an update, at least: a shorter bound says nothing."""

EIGHT_BIT = {"adam": "adamw_8bit"}
"""Optimizers whose 8-bit form is not called ``{name}_8bit``."""

HALF = {"bf16": "bfloat16", "fp16": "float16"}
"""Fields for half precision and their dtypes, the better one first; old GPUs lack bfloat16."""


def candidates(
    trainer: TrainerBase,
    device: DeviceSpec,
    count: int,
    chosen: Mapping[str, Any],
    backend: RunBackend = JAX,
) -> dict[str, Any]:
    """Changes that usually save memory or time, by name; those that the run has are left out.

    Args:
        trainer: The Trainer.
        device: The device.
        count: Number of devices.
        chosen: Changes that are made in any case.
        backend: The backend of the run.
    """

    def now(field: str) -> Any:
        return chosen[field] if field in chosen else getattr(trainer.args, field)

    found: dict[str, dict[str, Any]] = {}
    if not now("gradient_checkpointing"):
        found["gradient checkpointing"] = {"gradient_checkpointing": True}
    if not now("bf16") and not now("fp16") and trainer.model.compute_dtype == "float32":
        half = next((n for n, dtype in HALF.items() if dtype in device.peak_flops), None)
        if half is not None:
            found[half] = {half: True}
    if (eight := _eight_bit(trainer, now("optim"))) is not None:
        found["8-bit optimizer"] = {"optim": eight}
    if count > 1 and now("fsdp") is None and now("parallelism_config") is None:
        found["fsdp"] = {"fsdp": True if backend.divides_weights else backend.fsdp}
    size, steps = now(BATCH), now("gradient_accumulation_steps")
    if size % 2 == 0:
        found["accumulation"] = {
            BATCH: size // 2,
            "gradient_accumulation_steps": 2 * steps,
        }
    return found


def _eight_bit(trainer: TrainerBase, optim: str) -> str | None:
    """The optimizer of the arguments with a state of 8 bits; None if there is no choice."""
    if trainer.given_optimizers[0] is not None or trainer.bound.compiled:
        return None
    name = EIGHT_BIT.get(optim, f"{optim}_8bit")
    return name if name in registry.names(registry.OPTIMIZERS) else None


def advise(run: Case, alternatives: Sequence[Case], largest: LargestBatch | None) -> Advice:
    """The advice that follows from the cases.

    Args:
        run: The run as it is.
        alternatives: The run with something changed.
        largest: The largest batch that fits, for a run of which nothing else is changed.
    """
    fitting = sorted((each for each in alternatives if each.fits), key=_seconds)
    if run.fits:
        if _is_tiny(run):
            return Advice("It fits as it is, and an update is too short to gain anything.", {})
        if fitting and _seconds(fitting[0]) <= WORTHWHILE * _seconds(run):
            gain = _seconds(run) / _seconds(fitting[0])
            return Advice(
                f"It fits. With {fitting[0].name} the least time for as many samples is {gain:.1f} "
                "times shorter.",
                fitting[0].changes,
            )
        return Advice("It fits as it is, and no alternative has a much better bound.", {})
    if fitting:
        return Advice(
            f"It does not fit. With {fitting[0].name} it does, at the least loss of time.",
            fitting[0].changes,
        )
    if largest is not None and largest.batch_size:
        return Advice(
            f"It does not fit, and no alternative changes that; a batch of {largest.batch_size} "
            "does.",
            {BATCH: largest.batch_size},
        )
    return Advice(
        "It does not fit, and neither an alternative nor a smaller batch changes that: take a "
        "smaller model, larger devices, or more of them with fsdp.",
        {},
    )


def _is_tiny(case: Case) -> bool:
    return case.roofline is not None and case.roofline.seconds < LAUNCHING


def _seconds(case: Case) -> float:
    """The least time per sample."""
    assert case.roofline is not None
    assert case.facts is not None
    return case.roofline.seconds / case.facts.samples
