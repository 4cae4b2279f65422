"""Where a run stands before an update."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Moment:
    """Where a run stands before an update.

    Attributes:
        step: Updates done.
        epoch: Number of the epoch.
        batch: Micro-batches of it that are done.
        batches: Micro-batches that make one epoch.
        micro_batches: Micro-batches of the next update; 0 where time stands still (evaluations).
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    batches: int = 1
    micro_batches: int = 0

    def after(self, updates: int) -> Moment:
        """The same, some updates later in the epoch."""
        if not self.micro_batches:
            return self
        done = self.batch + updates * self.micro_batches
        return replace(self, step=self.step + updates, batch=done)

    @classmethod
    def of(cls, step: int, epoch: float) -> Moment:
        """A moment in which nothing is trained."""
        whole, parts = int(epoch), 1 << 20
        return cls(step, whole, round((epoch - whole) * parts), parts)

    def read(self, name: str) -> float:
        """The value of ``TrainerState.global_step`` or ``epoch``."""
        return self.step if name == "global_step" else self.epoch + self.batch / self.batches
