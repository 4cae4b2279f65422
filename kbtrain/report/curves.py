"""Line charts as SVG, drawn here: no library and no network is needed to read a report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kbtrain.utils.html import Html, element, escaped, number
from kbtrain.utils.timing import SPEED_SUFFIXES

COLOURS = (
    *("#3b6fb6", "#c8553d", "#2f8f6b", "#8a5fb5"),
    *("#b58a1f", "#4a8fa8", "#b54a86", "#6b7280"),
)
"""Colours of the lines where there is no style sheet, as in a notebook; seen on light and dark."""

MAX_POINTS = 600
"""Points drawn of a curve; more would lie in the same pixel."""

WIDTH, HEIGHT = 640, 260
LEFT, RIGHT, TOP, BOTTOM = 70, 14, 12, 34

# Attributes for where there is no style sheet; the one of a report goes before them.
TEXT = 'fill="currentColor" font-size="12"'
GRID = 'stroke="currentColor" stroke-opacity=".15"'
AXIS = 'stroke="currentColor" stroke-opacity=".5"'
MARK = 'stroke="currentColor" stroke-dasharray="4 3"'

Point = tuple[float, float]


@dataclass(frozen=True)
class Curve:
    """One line of a chart.

    Attributes:
        label: Its name in the legend.
        points: (step, value), by step; a value that is NaN or infinite leaves a gap.
        style: Number of its colour, which the style sheet has.
        dashed: Whether the line is dashed.
    """

    label: str
    points: Sequence[Point]
    style: int = 0
    dashed: bool = False


@dataclass(frozen=True)
class Chart:
    """A line chart over the updates.

    Attributes:
        title: Its title.
        curves: The lines.
        marks: Vertical lines with a label: (step, label, class of the style sheet).
        unit: Unit of the values, beside the title.
        log: Whether the axis is logarithmic if the values span more than one decade.
    """

    title: str
    curves: Sequence[Curve]
    marks: Sequence[tuple[float, str, str]] = field(default=())
    unit: str = ""
    log: bool = False


def draw(chart: Chart) -> Html:
    """The chart as an SVG of the page's width, with title and description for screen readers."""
    curves = [c for c in chart.curves if c.points]
    heading = element("h3", chart.title, element("small", f" {chart.unit}") if chart.unit else "")
    picture = draw_picture(chart)
    if picture is None:
        text = "Nothing was logged." if not curves else "All values are NaN or infinite."
        return element("figure", heading, element("p", text, class_="note"), class_="chart")
    return element("figure", heading, picture, _legend(chart, curves), class_="chart")


def draw_picture(chart: Chart) -> Html | None:
    """The SVG of a chart alone; None if it has no finite point."""
    curves = [c for c in chart.curves if c.points]
    finite = [p for c in curves for p in c.points if math.isfinite(p[1])]
    if not finite:
        return None
    axes = _Axes.around(finite, chart.log)
    shapes = [*_grid(axes), *_marks(axes, chart.marks)]
    for curve in curves:
        shapes += _line(axes, curve)
    return element(
        "svg",
        element("title", chart.title),
        element("desc", describe(chart)),
        *map(Html, shapes),
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_label=chart.title,
    )


def describe(chart: Chart) -> str:
    """The chart in a sentence for each curve: first, last, lowest and highest value."""
    sentences = []
    for curve in chart.curves:
        found = [p for p in curve.points if math.isfinite(p[1])]
        if not found:
            continue
        (first, a), (last, b) = found[0], found[-1]
        values = [value for _, value in found]
        sentences.append(
            f"{curve.label}: {number(a)} at step {number(first)}, {number(b)} at step "
            f"{number(last)}, between {number(min(values))} and {number(max(values))}."
        )
    sentences += [f"{label}: step {number(step)}." for step, label, _ in chart.marks]
    return " ".join(sentences)


