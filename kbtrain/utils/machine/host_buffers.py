"""Reusable host memory for the copy of a run's state that a checkpoint is written from.

Copying into new memory takes several times as long, because the system has to allocate and clear
its pages on first access. So the buffers of one snapshot are reused for the next. They hold one
copy of the state for the length of a run, which is no more than a save needs anyway.
"""

from __future__ import annotations

from typing import Any

import numpy as np


class HostBuffers:
    """Arrays by name, handed out again for each snapshot.

    Taking an array again overwrites its contents, so the previous snapshot must have been written.
    """

    def __init__(self) -> None:
        self._arrays: dict[str, np.ndarray] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        """An uninitialized array; the one handed out last time if shape and dtype match."""
        array = self._arrays.get(name)
        if array is None or array.shape != shape or array.dtype != dtype:
            array = self._arrays[name] = np.empty(shape, dtype)
        return array
