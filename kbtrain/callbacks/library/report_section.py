"""Showing something in the record of a run, and so in its report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def add_section(trainer: Any, title: str, content: str | Sequence[Sequence[Any]]) -> bool:
    """Add a section to the report of the run, in place of one with the same title.

    Args:
        trainer: The Trainer.
        title: Its heading.
        content: HTML that loads nothing, or a table: rows of cells, the first one its head.

    Returns:
        Whether the run keeps a record.
    """
    for callback in trainer.callback_handler.callbacks:
        record = getattr(callback, "record", None)
        if record is not None and hasattr(record, "add_section"):
            record.add_section(title, content)
            return True
    return False