def thinned(points: Sequence[Point], most: int = MAX_POINTS) -> list[Point]:
    """At most about ``most`` points with the same look: of each piece the lowest and the highest.

    First and last point stay, and NaNs, so that gaps are not closed.
    """
    if len(points) <= most:
        return list(points)
    pieces = max(most // 2 - 1, 1)
    kept = {0, len(points) - 1}
    for piece in range(pieces):
        start, end = piece * len(points) // pieces, (piece + 1) * len(points) // pieces
        inside = [i for i in range(start, end) if math.isfinite(points[i][1])]
        if len(inside) < end - start:
            kept.add(next(i for i in range(start, end) if not math.isfinite(points[i][1])))
        if inside:
            kept.add(min(inside, key=lambda i: points[i][1]))
            kept.add(max(inside, key=lambda i: points[i][1]))
    return [points[i] for i in sorted(kept)]


def wants_log_scale(values: Iterable[float]) -> bool:
    """Whether positive values span so much that a linear axis would hide the small ones."""
    found = [value for value in values if math.isfinite(value)]
    return bool(found) and min(found) > 0 and max(found) / min(found) >= 20


# --- axes -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Axes:
    """From steps and values to places in the picture."""

    steps: tuple[float, float]
    values: tuple[float, float]
    log: bool

    @classmethod
    def around(cls, points: Sequence[Point], log: bool) -> _Axes:
        steps, values = [p[0] for p in points], [p[1] for p in points]
        log = log and wants_log_scale(values)
        shown = [math.log10(v) for v in values] if log else values
        low, high = min(shown), max(shown)
        margin = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
        first, last = min(steps), max(steps)
        if first == last:
            first, last = first - 1, last + 1
        return cls((first, last), (low - margin, high + margin), log)

    def x(self, step: float) -> float:
        low, high = self.steps
        return LEFT + (step - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self.values
        place = math.log10(value) if self.log else value
        return HEIGHT - BOTTOM - (place - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def value_ticks(self) -> list[float]:
        if not self.log:
            return ticks(*self.values)
        low, high = self.values
        found = [10.0**e for e in range(math.ceil(low), math.floor(high) + 1)]
        every = max(1, math.ceil(len(found) / 6))
        found = found[::every]
        if len(found) > 1:
            return found
        steps = [
            m * 10.0**e for e in range(math.floor(low), math.ceil(high) + 1) for m in (1, 2, 5)
        ]
        return [v for v in steps if low <= math.log10(v) <= high]


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers between two values.

    Example:
        >>> ticks(0.0, 1.0)
        [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    rough = (high - low) / most
    if not (math.isfinite(rough) and rough > 0):
        return [low]
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


# --- shapes ---------------------------------------------------------------------------------------


def _grid(axes: _Axes) -> list[str]:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    shapes = []
    for value in axes.value_ticks():
        y = axes.y(value)
        place = f'x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"'
        shapes.append(f'<line class="grid" {GRID} {place}/>')
        place = f'text-anchor="end" x="{LEFT - 8}" y="{y + 4:.1f}"'
        shapes.append(f'<text {TEXT} {place} class="y">{_tick(value)}</text>')
    for step in ticks(*axes.steps, most=6):
        if step != int(step) or not axes.steps[0] <= step <= axes.steps[1]:
            continue
        x = axes.x(step)
        end = " end" if x > right - 20 else ""
        place = f'text-anchor="{"end" if end else "middle"}" x="{x:.1f}" y="{bottom + 18}"'
        shapes.append(f'<text {TEXT} {place} class="x{end}">{_tick(step)}</text>')
    place = f'x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"'
    shapes.append(f'<line class="axis" {AXIS} {place}/>')
    return shapes


def _tick(value: float) -> str:
    if abs(value) >= 1e5:
        return f"{value / 1000:,.10g}k" if abs(value) < 1e6 else f"{value / 1e6:,.10g}M"
    if value and abs(value) < 1e-3:
        return f"{value:.0e}".replace("e-0", "e-")
    return f"{value:,.10g}"


def _marks(axes: _Axes, marks: Sequence[tuple[float, str, str]]) -> list[str]:
    shapes = []
    for step, label, kind in marks:
        if not axes.steps[0] <= step <= axes.steps[1]:
            continue
        x = axes.x(step)
        title = element("title", f"{label}: step {number(step)}")
        shapes.append(
            f'<line class="mark {escaped(kind)}" {MARK} x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" '
            f'y2="{HEIGHT - BOTTOM}">{title}</line>'
        )
    return shapes


def _line(axes: _Axes, curve: Curve) -> list[str]:
    """The parts of a curve between gaps; a part of one point is a dot."""
    parts: list[list[Point]] = [[]]
    for point in thinned(curve.points):
        if math.isfinite(point[1]):
            parts[-1].append(point)
        elif parts[-1]:
            parts.append([])
    kind = f"c{curve.style % 8}{' dashed' if curve.dashed else ''}"
    colour = COLOURS[curve.style % 8]
    few = sum(map(len, parts)) <= 40
    shapes = []
    for part in (p for p in parts if p):
        places = [(f"{axes.x(step):.1f}", f"{axes.y(value):.1f}") for step, value in part]
        if len(part) > 1:
            line = " ".join(f"{x},{y}" for x, y in places)
            shapes.append(
                f'<polyline class="line {kind}" fill="none" stroke="{colour}" points="{line}"/>'
            )
        if few or len(part) == 1:
            for (x, y), (step, value) in zip(places, part, strict=True):
                tip = element("title", f"{curve.label}, step {number(step)}: {number(value)}")
                place = f'fill="{colour}" cx="{x}" cy="{y}" r="2.6"'
                shapes.append(f'<circle class="dot {kind}" {place}>{tip}</circle>')
    return shapes


def _legend(chart: Chart, curves: Sequence[Curve]) -> Html:
    """Names of the lines and marks below the picture, as HTML, so that they wrap."""
    entries = []
    if len(curves) > 1 or chart.marks or curves[0].label != chart.title:
        for curve in curves:
            kind = f"key c{curve.style % 8}{' dashed' if curve.dashed else ''}"
            entries.append(element("li", element("i", class_=kind), curve.label))
        kinds: dict[str, list[tuple[float, str]]] = {}
        for step, label, kind in chart.marks:
            kinds.setdefault(kind, []).append((step, label))
        for kind, found in kinds.items():
            where = ", ".join(number(step) for step, _ in found[:6])
            more = ", ..." if len(found) > 6 else ""
            text = f"{found[0][1]} (step {where}{more})"
            entries.append(element("li", element("i", class_=f"key mark {kind}"), text))
    gaps = sum(1 for c in curves for p in c.points if not math.isfinite(p[1]))
    if gaps:
        entries.append(element("li", f"{number(gaps)} not finite, left out", class_="note"))
    return element("figcaption", element("ul", *entries)) if entries else Html("")


# --- from logs ------------------------------------------------------------------------------------

SPEED = (*SPEED_SUFFIXES, "_compilation_time")
"""The same in logs, with what Transformers logs besides."""

_OWN = ("step", "epoch", "loss", "learning_rate", "grad_norm", "total_flos", "train_loss")


def series(logs: Iterable[Mapping[str, Any]], name: str) -> list[Point]:
    """(step, value) of the logs that have a name, the last one of a step."""
    found: dict[float, float] = {}
    for log in logs:
        value = log.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            found[float(log.get("step", 0))] = float(value)
    return sorted(found.items())


def metric_names(logs: Iterable[Mapping[str, Any]]) -> list[str]:
    """The metrics in logs, without loss and speed: ``accuracy`` also for ``eval_accuracy``."""
    found: dict[str, None] = {}
    for log in logs:
        for name, value in log.items():
            base = name.removeprefix("eval_")
            usual = base in _OWN or name.endswith(SPEED) or "_mem_" in base or "tokens_seen" in base
            if not usual and isinstance(value, int | float) and not isinstance(value, bool):
                found.setdefault(base)
    # The loss of a named evaluation set belongs to the chart of the loss.
    return [name for name in found if not name.endswith("_loss")]


def loss_names(logs: Iterable[Mapping[str, Any]]) -> list[str]:
    """``loss``, ``eval_loss``, and ``eval_{name}_loss`` of named evaluation sets."""
    names = {n for log in logs for n in log if n.startswith("eval_") and n.endswith("_loss")}
    return ["loss", "eval_loss", *sorted(names - {"eval_loss"})]


def charts_of(
    runs: Sequence[tuple[str, Sequence[Mapping[str, Any]]]],
    marks: Sequence[tuple[float, str, str]] = (),
) -> list[Chart]:
    """The charts of one run, or of several in the same pictures.

    Args:
        runs: Name and logs of each run.
        marks: Vertical lines, see ``Chart``; for one run.
    """
    logs = [log for _, entries in runs for log in entries]
    several = len(runs) > 1

    def curves(names: Mapping[str, str]) -> list[Curve]:
        found = []
        for i, (run, entries) in enumerate(runs):
            for j, (name, label) in enumerate(names.items()):
                points = series(entries, name)
                if several:
                    label = f"{run}: {label}" if len(names) > 1 else run
                if points:
                    style = i if several else j
                    found.append(Curve(label, points, style, dashed=several and j > 0))
        return found

    labels = {"loss": "training", "eval_loss": "evaluation"}
    losses = {
        n: labels.get(n, n.removeprefix("eval_").removesuffix("_loss")) for n in loss_names(logs)
    }
    charts = [Chart("Loss", curves(losses), marks, log=True)]
    for name in metric_names(logs):
        charts.append(Chart(name, curves({name: "training", f"eval_{name}": "evaluation"}), marks))
    others = {
        "learning_rate": "Learning rate",
        "grad_norm": "Gradient norm",
        "train_samples_per_second": "Throughput",
    }
    for name, title in others.items():
        found = curves({name: title})
        if found:
            unit = "samples per second" if title == "Throughput" else ""
            charts.append(Chart(title, found, marks, unit, log=name == "grad_norm"))
    return charts
