"""A run in a notebook: a table and a curve that are part of the saved notebook and its export."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from kbtrain.display import format as text
from kbtrain.display.view import Evaluation, Progress, View
from kbtrain.report.curves import COLOURS, Chart, Curve, draw_picture
from kbtrain.report.ending import RunEnding
from kbtrain.report.facts import RunFacts
from kbtrain.report.record import spread
from kbtrain.utils.best_effort import print_line
from kbtrain.utils.html import Html, element, escaped, number
from kbtrain.utils.readable import clock

MAX_ROWS = 100
"""Rows of the table that are kept, spread evenly, with the best and the newest among them."""

PAUSE = 0.5
"""Seconds between two updates of the output at least; each costs the browser a new layout."""

SHARE = 30
"""Drawing may take a 30th of the time."""

_TABLE = "border-collapse:collapse;font-variant-numeric:tabular-nums"
_CELL = "text-align:right;padding:2px 10px;border-bottom:1px solid rgba(128,128,128,.3)"
_BEST = f"{_CELL};font-weight:bold"
_SOFT = "opacity:.75;margin:4px 0"


class Output:
    """What a cell shows: HTML, and plain text where there is none. It is updated in place.

    Jupyter keeps the newest content in the notebook, so no widget and no server is needed to see it
    later.
    """

    def __init__(self, content: Shown) -> None:
        # Present wherever a notebook runs.
        from IPython.display import display

        self._handle = display(content, display_id=True)

    def update(self, content: Shown) -> None:
        """Show other content in its place."""
        if self._handle is not None:  # None in a shell without a front end
            self._handle.update(content)


class Shown:
    """Content of an output.

    Args:
        html: As HTML.
        plain: As text.
    """

    def __init__(self, html: str, plain: str) -> None:
        self._html, self._plain = html, plain

    def _repr_html_(self) -> str:
        return self._html

    def __repr__(self) -> str:
        return self._plain


class NotebookView(View):
    """Shows a run in the output of a cell: facts, progress, a table of evaluations, the curves."""

    def __init__(self) -> None:
        self._status: Output | None = None
        self._results: Output | None = None
        self._facts: RunFacts | None = None
        self._reset()

    def _reset(self) -> None:
        self._rows: list[dict[str, Any]] = []
        self._losses: list[tuple[float, float]] = []
        self._evaluated: dict[str, list[tuple[float, float]]] = {}
        self._best: int | None = None
        self._doing = ""
        self._progress: Progress | None = None
        self._trial = False
        self._start: tuple[float, int] | None = None
        self._next = 0.0

    # --- the moments of a run ---------------------------------------------------------------------

    def phase(self, text: str) -> None:
        """Say what is being done, if the run is shown already."""
        self._doing = text
        if self._facts is not None:
            self._show(now=True)

    def begin(self, trainer: Any, facts: RunFacts, trial: bool = False) -> None:
        """Begin an output of its own."""
        if not (trial and self._trial):  # the trials of a search share one
            self._status = self._results = None
        self._reset()
        self._facts, self._trial = facts, trial
        self._doing = "compiling"
        self._show(now=True)

    def first_update(self, progress: Progress, seconds: float) -> None:
        """From here on the speed is that of the training."""
        self._doing = ""
        self._start = (time.monotonic(), progress.step)

    def progress(self, progress: Progress) -> None:
        """Advance the bar."""
        self._progress, self._doing = progress, ""
        self._show()

    def batches(self, done: int, total: int | None) -> None:
        """Say how far the evaluation is."""
        self._doing = f"evaluating, batch {done}{f' of {total}' if total else ''}"
        if self._facts is not None:
            self._show()

    def training_log(self, logs: dict[str, Any], step: int, updates: int) -> None:
        """Add the loss to the curve, and a row where nothing is evaluated."""
        if isinstance(logs.get("loss"), float):
            self._losses.append((float(step), logs["loss"]))
            del self._losses[: len(self._losses) - 20_000]
        values = {n: v for n, v in logs.items() if isinstance(v, int | float)}
        self._rows.append({"step": step, "log": True, **values})
        self._tidy()
        self._show(tables=True)

    def evaluation(self, result: Evaluation, in_training: bool) -> None:
        """Add a row; results outside of ``fit`` are shown by the call that returns them."""
        if not in_training or not result.metrics:
            return
        loss = {"loss": result.training["loss"]} if "loss" in result.training else {}
        if not loss and self._losses:
            loss = {"loss": self._losses[-1][1]}
        self._rows.append({"step": result.step, "epoch": result.epoch, **loss, **result.metrics})
        if result.best:
            self._best = result.step
        for name, value in result.metrics.items():
            if name.endswith("_loss") and isinstance(value, int | float):
                points = self._evaluated.setdefault(name, [])
                points.append((float(result.step), float(value)))
        self._tidy()
        self._show(now=True, tables=True)

    def notice(self, text: str) -> None:
        """Print it: the output belongs to another thread."""
        print_line(text)

    def end(self, ending: RunEnding) -> None:
        """Show how it ended, in place of the bar."""
        if self._facts is None:
            return
        rows = [
            element("div", element("b", name), " ", value)
            for name, value in text.ending_rows(ending)
        ]
        title = text.ending_title(ending)
        shown = element("div", self._head(), element("p", element("b", title)), *rows)
        plain = "\n".join(
            [title, *(name + value for name, value in text.aligned(text.ending_rows(ending)))]
        )
        self._put_status(Shown(shown, plain))
        if not self._trial:
            self._put_results()
        self._facts = None

    def close(self) -> None:
        """Nothing more comes for now."""
        if self._facts is not None and self._trial:
            self._put_status(Shown("", ""))  # what became of a trial is a row of the search
        self._facts = None

    # --- the output -------------------------------------------------------------------------------

    def _tidy(self) -> None:
        """Keep the table short; rows of logs only matter where there are no evaluations."""
        if any("log" not in row for row in self._rows):
            self._rows = [row for row in self._rows if "log" not in row]
        if len(self._rows) > 2 * MAX_ROWS:
            points = [[row["step"], i] for i, row in enumerate(self._rows)]
            kept = {i for _, i in spread(points, MAX_ROWS)}
            self._rows = [
                row for i, row in enumerate(self._rows) if i in kept or row["step"] == self._best
            ]

    def _show(self, now: bool = False, tables: bool = False) -> None:
        start = time.monotonic()
        if not now and start < self._next:
            return
        status = element("div", self._head(), self._bar())
        self._put_status(Shown(status, self._line()))
        if tables and not self._trial:
            self._put_results()
        took = time.monotonic() - start
        self._next = start + max(PAUSE, took * SHARE)

    def _put_status(self, content: Shown) -> None:
        if self._status is None:
            self._status = Output(content)
        else:
            self._status.update(content)

    def _put_results(self) -> None:
        if not self._rows:
            return
        content = Shown(element("div", self._table(), self._curve()), self._plain_table())
        if self._results is None:
            self._results = Output(content)
        else:
            self._results.update(content)

    def _head(self) -> Html:
        assert self._facts is not None
        rows = dict(text.facts_rows(self._facts))
        lines = [rows[name] for name in ("model", "training", "optimizer", "computing")]
        title = element("b", self._facts.run_name)
        return element("p", title, " · ", " · ".join(lines), style=_SOFT)

    def _line(self) -> str:
        """Where the run is, as text."""
        progress, facts = self._progress, self._facts
        if progress is None or facts is None:
            return f"{self._doing}..."
        parts = [f"update {text.place(progress.step, progress.updates)}"]
        if progress.epochs:
            parts.append(f"epoch {text.epochs(progress.epoch)} of {progress.epochs}")
        parts += [f"{name} {number(value)}" for name, value in progress.newest.items()]
        if self._start is not None and progress.step > self._start[1]:
            seconds = time.monotonic() - self._start[0]
            speed = (progress.step - self._start[1]) / max(seconds, 1e-9)
            parts.append(f"{text.count(speed * facts.batch_size)} samples/s")
            if progress.updates:
                left = (progress.updates - progress.step) / speed
                parts.append(f"{clock(left)} left")
        if self._doing:
            parts.append(f"{self._doing}...")
        return ", ".join(parts)

    def _bar(self) -> Html:
        progress = self._progress
        done = progress.step if progress is not None else 0
        planned = progress.updates if progress is not None else 0
        bar = element("progress", value=done, max=planned, style="width:16em") if planned else ""
        return element("p", bar, " ", self._line())

    def _columns(self) -> list[str]:
        hidden = ("log", "grad_norm") if self._evaluated else ("log",)
        names = dict.fromkeys(name for row in self._rows for name in row)
        return [name for name in names if name not in hidden]

    def _table(self) -> Html:
        names = self._columns()
        head = "".join(element("th", name, style=_CELL) for name in names)
        lines = [element("tr", Html(head))]
        for row in self._rows:
            best = row["step"] == self._best
            cells = "".join(
                element("td", _cell(row, name), style=_BEST if best else _CELL) for name in names
            )
            mark = element("td", "best", style="padding:2px 10px") if best else ""
            lines.append(element("tr", Html(cells), mark))
        return element("table", element("tbody", *lines), style=_TABLE)

    def _plain_table(self) -> str:
        names = self._columns()
        cells = [names, *([_cell(row, name) for name in names] for row in self._rows)]
        widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
        lines = [
            "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
            for line in cells
        ]
        for i, row in enumerate(self._rows):
            if row["step"] == self._best:
                lines[i + 1] += "  best"
        return "\n".join(lines)

    def _curve(self) -> Html:
        curves = [Curve("training", self._losses, 0)] if self._losses else []
        for i, (name, points) in enumerate(self._evaluated.items()):
            label = "evaluation" if name == "eval_loss" else name.removesuffix("_loss")
            curves.append(Curve(label, points, i + 1))
        if max((len(curve.points) for curve in curves), default=0) < 2:
            return Html("")
        marks = [(float(self._best), "best", "best")] if self._best is not None else []
        picture = draw_picture(Chart("Loss", curves, marks, log=True))
        if picture is None:
            return Html("")
        keys = [
            element("span", "■ ", style=f"color:{COLOURS[curve.style % 8]}") + escaped(curve.label)
            for curve in curves
        ]
        legend = element("p", "Loss: ", Html(" &nbsp; ".join(keys)), style=_SOFT)
        return element("div", legend, picture, style="max-width:640px")


def _cell(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if value is None:
        return ""
    return f"{value:.2f}".rstrip("0").rstrip(".") if name == "epoch" else number(value)
