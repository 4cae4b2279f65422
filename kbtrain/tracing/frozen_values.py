"""A value as it is now, to be compared with what it is later."""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any

import numpy as np

PLAIN = (int, float, complex, str, bytes, bool, type(None), np.generic)
"""Types whose objects never change."""

MAX_ITEMS = 256
"""Items of a container that are compared; of longer ones these and the length."""

MAX_BYTES = 1 << 16
"""Size of an array up to which its content is compared."""

DEPTH = 4


class Same:
    """Equal to itself and to the same object only; keeps it alive, so that no other gets its id."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, value: Any) -> None:
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other._value is self._value


def is_changeable(value: Any) -> bool:
    """Whether the object itself may change, rather than another one be put in its place."""
    if isinstance(value, PLAIN):
        return False
    if isinstance(value, tuple):
        return any(map(is_changeable, value))
    return isinstance(value, list | dict | set | np.ndarray) or is_plain_object(value)


def is_plain_object(value: Any) -> bool:
    """Whether it is an object of a user's class that is there to hold values (a dataclass, say)."""
    if (
        isinstance(value, type | types.ModuleType)
        or callable(value)
        or not hasattr(value, "__dict__")
    ):
        return False
    roots = {cls.__module__.partition(".")[0] for cls in type(value).__mro__} - {"builtins"}
    return roots.isdisjoint(_FRAMEWORKS) or type(value).__name__ == "SimpleNamespace"


_FRAMEWORKS = frozenset(
    ["abc", "keras", "kbtrain", "optim", "torch", "tensorflow", "jax", "numpy", "threading"]
)


def frozen(value: Any, depth: int = DEPTH) -> Any:
    """What of a value can be compared later: numbers, texts and containers by content.

    Args:
        value: Anything.
        depth: Containers within containers that are looked into.
    """
    if isinstance(value, PLAIN):
        return "nan" if value != value else value
    if depth == 0:
        return Same(value)
    if isinstance(value, np.ndarray):
        if value.dtype == object or value.nbytes > MAX_BYTES:
            return Same(value)
        return value.shape, value.dtype.str, value.tobytes()
    if isinstance(value, tuple | list):
        items = [frozen(item, depth - 1) for item in value[:MAX_ITEMS]]
        return type(value).__name__, len(value), items
    if isinstance(value, Mapping) and isinstance(value, dict):
        first = list(value.items())[:MAX_ITEMS]
        return "dict", len(value), [(str(k), frozen(v, depth - 1)) for k, v in first]
    if isinstance(value, set | frozenset):
        return "set", sorted(map(repr, value))
    if is_plain_object(value):
        return Same(value), frozen(vars(value), depth - 1)
    return Same(value)
