"""Functions that pause after each round, so that contenders can alternate in one process."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Turns:
    """Runs a function in a thread, from one ``pause`` to the next.

    Args:
        run: Calls ``pause`` after every round; ``pause`` returns False when it must end.
    """

    def __init__(self, run: Callable[[Callable[[], bool]], None]) -> None:
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._more = True
        self._error: BaseException | None = None

        def target() -> None:
            self._go.acquire()
            try:
                run(self._pause)
            except BaseException as error:  # raised in the next round
                self._error = error
            self._done.release()

        self._thread = threading.Thread(target=target, daemon=True)
        self._thread.start()

    def _pause(self) -> bool:
        self._done.release()
        self._go.acquire()
        return self._more

    def round(self) -> None:
        """Run until the next pause."""
        self._go.release()
        self._done.acquire()
        if self._error is not None:
            raise self._error

    def end(self) -> None:
        """Let the function return."""
        self._more = False
        self._go.release()
        self._thread.join(timeout=60)
