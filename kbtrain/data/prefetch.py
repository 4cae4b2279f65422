"""Reading ahead: a thread makes the next items while the device works on this one."""

from __future__ import annotations

import contextlib
import contextvars
import logging
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

logger = logging.getLogger("kbtrain")

T = TypeVar("T")

PATIENCE = 1e-3
"""Seconds an item may take before a thread is worth it.

Handing over an item between threads costs 50 to 100 us, and a thread that runs Python takes turns
with the one that feeds the device. What is made faster than this is made where it is needed.
"""

SLOW_ITEMS = 2
"""Items in a row that have to be slow: the first one alone pays for opening files and the like."""

GRACE = 10.0
"""Seconds that ``close`` waits for an item in the making."""


class Prefetched(Iterator[T], Generic[T]):
    """The items of an iterator, made ahead by a thread once they turn out to be slow.

    The items and their order are those of the iterator; only the time when they are made differs.
    What the iterator raises is raised here, at the place of the item it stands for, with its
    traceback. Call ``close`` (or use ``contextlib.closing``) when the reading ends early.

    Args:
        items: The iterator. Once a thread has been started, only the thread touches it.
        ahead: Items kept ready, at least 1; one more is in the making.
        patience: Seconds that an item may take without a thread; 0 starts one at once.

    Example:
        >>> from contextlib import closing
        >>> with closing(Prefetched(iter(range(4)), ahead=2, patience=0.0)) as items:
        ...     list(items)
        [0, 1, 2, 3]
    """

    def __init__(self, items: Iterator[T], ahead: int = 2, patience: float = PATIENCE) -> None:
        self._items = items
        self._ahead = ahead
        self._patience = patience
        self._slow = 0
        self._thread: threading.Thread | None = None
        self._changed = threading.Condition()
        # What the two threads share, under the condition's lock.
        self._ready: deque[T] = deque()
        self._error: BaseException | None = None
        self._ended = False
        self._closed = False

    @property
    def threaded(self) -> bool:
        """Whether a thread has been started."""
        return self._thread is not None

    def __next__(self) -> T:
        if self._closed:
            raise StopIteration
        if self._thread is None and self._patience <= 0:
            self._start()
        return self._take() if self._thread is not None else self._make()

    def _make(self) -> T:
        """Make an item here; look at the clock."""
        start = time.perf_counter()
        item = next(self._items)
        slow = time.perf_counter() - start > self._patience
        self._slow = self._slow + 1 if slow else 0
        if self._slow >= SLOW_ITEMS:
            self._start()
        return item

    def _take(self) -> T:
        """Wait for an item of the thread's."""
        with self._changed:
            while not self._ready and not self._ended:
                self._changed.wait()
            if self._ready:
                item = self._ready.popleft()
                self._changed.notify_all()
                return item
            error, self._error = self._error, None
        if error is not None:
            raise error
        raise StopIteration

    def _start(self) -> None:
        # The caller's context: NumPy keeps its error settings there.
        context = contextvars.copy_context()
        self._thread = threading.Thread(
            target=context.run, args=(self._work,), name="kbtrain-prefetch", daemon=True
        )
        self._thread.start()

    def _work(self) -> None:
        """The thread: wait for space, make an item, hand it over."""
        error: BaseException | None = None
        try:
            while self._wait_for_space():
                item = next(self._items)
                with self._changed:
                    self._ready.append(item)
                    self._changed.notify_all()
                del item  # or it would stay alive while this thread waits
        except StopIteration:
            pass
        except BaseException as raised:  # also an interrupt: it is the reader who is to see it
            error = raised
        finally:
            with self._changed:
                self._ended, self._error = True, error
                self._changed.notify_all()

    def _wait_for_space(self) -> bool:
        with self._changed:
            while len(self._ready) >= self._ahead and not self._closed:
                self._changed.wait()
            return not self._closed

    def close(self) -> None:
        """Stop reading: end the thread, and let go of what it had made."""
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(GRACE)
            if self._thread.is_alive():
                logger.warning(
                    "The data is still busy with an item %.0f s after the reading was stopped; its "
                    "thread is left behind and ends with that item.",
                    GRACE,
                )
                return
        close = getattr(self._items, "close", None)
        if callable(close):
            with contextlib.suppress(ValueError):  # a generator that is running: we are inside it
                close()
