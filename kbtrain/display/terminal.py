"""A run on a terminal: panels at its start and end, a line per evaluation, and a bar below."""

from __future__ import annotations

import math
import time
from typing import Any, NamedTuple

from rich.text import Text

from kbtrain.display import format as text
from kbtrain.display.screen import Screen
from kbtrain.display.table import EvaluationTable
from kbtrain.display.view import Evaluation, Progress, View
from kbtrain.report.ending import RunEnding
from kbtrain.report.facts import RunFacts
from kbtrain.utils.readable import clock
from kbtrain.utils.timing import SPEED_SUFFIXES

SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"

LEAST_SHARE = 0.05
"""Share of a run without evaluations between two of its logs that leave a line."""


class Point(NamedTuple):
    """A moment of a run: the time, the seconds of evaluations before it, and the progress."""

    time: float
    pause: float
    progress: Progress


class TerminalView(View):
    """Draws on the terminal that stderr is. Only the 16 colours of the terminal, on any ground."""

    def __init__(self) -> None:
        self.screen = Screen(self.status)
        self._trainer: Any = None
        self._phase: tuple[str, float] | None = None
        self._facts: RunFacts | None = None
        self._first: Point | None = None
        self._newest: Point | None = None
        self._evaluated: tuple[int, int | None, float] | None = None  # done, total, since
        self._pause = 0.0  # seconds of evaluations since the first update
        self._notice, self._name = "", "training"
        self._logged: float = -1.0  # share of the run at the last log that left a line
        self._metrics: dict[str, Any] = {}
        self._table = EvaluationTable()

    # --- moments ----------------------------------------------------------------------------------

    def phase(self, text: str) -> None:
        """Show it below, with its time."""
        self._phase, self._notice = (text, time.monotonic()), ""
        self.screen.open()

    def begin(self, trainer: Any, facts: RunFacts, trial: bool) -> None:
        """Print the panel."""
        self._trainer, self._facts = trainer, facts
        self._first = self._newest = self._evaluated = None
        self._pause, self._logged = 0.0, -1.0
        self._metrics, self._table = {}, EvaluationTable()
        self._name = facts.run_name if trial else "training"
        if not trial:
            title = Text.assemble(("kbtrain ", "bold"), (facts.run_name, "bold cyan"))
            self._panel(title, text.facts_rows(facts))
        self._phase = ("compiling", time.monotonic())
        self.screen.open()

    def first_update(self, progress: Progress, seconds: float) -> None:
        """Begin to measure the speed."""
        self._phase, self._pause = None, 0.0
        self._first = Point(time.monotonic(), 0.0, progress)

    def progress(self, progress: Progress) -> None:
        """Keep it for the bar."""
        self._newest = Point(time.monotonic(), self._pause, progress)

    def training_log(self, logs: dict[str, Any], step: int, updates: int) -> None:
        """Show the values below; in a run without evaluations leave a line now and then."""
        self._metrics = {
            name: value
            for name, value in logs.items()
            if name not in ("loss", "grad_norm", "learning_rate", "epoch")
            and not name.endswith(SPEED_SUFFIXES)
        }
        if self._trainer is None or self._trainer.args.eval_strategy != "no":
            return
        share = step / updates if updates else math.log1p(step)
        if share - self._logged >= LEAST_SHARE:
            self._logged = share
            shown = [f"{n} {text.number(v)}" for n, v in logs.items() if n != "epoch"]
            where = f"step {text.place(step, updates)}, epoch {text.epochs(logs.get('epoch', 0))}"
            self.screen.print(Text.assemble((f"{where}: ", "dim"), ", ".join(shown)))

    def batches(self, done: int, total: int | None) -> None:
        """Show the bar of the evaluation."""
        since = time.monotonic() if self._evaluated is None else self._evaluated[2]
        self._evaluated = done, total, since
        self.screen.open()

    def evaluation(self, result: Evaluation, in_training: bool) -> None:
        """Leave a line."""
        self._end_evaluation()
        if not in_training:
            self._phase = None
            self.screen.print(Text(text.lone_evaluation_line(result)))
        elif result.metrics:
            row = self._table.row(result, self.screen.width())
            lines = [Text(), Text(row.header, style="dim")] if row.header else []
            line = Text(row.values)
            if row.notes:
                line.append(f"  {row.notes}", style="bold green" if result.best else "dim")
            self.screen.print(*lines, line)

    def _end_evaluation(self) -> None:
        if self._evaluated is not None:
            self._pause += time.monotonic() - self._evaluated[2]
            self._evaluated = None

    def notice(self, text: str) -> None:
        """Leave a line, and show it below from now on."""
        self._notice = text
        self.screen.print(Text(text, style="bold yellow"))

    def end(self, ending: RunEnding) -> None:
        """Print the panel."""
        self.screen.close()
        failed = ending.error is not None
        style = "green" if ending.completed else "red" if failed else "yellow"
        title = Text(text.ending_title(ending), style=f"bold {style}")
        self._panel(title, text.ending_rows(ending))
        self.screen.print(Text())

    def _panel(self, title: Text, rows: list[text.Row]) -> None:
        self.screen.print(Text(), title, *_table(rows, self.screen.width()))

    def close(self) -> None:
        """Remove the bar."""
        self._phase, self._evaluated, self._notice = None, None, ""
        self.screen.close()
        self._trainer = self._first = self._newest = None

    # --- the lines below --------------------------------------------------------------------------

    def status(self, width: int) -> list[Text]:
        """The lines at the bottom; called in the thread of the screen, so it reads no Trainer."""
        now, phase, evaluated = time.monotonic(), self._phase, self._evaluated
        first, newest = self._first, self._newest
        lines = []
        if first is not None and newest is not None:
            lines.append(self._training(first, newest, width, now))
            lines.append(self._values(first, newest, width))
        if evaluated is not None:
            done, total, _ = evaluated
            of = f"{done}/{total}" if total else f"{done}"
            lines.append(
                _bar("evaluating", done / total if total else None, f"{of} batches", width)
            )
        elif phase is not None:
            name, since = phase
            spinner = SPINNER[int(10 * now) % len(SPINNER)]
            lines.append(Text(f"{spinner} {name}... {clock(now - since)}", style="cyan"))
        return lines

    def _training(self, first: Point, newest: Point, width: int, now: float) -> Text:
        began, start = first.time, first.progress
        at = newest.progress
        parts = [f"{at.step:,}/{at.updates:,}" if at.updates else f"{at.step:,} updates"]
        parts.append(f"epoch {at.epoch:.1f}" + (f"/{at.epochs}" if at.epochs else ""))
        if at.updates and at.step > start.step:
            # At the speed since the first update, so without the time of compiling.
            left = (newest.time - began) * (at.updates - at.step) / (at.step - start.step)
            parts.append(f"{clock(max(0.0, left - (now - newest.time)))} left")
        share = at.step / at.updates if at.updates else None
        return _bar(self._name, share, " · ".join(parts), width)

    def _values(self, first: Point, newest: Point, width: int) -> Text:
        at, start = newest.progress, first.progress
        names = {"loss": "loss", "learning_rate": "lr", "grad_norm": "grad norm"}
        parts = [f"{short} {at.newest[n]:.4g}" for n, short in names.items() if n in at.newest]
        seconds = newest.time - first.time - newest.pause
        if seconds > 0.2 and at.samples > start.samples:
            if at.tokens is not None:
                parts.append(f"{text.count((at.tokens - (start.tokens or 0)) / seconds)} tokens/s")
            else:
                parts.append(f"{text.count((at.samples - start.samples) / seconds)} samples/s")
        parts += [f"{n} {text.number(v)}" for n, v in self._metrics.items()]
        line = parts[0] if parts else ""
        for part in parts[1:]:
            if len(line) + len(part) + 3 <= width:
                line += f" · {part}"
        return Text(line, style="dim")


def _bar(name: str, share: float | None, right: str, width: int) -> Text:
    """A bar with a name before it and numbers after it, as long as there is room."""
    room = min(40, width - len(name) - len(right) - 2)
    if share is None or room < 5:
        return Text(f"{name} {right}")
    filled = min(room, int(room * min(1.0, share)))
    return Text.assemble(
        f"{name} ", ("━" * filled, "green"), ("─" * (room - filled), "dim"), f" {right}"
    )


def _table(rows: list[text.Row], columns: int) -> list[Text]:
    """The rows, their texts wrapped beside the names; a command stays in one piece."""
    lines = []
    for name, value in text.aligned(rows, columns):
        lines.append(Text.assemble((name, "dim"), (value, "bold" if value[:2] == "$ " else "")))
    return lines
