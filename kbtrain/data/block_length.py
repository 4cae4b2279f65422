"""How many steps may run in one call to the device."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

BLOCK_SECONDS = 0.1
"""How long one call may take: a progress bar and an interrupt wait that long."""


@dataclass
class BlockLength:
    """Lets blocks grow as long as one takes less than ``BLOCK_SECONDS``.

    Measuring waits for the device, so it is done a few times only: until the blocks have the length
    they can have, or have not grown three times. What is compiled does not depend on it.

    Attributes:
        affordable: Steps that one call may have.
    """

    affordable: int = 1
    _attempts: int = 3
    _compiled: set[Hashable] = field(default_factory=set)

    @classmethod
    def of(cls, steps: int | str) -> BlockLength:
        """The pace for ``steps_per_execution``: a number stays as it is and is not measured."""
        return cls() if isinstance(steps, str) else cls(steps, 0)

    def is_worth_measuring(self, outline: Hashable) -> bool:
        """Whether to time the block of this structure; never the first of its kind."""
        if outline not in self._compiled:
            self._compiled.add(outline)
            return False
        return self._attempts > 0

    def measured(self, steps: int, capacity: int, seconds: float) -> None:
        """Take note of what a block took, from its start until the device was done.

        Args:
            steps: Steps in the block.
            capacity: Length of the block: the steps it could hold.
            seconds: From start to end.
        """
        fits = int(BLOCK_SECONDS * steps / max(seconds, 1e-9))
        longer = max(1, min(capacity, fits, 4 * self.affordable))
        if longer <= self.affordable:
            self._attempts -= 1
        self.affordable = max(longer, self.affordable)
