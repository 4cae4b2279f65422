"""Best-effort reporting: a failing progress bar, tracker or log line must not end a run.

The output may be a closed pipe, a terminal that no longer exists or a file on a full disk; a
tracker may lose its connection. None of this affects training, so it only costs a warning and the
lost output. A user's own callbacks are different: an exception of theirs ends the run.
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
    """Decorate an event of a reporting callback: its errors become one warning per object.

    A user's mistakes (``KbtrainError``) are still raised. A subclass method that overrides the
    event is not covered, because it is user code.
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
    """Log, once per object, that a reporting callback failed."""
    if getattr(reporter, "_has_failed", False):
        return
    reporter._has_failed = True
    logger.warning(
        "%s.%s failed (%s: %s). Training continues without its output; this warning is shown once.",
        type(reporter).__name__,
        what,
        type(error).__name__,
        error,
    )


def print_line(line: str, error_stream: bool = True) -> None:
    """Print a line to stderr, or to stdout; errors are ignored."""
    stream = sys.stderr if error_stream else sys.stdout
    if stream is None:  # a program without a console
        return
    try:
        print(line, file=stream)
    except (OSError, ValueError) as error:  # disk full, stream closed, or unencodable characters
        if isinstance(error, UnicodeEncodeError):
            _print_in_ascii(line, stream)


def _print_in_ascii(line: str, stream: Any) -> None:
    try:
        print(line.encode("ascii", "backslashreplace").decode(), file=stream)
    except (OSError, ValueError):
        return


def guard_logger(name: str = "kbtrain") -> None:
    """Suppress output errors of a logger's handlers, including the user's own.

    Python's handlers report their errors to stderr, and raise if that is closed.
    """
    target = logging.getLogger(name)
    if getattr(target, "_guarded", False):
        return
    call_handlers = target.callHandlers

    def guarded(record: logging.LogRecord) -> None:
        try:
            call_handlers(record)
        except (OSError, ValueError, RecursionError):
            return  # there is nowhere left to report it

    target.callHandlers = guarded  # type: ignore[method-assign]
    target._guarded = True  # type: ignore[attr-defined]
