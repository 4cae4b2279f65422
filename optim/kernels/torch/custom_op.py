"""Python functions as PyTorch operations, so that they can be part of a captured training step.

Capturing a step records such an operation as a whole and not what it does inside; it runs when the
captured step runs. Its arguments are tensors and numbers only: other objects are passed by number.
"""

from __future__ import annotations

import itertools
import threading
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
    schema = getattr(torch.ops.optim, name).default._schema
    changed = [i for i, a in enumerate(schema.arguments) if a.alias_info and a.alias_info.is_write]

    def run_and_note(*args: Any, **kwargs: Any) -> None:
        run(*args, **kwargs)
        # Autograd has to notice that what it kept for a backward pass is not the same any more.
        torch.autograd.graph.increment_version([t for i in changed for t in args[i]])

    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, run_and_note, key)
    LIBRARY.impl(name, lambda *args, **kwargs: None, "Meta")


def settings_of(rule: Any) -> tuple[Any, ...]:
    """The hyperparameters of a rule as they are now: what is made of them is made for these.

    Args:
        rule: An optimizer. What is a variable of it is not among them, as the learning rate, which
            would be read from the device.
    """
    return tuple((name, x) for name, x in vars(rule).items() if _is_setting(x))


def _is_setting(value: Any) -> bool:
    if type(value) is tuple:
        return all(map(_is_setting, value))
    return value is None or isinstance(value, bool | int | float | str)


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


MOST_OBJECTS = 1024
"""Of an owner, whose hyperparameters may change with every update."""


class NumberedObjects(Generic[T]):
    """Objects by number, which an operation can take in their place.

    They go with their owner; of one that has very many, those that were asked for the longest ago.
    """

    def __init__(self) -> None:
        self._objects: dict[int, T] = {}
        self._next = itertools.count()
        self._lock = threading.Lock()
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
        with self._lock:
            numbers = self._numbers.get(owner)
            if numbers is None:
                numbers = self._numbers[owner] = {}
                weakref.finalize(owner, _forget, self._objects, numbers).atexit = False
            if key in numbers:
                numbers[key] = numbers.pop(key)
                return numbers[key]
        made = make()  # which may ask for other objects
        with self._lock:
            if key not in numbers:
                numbers[key] = next(self._next)
                self._objects[numbers[key]] = made
                if len(numbers) > MOST_OBJECTS:
                    del self._objects[numbers.pop(next(iter(numbers)))]
            return numbers[key]


def _forget(objects: dict[int, Any], numbers: dict[Any, int]) -> None:
    # Without the lock: a thread may hold it while memory is collected.
    for number in numbers.values():
        objects.pop(number, None)
