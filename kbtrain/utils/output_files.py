"""Files a run leaves for people and other programs: complete or absent, with errors in words."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kbtrain.errors import OutputError
from kbtrain.utils import filesystem


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Say what cannot be written where the system only has an error number.

    Raises:
        OutputError: In place of an ``OSError`` inside.
    """
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        room = filesystem.describe_space(path.parent)
        raise OutputError(
            f"Could not write {path}: {error.strerror or error}. {room}{' ' if room else ''}Choose "
            "another folder (output_dir), or make this one writable."
        ) from error


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Write a file, complete or not at all, in a folder that is made if need be.

    Args:
        path: The file; one that is there is replaced.

    Returns:
        Where to write to inside: a path that ends like ``path``.

    Raises:
        OutputError: It cannot be written.
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
    """Write a JSON file, as people read it."""
    save_text(path, json.dumps(document, indent=2, sort_keys=True) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object, to add to it; empty if there is no such file.

    Raises:
        OutputError: The file cannot be read, or holds something else.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        document = error
    if not isinstance(document, dict):
        raise OutputError(
            f"{path} holds no JSON object, so nothing can be added to it. Delete or rename it. "
            f"Received: {document!r:.80}"
        )
    return document
