"""Output files of a run for people and other programs: written atomically, with clear errors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kbtrain.errors import OutputError
from kbtrain.utils.files import filesystem


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Convert an ``OSError`` into an error that says what could not be written and what to do.

    Raises:
        OutputError: In place of an ``OSError`` inside.
    """
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        if error.errno in filesystem.NO_SPACE:
            advice = filesystem.describe_space(path.parent) + " Free space, or choose another disk."
        else:
            advice = filesystem.what_to_do(path.parent, error)
        raise OutputError(f"Could not write {path}: {error.strerror or error}. {advice}") from error


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Write a file atomically, creating its folder if necessary.

    Args:
        path: The file; an existing one is replaced.

    Yields:
        A temporary path to write to, with the same extension as ``path``.

    Raises:
        OutputError: The file cannot be written.
    """
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with filesystem.replacing(path) as temporary:
            yield temporary


def save_text(path: Path, text: str) -> None:
    """Write a text file."""
    with writing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save_json(path: Path, document: Any) -> None:
    """Write an indented JSON file."""
    save_text(path, json.dumps(document, indent=2, sort_keys=True) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object in order to add to it; empty if there is no such file.

    Raises:
        OutputError: The file cannot be read, or does not hold a JSON object.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        document = error
    if not isinstance(document, dict):
        raise OutputError(
            f"{path} does not hold a JSON object, so nothing can be added to it. Delete or rename "
            "it. "
            f"Received: {document!r:.80}"
        )
    return document
