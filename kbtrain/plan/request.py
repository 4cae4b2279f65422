"""A program that is run to be planned: its first ``fit`` makes the plan in place of training."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

from kbtrain.errors import place_of
from kbtrain.plan.process import chosen_by_program
from kbtrain.plan.run_backend import run_backend
from kbtrain.utils.json_types import JsonDataclass

if TYPE_CHECKING:
    from kbtrain.plan.plan import Plan
    from kbtrain.training.trainer_base import TrainerBase

FRAMEWORKS = {"torch": "PyTorch", "tensorflow": "TensorFlow", "jax": "JAX"}


@dataclass(frozen=True)
class PlanRequest(JsonDataclass):
    """What to plan.

    Attributes:
        device: The name of a device, or the path of a file.
        count: Number of devices.
        batch: Batch sizes of a device.
        quick: Whether to compile the run alone.
        changes: Fields of ``TrainingArguments`` to change.
        fsdp: Whether to divide state among the devices, as far as the backend can.
        backend: The backend that the program would run on.
    """

    device: str
    count: int = 1
    batch: tuple[int, ...] = ()
    quick: bool = False
    changes: Mapping[str, Any] = field(default_factory=dict)
    fsdp: bool = False
    backend: str = "jax"


class PlanMade(SystemExit):
    """Ends a program whose plan is made.

    It derives from ``SystemExit``, so that ``except Exception`` in the program does not stop it.

    Attributes:
        plan: The plan.
    """

    def __init__(self, plan: Plan) -> None:
        super().__init__(0)
        self.plan = plan


Outcome = BaseException
"""How a request was answered: ``PlanMade``, or the error that planning raised."""

_request: PlanRequest | None = None
_outcome: Outcome | None = None
_leave: Callable[[Outcome], object] | None = None


def pending() -> bool:
    """Whether this program is run to be planned, not to train."""
    return _request is not None


def outcome() -> Outcome | None:
    """How the request was answered; None as long as it was not."""
    return _outcome


@contextlib.contextmanager
def requested(
    request: PlanRequest, leave: Callable[[Outcome], object] | None = None
) -> Iterator[None]:
    """Context in which a call of ``fit`` makes a plan, whatever the program does about it.

    Args:
        request: What to plan.
        leave: Is called with the outcome of the first ``fit`` and may end the process, so that the
            program does nothing more. If it returns, the outcome is raised.
    """
    global _request, _outcome, _leave
    _request, _outcome, _leave = request, None, leave
    try:
        yield
    finally:
        _request = _leave = None


def answer(trainer: TrainerBase, call: str = "fit") -> NoReturn:
    """Make the plan that was requested, and end the program.

    The request stays: a program that goes on after the first call (``except Exception`` around a
    loop over configurations) must not train at the next one, which has the same outcome.

    Args:
        trainer: The Trainer whose ``fit`` was called.
        call: The method that was called.

    Raises:
        PlanMade: There is a plan.
        BaseException: What making it raised.
    """
    global _outcome
    if _outcome is None:
        try:
            _outcome = PlanMade(_made(trainer, call, place_of(sys._getframe(1))))
        except BaseException as error:
            _outcome = error
        if _leave is not None:
            _leave(_outcome)
    raise _outcome


def _made(trainer: TrainerBase, call: str, place: str) -> Plan:
    from kbtrain.plan.planner import plan_run

    request = _request
    assert request is not None
    backend = run_backend(chosen_by_program(os.environ, request.backend))
    notes = [f"Planned: the first call of {call}(){place}. Later ones are not."]
    if backend.name != "jax":
        notes.append(other_backend(backend.name))
    changes = dict(request.changes)
    if request.fsdp:
        changes["fsdp"] = backend.fsdp
        if not backend.divides_weights:
            notes.append(
                f"--fsdp is fsdp={backend.fsdp!r} on {backend.title}, which keeps weights whole."
            )
    return plan_run(
        trainer,
        request.device,
        request.count,
        batch=request.batch,
        quick=request.quick,
        changes=changes,
        notes=notes,
        backend=backend,
        tell=lambda what: print(f"kbtrain plan: {what}", file=sys.stderr, flush=True),
    )


def other_backend(backend: str) -> str:
    """What a plan made with JAX says of a run on another backend."""
    own = run_backend(backend).title
    return (
        f"The program runs on {own} and was compiled with JAX, which alone compiles for devices "
        f"that are not here. Weights, gradients and optimizer state are those of {own} too; "
        "activations, scratch memory and speed may differ."
    )
