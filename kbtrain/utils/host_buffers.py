"""Host memory for the copy of a run's state that a checkpoint is written from.

Memory that is new costs several times the copy: the system has to find and clear its pages at the
first touch. So what one snapshot was made in is kept for the next. That is one copy of the state,
as long as a run goes on, and no more than a save needs at any time.
"""

from __future__ import annotations

from typing import Any

import numpy as np


class HostBuffers:
    """Arrays by name, handed out again for each snapshot.

    Whoever takes an array for a second time must have no more use for what the first one held: the
    snapshot before must have been written.
    """

    def __init__(self) -> None:
        self._arrays: dict[str, np.ndarray] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        """An array, with whatever is in it; the one of the last time, if it fits."""
        array = self._arrays.get(name)
        if array is None or array.shape != shape or array.dtype != dtype:
            array = self._arrays[name] = np.empty(shape, dtype)
        return array
