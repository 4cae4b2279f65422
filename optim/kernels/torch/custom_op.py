"""Python functions as PyTorch operations, so that they can be part of a captured training step.

Capturing a step records such an operation as a whole and not what it does inside; it runs when the
captured step runs. Its arguments are tensors and numbers only: other objects are passed by number.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch

# Definitions last as long as this does.
LIBRARY = torch.library.Library("optim", "FRAGMENT")

MOST_ELEMENTS = 1 << 24
"""Elements of a tile on a GPU."""

T = TypeVar("T")


def define_in_place(signature: str, run: Callable[..., None]) -> None:
    """Define ``torch.ops.optim.NAME``, which changes some of its arguments and has no result.

    Args:
        signature: As PyTorch writes it: ``NAME(Tensor(a!)[] changed, ...) -> ()``.
        run: What it does on a CPU or a GPU. Tensors without memory have nothing to update.
    """
    LIBRARY.define(signature)
    name = signature.partition("(")[0]
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, run, key)
    LIBRARY.impl(name, lambda *args: None, "Meta")


def on_gpu(device: torch.device) -> bool:
    """Whether kernels for a GPU are for this device, and scalars are not to be read."""
    return str(device.type) != "cpu"


def tile_width(each: int, largest: int, device: torch.device) -> int:
    """How many elements to work on at a time: some for each thread on a CPU, else many.

    On a GPU the tile is as large as a launch is worth, and no larger, as buffers have its size: the
    table of a language model would need gigabytes.

    Args:
        each: Elements for a thread.
        largest: Of the tensors to work on, in elements.
        device: Where they are.
    """
    most = MOST_ELEMENTS if on_gpu(device) else each * int(torch.get_num_threads())
    return min(most, largest)


class NumberedObjects(Generic[T]):
    """Objects by number, which an operation can take in their place."""

    def __init__(self) -> None:
        self._objects: list[T] = []
        self._numbers: weakref.WeakKeyDictionary[Any, dict[Any, int]] = weakref.WeakKeyDictionary()

    def __getitem__(self, number: int) -> T:
        return self._objects[number]

    def number(self, owner: Any, key: Any, make: Callable[[], T]) -> int:
        """The number of the object that ``owner`` has under ``key``, made the first time.

        Args:
            owner: Is not kept alive.
            key: Hashable.
            make: Makes the object.
        """
        numbers = self._numbers.setdefault(owner, {})
        if key not in numbers:
            self._objects.append(make())
            numbers[key] = len(self._objects) - 1
        return numbers[key]
