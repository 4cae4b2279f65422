"""The documents of a checkpoint as values that can be relied on: nothing is believed unlooked at.

Checksums say that a document is as it was written, not that kbtrain wrote it. Whatever JSON there
is, it becomes a value of the right types or a ``CheckpointDamagedError``.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from kbtrain.checkpoint import Checkpoint
from kbtrain.errors import CheckpointDamagedError
from kbtrain.utils.json_types import matches_type

T = TypeVar("T")


def mapping(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    """Return a document that has to be there and to be a mapping.

    Raises:
        CheckpointDamagedError: It is not.
    """
    value = checkpoint.documents.get(name)
    if not isinstance(value, dict):
        damaged(checkpoint, name, f"expected a mapping. Received: {type(value).__name__}")
    return value


def fields_of(checkpoint: Checkpoint, name: str, cls: type[Any]) -> dict[str, Any]:
    """Return the fields of a dataclass out of a document; what the class does not know is left out.

    Args:
        checkpoint: Where the document is.
        name: The document.
        cls: A dataclass of plain types; a number for ``int`` is 0 or more.

    Raises:
        CheckpointDamagedError: A field is of another type than the class says.
    """
    found = mapping(checkpoint, name)
    expected = typing.get_type_hints(cls)
    known = [field.name for field in dataclasses.fields(cls) if field.name in found]
    for key in known:
        if not matches_type(found[key], expected[key]):
            problem = f"{key!r} is not of type {expected[key]}. Received: {found[key]!r}"
            damaged(checkpoint, name, problem)
    return {key: found[key] for key in known}


def attempt(checkpoint: Checkpoint, name: str, action: Callable[[], T]) -> T:
    """Do what takes over a part of a checkpoint, and name the part if that fails.

    Raises:
        CheckpointDamagedError: It failed.
    """
    try:
        return action()
    except Exception as error:  # whatever values of any kind lead to
        damaged(checkpoint, name, f"it cannot be taken over ({type(error).__name__}: {error})")


def damaged(checkpoint: Checkpoint, name: str, problem: str) -> NoReturn:
    """Raise the error for a document that kbtrain did not write."""
    raise CheckpointDamagedError(
        f"The checkpoint {checkpoint.path} is damaged: {name}.json: {problem:.300}. Its checksums "
        "are right, so it was written like this. Resume from another one."
    )
