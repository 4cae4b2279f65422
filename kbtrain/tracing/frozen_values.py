"""Snapshots of Python values, for later comparison."""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any

import numpy as np

PLAIN = (int, float, complex, str, bytes, bool, type(None), np.generic)
"""Types whose objects are immutable."""

MAX_ITEMS = 256
"""Items of a container that are compared; of longer ones only the first, and the length."""

MAX_BYTES = 1 << 16
"""Size up to which an array is compared by content."""

DEPTH = 4


class Same:
    """Compares by identity; keeps the object alive so that its id is not reused."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, value: Any) -> None:
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other._value is self._value


def is_changeable(value: Any) -> bool:
    """Whether the object may be mutated in place, rather than replaced."""
    if isinstance(value, PLAIN):
        return False
    if isinstance(value, tuple):
        return any(map(is_changeable, value))
    return isinstance(value, list | dict | set | np.ndarray) or is_plain_object(value)


def is_plain_object(value: Any) -> bool:
    """Whether ``value`` is an object of a user class that only holds values (a dataclass)."""
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
    """A comparable snapshot of a value: numbers, strings and containers by content.

    Args:
        value: Any object.
        depth: Levels of nested containers that are compared by content.
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
