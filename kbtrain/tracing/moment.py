"""The position of a run before an update."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Moment:
    """The position of a run before an update.

    Attributes:
        step: Updates done.
        epoch: Index of the epoch.
        batch: Micro-batches done in this epoch.
        batches: Micro-batches per epoch.
        micro_batches: Micro-batches of the next update; 0 in evaluations, which do not advance.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    batches: int = 1
    micro_batches: int = 0

    def after(self, updates: int) -> Moment:
        """The position some updates later in the epoch."""
        if not self.micro_batches:
            return self
        done = self.batch + updates * self.micro_batches
        return replace(self, step=self.step + updates, batch=done)

    @classmethod
    def of(cls, step: int, epoch: float) -> Moment:
        """A position outside training."""
        whole, parts = int(epoch), 1 << 20
        return cls(step, whole, round((epoch - whole) * parts), parts)

    def read(self, name: str) -> float:
        """The value of ``TrainerState.global_step`` or ``epoch``."""
        return self.step if name == "global_step" else self.epoch + self.batch / self.batches
