"""Chooses how many steps run in one call to the device."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

BLOCK_SECONDS = 0.1
"""How long one call may take; progress bars and interrupts wait that long."""


@dataclass
class BlockLength:
    """Increases the length of blocks while one takes less than ``BLOCK_SECONDS``.

    Measuring waits for the device, so it stops after a few times, when blocks have reached their
    maximum length or have failed to grow three times. Compiled code does not depend on it.

    Attributes:
        affordable: Maximum number of steps in one call.
    """

    affordable: int = 1
    _attempts: int = 3
    _compiled: set[Hashable] = field(default_factory=set)

    @classmethod
    def of(cls, steps: int | str) -> BlockLength:
        """The block length for ``steps_per_execution``; a number is fixed and not measured."""
        return cls() if isinstance(steps, str) else cls(steps, 0)

    def is_worth_measuring(self, outline: Hashable) -> bool:
        """Whether to time a block of this structure; False for the first, which is compiled."""
        if outline not in self._compiled:
            self._compiled.add(outline)
            return False
        return self._attempts > 0

    def measured(self, steps: int, capacity: int, seconds: float) -> None:
        """Update the length from the time of a block, from its start until the device was done.

        Args:
            steps: Steps in the block.
            capacity: Steps that the block can hold.
            seconds: The time in seconds.
        """
        fits = int(BLOCK_SECONDS * steps / max(seconds, 1e-9))
        longer = max(1, min(capacity, fits, 4 * self.affordable))
        if longer <= self.affordable:
            self._attempts -= 1
        self.affordable = max(longer, self.affordable)
