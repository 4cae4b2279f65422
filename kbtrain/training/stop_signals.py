"""Requests to stop early, from signals and ``max_time``. The loop polls them and acts."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from kbtrain.errors import TrainingInterrupted
from kbtrain.utils.machine.quiet_interrupt import quiet
from kbtrain.utils.machine.signal_watch import SignalWatch

logger = logging.getLogger("kbtrain")

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name)
)
"""Signals that ask a run to save and stop. (Windows has no SIGUSR1.)"""

MAX_TIME = "max_time"


class EvaluationAbandoned(BaseException):
    """Aborts an evaluation when the run must stop; always caught inside ``fit``.

    A ``BaseException``, so that ``except Exception`` in user code cannot swallow it.
    """


class StopSignals:
    """Records the first signal and watches ``max_time``; the loop polls between two steps.

    As a context manager it installs signal handlers and restores the previous ones. Signals that
    the program handles or ignores are left alone. Handlers can only be set in the main thread;
    elsewhere a warning is logged and none are set.

    Args:
        signals: Whether to handle signals.
        max_time: Seconds from ``__enter__``; None for no limit.
        notify: Called at once with what a signal does, in another thread.
        saves: Whether the run saves a checkpoint when it stops.
    """

    def __init__(
        self,
        signals: bool,
        max_time: float | None,
        notify: Callable[[str], None] | None = None,
        saves: bool = True,
    ) -> None:
        self._notify, self._saves = notify, saves
        self._watch: SignalWatch | None = None
        self._seen = 0
        self.received: signal.Signals | None = None
        self._signals = signals
        self._max_time = max_time
        self._start = time.monotonic()
        self._last_poll = self._start
        self._longest_step = 0.0
        self._former: dict[signal.Signals, Any] = {}
        self._interrupts = 0
        self._may_abandon = False
        self._over = False
        self._announced = False

    def __enter__(self) -> Self:
        self._start = self._last_poll = time.monotonic()
        if not self._signals:
            return self
        if threading.current_thread() is not threading.main_thread():
            logger.warning(
                "fit() does not run in the main thread, so it cannot handle signals: SIGTERM, "
                "SIGUSR1 and SIGINT will not save a checkpoint. (enable_jit_checkpoint=False "
                "silences this warning.)"
            )
            return self
        for number in SIGNALS:
            former = signal.getsignal(number)
            if former in (signal.SIG_DFL, signal.default_int_handler):
                self._former[number] = former
                signal.signal(number, self._note)
            else:
                logger.info("%s is handled by the program: its handler is kept.", number.name)
        if self._notify is not None and self._former:
            watch = SignalWatch(self._say)
            self._watch = watch if watch.start() else None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        frames: TracebackType | None,
    ) -> None:
        if self._watch is not None:
            self._watch.stop()
            self._watch = None
        for number, former in self._former.items():
            signal.signal(number, former)
        self._former.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        # SIGINT is counted separately: on one Ctrl-C some launchers also send SIGTERM, in any
        # order, and that must not lose unsaved work.
        self._interrupts += number == signal.SIGINT
        if self._watch is None and self._notify is not None:
            # In a thread: this one may be in the middle of writing to the same stream.
            threading.Thread(target=self._say, args=(number,), daemon=True).start()
        if self._interrupts > 1:
            raise quiet(KeyboardInterrupt())
        self.received = self.received or signal.Signals(number)

    def _say(self, number: int) -> None:
        """Say what a signal does."""
        if self._notify is None or number not in self._former:
            return
        interrupt = number == signal.SIGINT
        self._seen += interrupt
        name = "Ctrl-C" if interrupt else signal.Signals(number).name
        if self._seen > 1 and interrupt:
            self._notify(f"{name}: stopping now, nothing more is saved.")
            return
        if self.announce() and not interrupt:
            return  # the loop, or an earlier signal, has said so
        does = "saving" if self._saves else "without saving"
        again = "stop now, nothing saved" if self._saves else "stop now"
        text = f"{name}: stopping after this update, {does}."
        self._notify(f"{text} Again = {again}." if interrupt else text)

    def announce(self) -> bool:
        """Note that the user is told that the run will stop.

        Returns:
            Whether that was already said.
        """
        before, self._announced = self._announced, True
        return before

    def reason(self, saving: float | None) -> str | None:
        """The reason to stop now, or None. Called between two steps.

        Args:
            saving: Seconds that the slowest checkpoint took to write; None if there is none yet.
        """
        if self.received is not None:
            return self.received.name
        if self._max_time is None:
            return None
        now = time.monotonic()
        self._longest_step = max(self._longest_step, now - self._last_poll)
        self._last_poll = now
        # Time to reserve, assuming the longest durations so far: one more block and two
        # checkpoints (one may be in flight). Before the first one a tenth of the limit, or 30 s.
        spare = min(0.1 * self._max_time, 30.0) if saving is None else 2 * saving
        left = self._start + self._max_time - now
        self._over |= left <= self._longest_step + spare
        return MAX_TIME if self._over else None

    @contextlib.contextmanager
    def abandoning(self) -> Iterator[None]:
        """Context in which ``between_batches`` raises as soon as there is a reason to stop."""
        self._may_abandon = True
        try:
            yield
        finally:
            self._may_abandon = False

    def between_batches(self, reason: Callable[[], str | None]) -> None:
        """Abort an evaluation started by the loop, if the run must stop now.

        Args:
            reason: Gives the reason to stop, on which all processes agree; None if there is none.

        Raises:
            EvaluationAbandoned: Inside ``abandoning``, if there is a reason to stop.
        """
        if self._may_abandon and reason() is not None:
            raise EvaluationAbandoned

    def raise_received(self, step: int, checkpoint: Path | None, reason: str | None) -> None:
        """Raise an exception that ends the program after a signal, so that the script stops too.

        Args:
            step: The current step.
            checkpoint: The newest checkpoint.
            reason: Why the run stopped: the name of a signal, which another process may have got.

        Raises:
            TrainingInterrupted: After SIGTERM and SIGUSR1; exit codes 143 and 138.
            KeyboardInterrupt: After SIGINT; exit code 130 (as a shell reports it).
        """
        received = self.received
        if received is None and reason is not None and reason.startswith("SIG"):
            received = signal.Signals[reason]
        if received is None:
            return
        if received == signal.SIGINT:
            text = f"Stopped at step {step}; newest checkpoint: {checkpoint}."
            stopped = quiet(KeyboardInterrupt(text), "" if self._notify is not None else text)
            stopped.of_all_processes = True  # type: ignore[attr-defined]
            raise stopped
        raise TrainingInterrupted(received, step, checkpoint)
