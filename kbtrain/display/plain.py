"""A run as lines of text, for what is not a terminal: log files, pipes, batch systems."""

from __future__ import annotations

import threading
from typing import Any

from kbtrain.display import format as text
from kbtrain.display.view import Evaluation, Progress, View
from kbtrain.report.ending import RunEnding
from kbtrain.report.facts import RunFacts
from kbtrain.utils.best_effort import print_line
from kbtrain.utils.readable import duration

SILENCE = 2.0
"""Seconds after which a phase that still lasts is named."""


class PlainView(View):
    """Prints lines to stderr; there are no control characters in them."""

    def __init__(self) -> None:
        self._timer: threading.Timer | None = None

    def phase(self, text: str) -> None:
        """Name the phase if it takes long."""
        self._quiet()
        self._timer = threading.Timer(SILENCE, print_line, [f"{text}..."])
        self._timer.daemon = True
        self._timer.start()

    def _quiet(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def begin(self, trainer: Any, facts: RunFacts, trial: bool) -> None:
        """Print the facts, a line each."""
        self._quiet()
        if not trial:
            _table(f"Run {facts.run_name}", text.facts_rows(facts))
        self.phase("compiling")

    def first_update(self, progress: Progress, seconds: float) -> None:
        """Say how long compiling took, if it was announced."""
        self._quiet()
        if seconds >= SILENCE:
            print_line(f"compiled in {duration(seconds)}")

    def training_log(self, logs: dict[str, Any], step: int, updates: int) -> None:
        """Print the log."""
        print_line(text.log_line(logs, step, updates))

    def evaluation(self, result: Evaluation, in_training: bool) -> None:
        """Print the results."""
        self._quiet()
        if in_training and not result.metrics:
            return
        result.training = {}  # they have a line of their own
        line = text.evaluation_line(result) if in_training else text.lone_evaluation_line(result)
        print_line(line)

    def notice(self, text: str) -> None:
        """Print it."""
        print_line(text)

    def end(self, ending: RunEnding) -> None:
        """Print how it ended."""
        self._quiet()
        _table(text.ending_title(ending), text.ending_rows(ending))

    def close(self) -> None:
        """Forget the phase."""
        self._quiet()


def _table(title: str, rows: list[text.Row]) -> None:
    print_line("\n".join([title, *(name + value for name, value in text.aligned(rows))]))
