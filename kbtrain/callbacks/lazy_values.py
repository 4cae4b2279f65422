"""Lazy views of the latest update; fetched on first access."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, overload

import numpy as np

from kbtrain.data import Block, micro_batches


class LazyNumber:
    """A number on the device; ``float(number)`` waits for it.

    Args:
        read: Returns the number; called at most once.
    """

    def __init__(self, read: Callable[[], float]) -> None:
        self._read = read
        self._value: float | None = None

    def __float__(self) -> float:
        if self._value is None:
            self._value = float(self._read())
        return self._value

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(float(self), dtype)

    def __format__(self, spec: str) -> str:
        return format(float(self), spec)

    def __repr__(self) -> str:
        return f"LazyNumber({'not read yet' if self._value is None else self._value})"


class LazyMapping(Mapping[str, Any]):
    """Results by name; accessing them waits for the device.

    Args:
        read: Returns the results; called at most once.
    """

    def __init__(self, read: Callable[[], Mapping[str, Any]]) -> None:
        self._read = read
        self._values: Mapping[str, Any] | None = None

    def _known(self) -> Mapping[str, Any]:
        if self._values is None:
            self._values = self._read()
        return self._values

    def __getitem__(self, name: str) -> Any:
        return self._known()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._known())

    def __len__(self) -> int:
        return len(self._known())

    def __repr__(self) -> str:
        return f"LazyMapping({'not read yet' if self._values is None else self._values})"


class MicroBatches(Sequence[Any]):
    """The micro-batches of the last update of a block, in the structure of the data set.

    They are NumPy arrays on the host, sliced from the block on access.

    Args:
        block: The block.
    """

    def __init__(self, block: Block) -> None:
        self._block = block

    def __len__(self) -> int:
        return self._block.micro_batches

    @overload
    def __getitem__(self, index: int) -> Any: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Any]: ...

    def __getitem__(self, index: int | slice) -> Any:
        return list(self)[index]

    def __iter__(self) -> Iterator[Any]:
        yield from micro_batches(self._block.chunks, self._block.updates - 1)
