"""Reasons to stop before the end, signals and a limit of time: noted here, acted on elsewhere."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from kbtrain.errors import TrainingInterrupted

logger = logging.getLogger("kbtrain")

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name)
)
"""What asks a run to save and stop. (Windows has no SIGUSR1.)"""

MAX_TIME = "max_time"


class EvaluationAbandoned(BaseException):
    """Leaves an evaluation whose end the run cannot wait for; never leaves ``fit``.

    No ``Exception``: what stands around an evaluation of the user's own must not swallow it.
    """


class StopSignals:
    """Notes the first signal, and when ``max_time`` is near; the loop looks between two steps.

    As a context manager it puts its handlers in place and the former ones back. A signal that the
    program handles itself, or ignores, is left to it. Handlers can be set in the main thread only:
    elsewhere a warning says that there are none.

    Args:
        signals: Whether to handle signals.
        max_time: Seconds from ``__enter__`` on; None for no limit.
    """

    def __init__(self, signals: bool, max_time: float | None) -> None:
        self.received: signal.Signals | None = None
        self._signals = signals
        self._max_time = max_time
        self._start = time.monotonic()
        self._last_look = self._start
        self._longest_step = 0.0
        self._former: dict[signal.Signals, Any] = {}
        self._interrupts = 0
        self._may_abandon = False
        self._over = False

    def __enter__(self) -> Self:
        self._start = self._last_look = time.monotonic()
        if not self._signals:
            return self
        if threading.current_thread() is not threading.main_thread():
            logger.warning(
                "fit() does not run in the main thread, where Python handles signals: SIGTERM, "
                "SIGUSR1 and SIGINT will not save a checkpoint. (enable_jit_checkpoint=False "
                "leaves this warning out.)"
            )
            return self
        for number in SIGNALS:
            former = signal.getsignal(number)
            if former in (signal.SIG_DFL, signal.default_int_handler):
                self._former[number] = former
                signal.signal(number, self._note)
            else:
                logger.info("%s is handled by the program: left to it.", number.name)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        frames: TracebackType | None,
    ) -> None:
        for number, former in self._former.items():
            signal.signal(number, former)
        self._former.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        # Counted by itself: on one Ctrl-C some launchers send a SIGTERM of their own besides, in
        # any order, and that is no reason to lose what was not saved.
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            raise KeyboardInterrupt
        self.received = self.received or signal.Signals(number)

    def reason(self, saving: float | None) -> str | None:
        """Name what asks the run to stop now, None if nothing does. Call it between two steps.

        Args:
            saving: Seconds the slowest checkpoint took to write; None if none was written yet.
        """
        if self.received is not None:
            return self.received.name
        if self._max_time is None:
            return None
        now = time.monotonic()
        self._longest_step = max(self._longest_step, now - self._last_look)
        self._last_look = now
        # Room for what comes next at the longest it has taken: one more block, two checkpoints
        # (one may still be in flight). Before the first checkpoint a tenth of the time, or 30 s.
        spare = min(0.1 * self._max_time, 30.0) if saving is None else 2 * saving
        left = self._start + self._max_time - now
        self._over |= left <= self._longest_step + spare
        return MAX_TIME if self._over else None

    @contextlib.contextmanager
    def abandoning(self) -> Iterator[None]:
        """Inside, ``between_batches`` raises as soon as something asks the run to stop."""
        self._may_abandon = True
        try:
            yield
        finally:
            self._may_abandon = False

    def between_batches(self, saving: float | None) -> None:
        """Leave an evaluation that the loop asked for, if the run is to stop now.

        Args:
            saving: As for ``reason``.

        Raises:
            EvaluationAbandoned: Inside ``abandoning``, if there is a reason to stop.
        """
        if self._may_abandon and self.reason(saving) is not None:
            raise EvaluationAbandoned

    def raise_received(self, step: int, checkpoint: Path | None) -> None:
        """Raise what ends the program after a signal: nothing else keeps a script from going on.

        Args:
            step: Where the run stands.
            checkpoint: Its newest checkpoint.

        Raises:
            TrainingInterrupted: After SIGTERM and SIGUSR1; exit code 143 and 138.
            KeyboardInterrupt: After SIGINT; exit code 130 (as a shell shows it).
        """
        if self.received is None:
            return
        if self.received == signal.SIGINT:
            raise KeyboardInterrupt(f"Stopped at step {step}; newest checkpoint: {checkpoint}.")
        raise TrainingInterrupted(self.received, step, checkpoint)
