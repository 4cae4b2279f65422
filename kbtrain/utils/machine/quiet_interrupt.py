"""A Ctrl-C that was asked for and handled: it ends a script without a traceback."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable

from kbtrain.utils.best_effort import print_line

Hook = Callable[[type[BaseException], BaseException, types.TracebackType | None], object]


def quiet(error: BaseException, line: str = "") -> BaseException:
    """Mark an error, which ends the program without a traceback if nobody catches it.

    The exit status stays that of the error: 130, as a shell reports it, for KeyboardInterrupt.

    Args:
        error: The error.
        line: What to print in place of the traceback, if anything.
    """
    error.quiet_line = line  # type: ignore[attr-defined]
    if not isinstance(sys.excepthook, _WithoutTraceback):
        sys.excepthook = _WithoutTraceback(sys.excepthook)
    return error


class _WithoutTraceback:
    """An excepthook that prints no traceback for marked errors.

    Args:
        former: The hook for all others.
    """

    def __init__(self, former: Hook) -> None:
        self._former = former

    def __call__(
        self,
        kind: type[BaseException],
        error: BaseException,
        frames: types.TracebackType | None,
    ) -> None:
        line = getattr(error, "quiet_line", None)
        if line is None:
            self._former(kind, error, frames)
        elif line:
            print_line(line)
