"""``Plan``: whether a run fits on devices that are not here, and how fast it could be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from kbtrain.plan import text
from kbtrain.plan.fitting import LargestBatch
from kbtrain.plan.program import ProgramFacts
from kbtrain.plan.roofline import Roofline
from kbtrain.utils.machine.devices import DeviceSpec

if TYPE_CHECKING:
    from rich.console import RenderableType

BATCH = "per_device_train_batch_size"


@dataclass(frozen=True)
class Case:
    """A run with some of its arguments changed.

    Attributes:
        name: What is different, in words.
        changes: The changed fields of ``TrainingArguments``; empty for the run as it is.
        facts: The compiled program; None if there is none.
        roofline: Its bound; None if there is no program.
        usable_bytes: Memory that there is for it.
        problem: Why there is no program; empty if there is one.
    """

    name: str
    changes: Mapping[str, Any]
    facts: ProgramFacts | None
    roofline: Roofline | None
    usable_bytes: int
    problem: str = ""

    @property
    def fits(self) -> bool:
        """Whether the peak of the program is within the memory."""
        return self.facts is not None and self.facts.peak_bytes <= self.usable_bytes

    @property
    def spare_bytes(self) -> int | None:
        """Memory that is left; negative: what is missing. None without a program."""
        return None if self.facts is None else self.usable_bytes - self.facts.peak_bytes

    def to_dict(self) -> dict[str, Any]:
        """The case as JSON values."""
        return {
            "name": self.name,
            "changes": dict(self.changes),
            "fits": self.fits,
            "spare_bytes": self.spare_bytes,
            "usable_bytes": self.usable_bytes,
            "problem": self.problem,
            "facts": None if self.facts is None else self.facts.to_dict(),
            "roofline": None if self.roofline is None else self.roofline.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Inverse of ``to_dict``."""
        facts, bound = values["facts"], values["roofline"]
        return cls(
            name=values["name"],
            changes=values["changes"],
            facts=None if facts is None else ProgramFacts.from_dict(facts),
            roofline=None if bound is None else Roofline.from_dict(bound),
            usable_bytes=values["usable_bytes"],
            problem=values["problem"],
        )


@dataclass(frozen=True)
class Advice:
    """Arguments to paste, and why.

    Attributes:
        why: A sentence.
        changes: The fields of ``TrainingArguments``; empty if nothing has to be changed.
    """

    why: str
    changes: Mapping[str, Any]

    @property
    def arguments(self) -> str:
        """As in a call: ``bf16=True, optim='adamw_8bit'``."""
        return ", ".join(f"{name}={value!r}" for name, value in self.changes.items())

    @property
    def options(self) -> str:
        """As on a command line: ``--bf16 --optim adamw_8bit``."""
        return " ".join(
            f"--{name}" if value is True else f"--{name} {value}"
            for name, value in self.changes.items()
        )


@dataclass(frozen=True)
class Plan:
    """What a run needs on devices that need not be there.

    Nothing in it is measured: the program has been compiled, not run. ``print(plan)`` shows it, a
    notebook shows it as tables, and ``to_dict`` has every figure.

    Attributes:
        device: The device.
        count: Number of devices.
        model: The name of the model.
        run: The run itself: its program, bound, and whether it fits.
        batches: The run with other batch sizes that were asked for.
        alternatives: The run with one thing changed; the last may be several together.
        largest: The largest batch of a device that fits; None if it was not searched.
        advice: What to do, as arguments.
        notes: What else should be known.
    """

    device: DeviceSpec
    count: int
    model: str
    run: Case
    batches: tuple[Case, ...] = ()
    alternatives: tuple[Case, ...] = ()
    largest: LargestBatch | None = None
    advice: Advice = field(default_factory=lambda: Advice("", {}))
    notes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether the run fits, with the reserve for the framework."""
        return self.run.fits

    @property
    def spare_bytes(self) -> int | None:
        """Memory of a device that is left; negative: what is missing. None if it is unknown."""
        return self.run.spare_bytes

    def to_dict(self) -> dict[str, Any]:
        """All figures as JSON values."""
        return {
            "device": self.device.to_dict(),
            "count": self.count,
            "model": self.model,
            "fits": self.fits,
            "spare_bytes": self.spare_bytes,
            "run": self.run.to_dict(),
            "batches": [each.to_dict() for each in self.batches],
            "alternatives": [each.to_dict() for each in self.alternatives],
            "largest": None if self.largest is None else self.largest.to_dict(),
            "advice": {
                "why": self.advice.why,
                "changes": dict(self.advice.changes),
                "arguments": self.advice.arguments,
            },
            "notes": list(self.notes),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Inverse of ``to_dict``."""
        largest = values["largest"]
        return cls(
            device=DeviceSpec.from_dict(values["device"]),
            count=values["count"],
            model=values["model"],
            run=Case.from_dict(values["run"]),
            batches=tuple(map(Case.from_dict, values["batches"])),
            alternatives=tuple(map(Case.from_dict, values["alternatives"])),
            largest=None if largest is None else LargestBatch.from_dict(largest),
            advice=Advice(values["advice"]["why"], values["advice"]["changes"]),
            notes=tuple(values["notes"]),
        )

    def __str__(self) -> str:
        """The plan as lines of at most 80 columns."""
        return "\n".join(text.lines(self))

    def __rich__(self) -> RenderableType:
        """The same lines, with headings and the verdict set off."""
        return text.styled(self)

    def _repr_html_(self) -> str:
        return text.page(self)
