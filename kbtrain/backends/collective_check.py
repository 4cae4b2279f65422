"""``debug="collectives"``: what is about to run on all processes is shown to an observer first.

Processes that meet in different collective operations compute wrong numbers, or wait for each
other. The backends call ``about_to`` and ``about_to_run`` before each of them; the observer, which
``kbtrain.distributed`` sets, compares what the processes announce and raises where they differ.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence

Operation = str | list[str]
"""A collective operation, or the lines of a program that has some."""

_observer: Callable[[Sequence[Operation]], None] | None = None
_noted: list[Operation] | None = None
_error: Exception | None = None


@contextlib.contextmanager
def observed_by(observer: Callable[[Sequence[Operation]], None]) -> Iterator[None]:
    """Context in which an observer learns of operations before they run.

    Args:
        observer: Called in the order of the operations; it raises to keep them from running.
    """
    global _observer
    before = _observer
    _observer = observer
    try:
        yield
    finally:
        _observer = before


def is_observed() -> bool:
    """Whether an observer is set."""
    return _observer is not None


@contextlib.contextmanager
def noting() -> Iterator[list[Operation]]:
    """Context in which operations are recorded and do not run: they are noted in a list."""
    global _noted
    before, _noted = _noted, []
    try:
        yield _noted
    finally:
        _noted = before


def about_to(name: str, shape: Iterable[int] = (), dtype: object = "") -> None:
    """A collective operation is about to run.

    Args:
        name: What it does, such as "all_sum".
        shape: That of what this process sends.
        dtype: Likewise; empty for messages of the host, whose lengths may differ.
    """
    if _noted is None and _observer is None:
        return
    operand = f" of {dtype}[{','.join(map(str, shape))}]" if dtype else ""
    note = f"{name}{operand}"
    if _noted is not None:
        _noted.append(note)
    else:
        about_to_run([note])


def about_to_run(operations: Sequence[Operation]) -> None:
    """A program with these collective operations is about to run."""
    global _error
    if _observer is None or not operations:
        return
    try:
        _observer(operations)
    except Exception as error:
        _error = error
        raise


def take_error() -> Exception | None:
    """What the observer raised last, once: a framework may have put an error of its own around."""
    global _error
    error, _error = _error, None
    return error
