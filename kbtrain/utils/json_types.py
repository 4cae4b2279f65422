"""Dataclasses as JSON values, and values parsed from JSON against type annotations."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, Self


class JsonDataclass:
    """The base of dataclasses whose fields are JSON values."""

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return dataclasses.asdict(self)  # type: ignore[call-overload,no-any-return]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Inverse of ``to_dict``; fields of a newer version are left out.

        Raises:
            TypeError: A field is missing.
        """
        names = {each.name for each in dataclasses.fields(cls)}  # type: ignore[arg-type]
        return cls(**{name: value for name, value in values.items() if name in names})


def matches_type(value: Any, expected: Any) -> bool:
    """Whether a value parsed from JSON matches a type annotation of a dataclass."""
    origin, inner = typing.get_origin(expected), typing.get_args(expected)
    if origin in (typing.Union, types.UnionType):
        return any(matches_type(value, one) for one in inner)
    if origin in (dict, Mapping):
        return isinstance(value, dict) and all(
            matches_type(item, inner[1]) for item in value.values()
        )
    if origin is list:
        return isinstance(value, list) and all(matches_type(item, inner[0]) for item in value)
    if expected is Any:
        return True
    if isinstance(value, bool):
        return expected is bool
    if expected is float:
        return isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)
    if expected is int:
        return isinstance(value, int) and 0 <= value < 2**63
    return isinstance(value, expected)
