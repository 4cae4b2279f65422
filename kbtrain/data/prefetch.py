"""Prefetching: a thread prepares the next items while the device is busy."""

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

Passing an item between threads costs 50 to 100 us, and a Python thread competes for the GIL with
the one that feeds the device. Faster items are produced in the calling thread.
"""

SLOW_ITEMS = 2
"""Consecutive slow items before a thread is started: the first one may be slow to open files."""

GRACE = 10.0
"""Seconds that ``close`` waits for an item in progress."""


class Prefetched(Iterator[T], Generic[T]):
    """The items of an iterator, prefetched by a thread once they turn out to be slow.

    Items and order are those of the iterator; only the time at which they are produced differs. An
    exception of the iterator is raised here in place of the failed item, with its traceback. Call
    ``close`` (or use ``contextlib.closing``) when reading ends early.

    Args:
        items: The iterator. Once a thread has been started, only the thread uses it.
        ahead: Items kept ready, at least 1; one more is in progress.
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
        # State shared by the two threads, protected by the condition's lock.
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
        """Produce an item in this thread and time it."""
        start = time.perf_counter()
        item = next(self._items)
        slow = time.perf_counter() - start > self._patience
        self._slow = self._slow + 1 if slow else 0
        if self._slow >= SLOW_ITEMS:
            self._start()
        return item

    def _take(self) -> T:
        """Wait for an item from the thread."""
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
        # In the caller's context, which has NumPy's error settings.
        context = contextvars.copy_context()
        self._thread = threading.Thread(
            target=context.run, args=(self._work,), name="kbtrain-prefetch", daemon=True
        )
        self._thread.start()

    def _work(self) -> None:
        """Run in the thread: wait for space, produce an item, pass it on."""
        error: BaseException | None = None
        try:
            while self._wait_for_space():
                item = next(self._items)
                with self._changed:
                    self._ready.append(item)
                    self._changed.notify_all()
                del item  # or it would be kept alive while this thread waits
        except StopIteration:
            pass
        except BaseException as raised:  # including interrupts, which the reader must see
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
        """Stop reading: end the thread and drop its items."""
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(GRACE)
            if self._thread.is_alive():
                logger.warning(
                    "The data is still producing an item %.0f s after reading was stopped; its "
                    "thread is left running and ends with that item.",
                    GRACE,
                )
                return
        close = getattr(self._items, "close", None)
        if callable(close):
            with contextlib.suppress(ValueError):  # called from inside the running generator
                close()
