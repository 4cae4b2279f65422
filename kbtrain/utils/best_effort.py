"""What only talks about a run may not end it: progress, trackers, log lines, messages.

The screen may be a pipe that is closed, a terminal that is gone or a file on a full disk; a tracker
may lose its connection. None of it touches what is trained, so it costs a warning and what could
not be said. Callbacks of the user's own are another matter: what they raise ends the run.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from typing import Any, ParamSpec

from kbtrain.errors import KbtrainError

P = ParamSpec("P")

logger = logging.getLogger("kbtrain")


def best_effort(event: Callable[P, Any]) -> Callable[P, None]:
    """Let an event of a class that only talks report its errors, once an object, and go on.

    Mistakes of the user (``KbtrainError``) are raised as ever. A method of a subclass that calls
    this one is not covered: it is the user's own.
    """

    @functools.wraps(event)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            event(*args, **kwargs)
        except KbtrainError:
            raise
        except Exception as error:
            warn_once(args[0], event.__name__, error)

    return guarded


def warn_once(reporter: Any, what: str, error: Exception) -> None:
    """Say, once for each object, that something could not be said."""
    if getattr(reporter, "_has_failed", False):
        return
    reporter._has_failed = True
    logger.warning(
        "%s.%s failed (%s: %s). Training goes on without what it would have shown; this is said "
        "once.",
        type(reporter).__name__,
        what,
        type(error).__name__,
        error,
    )


def print_line(line: str, error_stream: bool = True) -> None:
    """Print a line to stderr, or to stdout, if that can be done."""
    stream = sys.stderr if error_stream else sys.stdout
    if stream is None:  # a program without a console
        return
    try:
        print(line, file=stream)
    except (OSError, ValueError) as error:  # full, gone, closed, or of an encoding without these
        if isinstance(error, UnicodeEncodeError):
            _print_in_ascii(line, stream)


def _print_in_ascii(line: str, stream: Any) -> None:
    try:
        print(line.encode("ascii", "backslashreplace").decode(), file=stream)
    except (OSError, ValueError):
        return


def guard_logger(name: str = "kbtrain") -> None:
    """Keep the handlers of a logger, the user's own included, from ending what logs.

    Python's handlers report their errors to stderr and raise where that is closed.
    """
    target = logging.getLogger(name)
    if getattr(target, "_guarded", False):
        return
    call_handlers = target.callHandlers

    def guarded(record: logging.LogRecord) -> None:
        try:
            call_handlers(record)
        except (OSError, ValueError, RecursionError):
            return  # there is nowhere to say it

    target.callHandlers = guarded  # type: ignore[method-assign]
    target._guarded = True  # type: ignore[attr-defined]
