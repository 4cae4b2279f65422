"""Uploads in the background: one after the other, and what became of them."""

from __future__ import annotations

import collections
import concurrent.futures
import threading
from collections.abc import Callable
from typing import Any


class Uploads:
    """A queue of uploads, which a daemon thread works off in order.

    A process that must stop at once does not wait for the thread.
    """

    def __init__(self) -> None:
        self._queue: collections.deque[tuple[concurrent.futures.Future[Any], Callable[[], Any]]]
        self._queue = collections.deque()
        self._pending: set[concurrent.futures.Future[Any]] = set()
        self._guard = threading.Lock()
        self._works = False

    @property
    def busy(self) -> bool:
        """Whether one is running or waiting."""
        with self._guard:
            return bool(self._pending)

    def submit(self, upload: Callable[[], Any]) -> concurrent.futures.Future[Any]:
        """Run a function after those submitted before.

        Returns:
            Its result or error, once there is one.
        """
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        with self._guard:
            self._queue.append((future, upload))
            self._pending.add(future)
            if not self._works:
                self._works = True
                threading.Thread(target=self._work, name="kbtrain-hub", daemon=True).start()
        return future

    def wait(self, seconds: float) -> bool:
        """Wait until all are done, or until the time is over; return whether all are."""
        with self._guard:
            pending = list(self._pending)
        return not concurrent.futures.wait(pending, seconds).not_done

    def _work(self) -> None:
        while True:
            with self._guard:
                if not self._queue:
                    self._works = False
                    return
                future, upload = self._queue.popleft()
            try:
                result, error = upload(), None
            except BaseException as problem:
                result, error = None, problem
            with self._guard:
                self._pending.discard(future)
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)
