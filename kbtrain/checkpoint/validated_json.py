"""Validated, typed access to the JSON documents of a checkpoint.

A checksum proves that a document has not changed since it was written, not that kbtrain wrote it.
So every value is checked for its type before it is used; a wrong one raises a
``CheckpointDamagedError``.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from kbtrain.checkpoint import Checkpoint
from kbtrain.errors import CheckpointDamagedError, KbtrainError
from kbtrain.utils.json_types import matches_type

T = TypeVar("T")


def mapping(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    """Return a required document that is a JSON object.

    Raises:
        CheckpointDamagedError: The document is missing or is not an object.
    """
    value = checkpoint.documents.get(name)
    if not isinstance(value, dict):
        damaged(checkpoint, name, f"expected a mapping. Received: {type(value).__name__}")
    return value


def fields_of(checkpoint: Checkpoint, name: str, cls: type[Any]) -> dict[str, Any]:
    """Return the fields of a dataclass from a document; unknown keys are ignored.

    Args:
        checkpoint: The checkpoint with the document.
        name: Name of the document.
        cls: A dataclass of plain types; a number for ``int`` is 0 or more.

    Raises:
        CheckpointDamagedError: A field has a different type from the one the class declares.
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
    """Run an action that restores part of a checkpoint; an error names that part.

    Raises:
        CheckpointDamagedError: The action failed.
    """
    try:
        return action()
    except KbtrainError:
        raise
    except Exception as error:  # malformed values can make anything fail
        damaged(checkpoint, name, f"it cannot be restored ({type(error).__name__}: {error})")


def damaged(checkpoint: Checkpoint, name: str, problem: str) -> NoReturn:
    """Raise the error for a document that kbtrain did not write."""
    raise CheckpointDamagedError(
        f"The checkpoint {checkpoint.path} is damaged: {name}.json: {problem:.300}. Its checksums "
        "are correct, so it was written like this. Resume from another checkpoint."
    )
