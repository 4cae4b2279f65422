"""The warnings of a run, collected while it lives: those of the logger kbtrain and of Python."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable
from typing import Any

Note = Callable[[str, str], None]


class WarningCollector(logging.Filter):
    """Passes what is logged at WARNING and above, and shown warnings of Python, to a function.

    It is a filter that lets everything pass, because with a handler more on the logger Python would
    no longer print the warnings of a program that has set up no logging.

    Args:
        note: Gets level and text of each.
    """

    def __init__(self, note: Note) -> None:
        super().__init__()
        self._note = note
        self._previous: Any = None
        self._installed: Any = None

    def filter(self, record: logging.LogRecord) -> bool:
        """Note a record of the logger."""
        if record.levelno >= logging.WARNING:
            with contextlib.suppress(Exception):  # arguments that do not fit their message
                self._note(record.levelname.lower(), record.getMessage())
        return True

    def start(self) -> None:
        """Begin to collect."""
        self.stop()
        logging.getLogger("kbtrain").addFilter(self)
        self._previous = previous = warnings.showwarning

        def show(message: Any, category: Any, *where: Any, **more: Any) -> None:
            with contextlib.suppress(Exception):
                self._note("warning", f"{category.__name__}: {message}")
            previous(message, category, *where, **more)

        self._installed = warnings.showwarning = show

    def stop(self) -> None:
        """Stop, and leave everything as it was."""
        logging.getLogger("kbtrain").removeFilter(self)
        if self._installed is not None and warnings.showwarning is self._installed:
            warnings.showwarning = self._previous  # else someone has replaced it meanwhile
        self._previous = self._installed = None
