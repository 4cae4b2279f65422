"""Python as an operation of PyTorch's, so that it can be a part of a captured training step.

While a step is recorded such an operation is written down and not looked into; it decides and runs
when the record does. It takes tensors and numbers only: other objects have numbers.
"""

import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch

# Definitions last as long as this does.
LIBRARY = torch.library.Library("optim", "FRAGMENT")

T = TypeVar("T")


def define_in_place(signature: str, run: Callable[..., None]) -> None:
    """Define ``torch.ops.optim.NAME``, which changes some of its arguments and has no result.

    Args:
        signature: as PyTorch writes it: ``NAME(Tensor(a!)[] changed, ...) -> ()``.
        run: what it does on a CPU or a GPU. Tensors without memory have nothing to update.
    """
    LIBRARY.define(signature)
    name = signature.partition("(")[0]
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, run, key)
    LIBRARY.impl(name, lambda *args: None, "Meta")


def piece_width(each: int, largest: int, device: torch.device) -> int:
    """How many elements to work on at a time: some for each thread on a CPU, else all.

    Args:
        each: elements for a thread.
        largest: of the tensors to work on, in elements.
        device: where they are.
    """
    return min(each * torch.get_num_threads(), largest) if device.type == "cpu" else largest


class Numbered(Generic[T]):
    """Objects under numbers, which an operation can be given in their place."""

    def __init__(self) -> None:
        self._objects: list[T] = []
        self._numbers: weakref.WeakKeyDictionary[Any, dict[Any, int]] = weakref.WeakKeyDictionary()

    def __getitem__(self, number: int) -> T:
        return self._objects[number]

    def number(self, owner: Any, key: Any, make: Callable[[], T]) -> int:
        """The number of the object that ``owner`` has under ``key``, made the first time.

        Args:
            owner: is not kept alive.
            key: hashable.
            make: makes the object.
        """
        numbers = self._numbers.setdefault(owner, {})
        if key not in numbers:
            self._objects.append(make())
            numbers[key] = len(self._objects) - 1
        return numbers[key]
