"""Several runs side by side: their curves, their settings, and from which update they differ."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from kbtrain.report.curves import charts_of, draw, series
from kbtrain.report.page import NO_SETTINGS, PARTS, document, with_speed
from kbtrain.report.record import RunRecord
from kbtrain.report.sources import defaults
from kbtrain.report.summary import summarize, took
from kbtrain.utils.html import Html, element, escaped, joined, number, setting, table

RTOL = 1e-5
"""Relative difference of two losses up to which they count as equal but for rounding."""

_FACTS = {
    "backend": "backend",
    "device": "device",
    "processes": "processes",
    "model_class": "model",
    "parameters": "parameters",
    "trainable": "parameters that are trained",
    "precision": "precision",
    "optimizer": "optimizer",
    "examples": "training examples",
    "batch_size": "examples of an update",
    "updates": "updates planned",
}
"""Facts that are compared besides the settings, and what they are called."""


def render_comparison(records: Sequence[RunRecord]) -> str:
    """The report of several runs: curves in the same pictures, and what differs.

    Args:
        records: The runs; the others are compared with the first.

    Returns:
        An HTML document.
    """
    title = f"{len(records)} runs: " + ", ".join(record.name for record in records)
    charts = charts_of([(r.name, with_speed(r)) for r in records])
    body = [
        element("header", element("h1", title)),
        element("section", element("h2", "Where they differ"), _first_differences(records)),
        element("section", element("h2", "Results"), _results(records)),
        element("section", element("h2", "Settings that differ"), _settings(records)),
        element(
            "section",
            element("h2", "Curves"),
            element("div", *map(draw, charts), class_="charts"),
        ),
    ]
    return document(title, body, records)


def first_difference(
    first: RunRecord, second: RunRecord, rtol: float = RTOL
) -> tuple[int, str, float, float] | None:
    """Find the first log in which the losses of two runs differ by more than rounding.

    Losses are compared that both runs have logged at the same update. A NaN equals a NaN.

    Args:
        first: One run.
        second: The other.
        rtol: Relative difference that still counts as rounding.

    Returns:
        Update, name of the loss, and the two values; None if they are equal wherever both have
        logged.
    """
    found = []
    for name in ("loss", "eval_loss"):
        others = dict(series(second.logs, name))
        for step, value in series(first.logs, name):
            if step in others and not _equal(value, others[step], rtol):
                found.append((int(step), name, value, others[step]))
                break
    return min(found, key=lambda difference: difference[0], default=None)


def _equal(a: float, b: float, rtol: float) -> bool:
    if not (math.isfinite(a) and math.isfinite(b)):
        return a == b or (math.isnan(a) and math.isnan(b))
    return math.isclose(a, b, rel_tol=rtol, abs_tol=0.0)


def compared_updates(first: RunRecord, second: RunRecord) -> list[int]:
    """The updates at which both runs have logged a loss."""
    steps = [
        {step for name in ("loss", "eval_loss") for step, _ in series(run.logs, name)}
        for run in (first, second)
    ]
    return sorted(int(step) for step in steps[0] & steps[1])


def differing_settings(records: Sequence[RunRecord]) -> dict[str, list[str]]:
    """Settings and facts in which runs differ: name -> a value for each run.

    An argument that a run does not record has its default.
    """
    usual, found = defaults(), {}
    values = [_arguments(record) for record in records]
    for name in sorted({name for each in values for name in each}):
        shown = [setting(each.get(name, usual.get(name))) for each in values]
        if len(set(shown)) > 1 and name not in NO_SETTINGS:
            found[name] = shown
    for key, name in _FACTS.items():
        shown = [
            number(record.facts[key]) for record in records if record.facts.get(key) is not None
        ]
        if len(shown) == len(records) and len(set(shown)) > 1:
            found.setdefault(name, shown)
    versions = [record.facts.get("versions") or {} for record in records]
    for name in sorted({name for each in versions for name in each}):
        shown = [str(each.get(name, "–")) for each in versions]
        if len(set(shown)) > 1:
            found[f"version of {name}"] = shown
    return found


def _arguments(record: RunRecord) -> Mapping[str, Any]:
    return record.arguments or record.facts.get("changed") or {}


def _first_differences(records: Sequence[RunRecord]) -> Html:
    first, *others = records
    sentences = []
    for other in others:
        settings = list(differing_settings([first, other]))
        text = describe_difference(first, other, settings)
        sentences.append(element("p", element("strong", f"{other.name}"), f" {text}"))
    note = (
        f"Losses are compared with those of {first.name}, where both runs have logged one at the "
        f"same update; they count as equal up to a relative difference of {RTOL:g}."
    )
    return joined([*sentences, element("p", note, class_="note")])


def describe_difference(first: RunRecord, other: RunRecord, settings: Sequence[str]) -> str:
    """A sentence: from which update on, by how much, and in which settings."""
    differing = "in " + _listed(settings) if settings else "in no setting that is recorded"
    found, common = first_difference(first, other), compared_updates(first, other)
    if found is not None:
        step, name, a, b = found
        equal = [each for each in common if each < step]
        if equal:
            text = f"equals {first.name} up to update {number(equal[-1])} and differs at "
            text += f"update {number(step)}"
        else:
            text = f"differs from {first.name} at update {number(step)}, the first that both "
            text += "have logged"
        values = f"{name} {number(b, 7)} instead of {number(a, 7)}"
        return f"{text} ({values}). The runs differ {differing}."
    if not common:
        return (
            f"has logged no loss at an update at which {first.name} has logged one, so they cannot "
            f"be compared. The runs differ {differing}."
        )
    times = "update" if len(common) == 1 else f"{number(len(common))} updates"
    return f"equals {first.name} in the {times} that both have logged. The runs differ {differing}."


def _listed(names: Sequence[str], most: int = 8) -> str:
    more = len(names) - most
    shown = list(names[:most]) + ([f"{more} more"] if more > 0 else [])
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"


def _results(records: Sequence[RunRecord]) -> Html:
    summaries = [summarize(record) for record in records]
    rows: list[list[Any]] = [
        ["ended", *(s.headline for s in summaries)],
        [
            "best",
            *(
                "–"
                if s.best_value is None
                else f"{s.metric} {number(s.best_value)} at step {number(s.best_step)}"
                for s in summaries
            ),
        ],
        ["last training loss", *(_last(record, "loss") for record in records)],
        ["last eval_loss", *(_last(record, "eval_loss") for record in records)],
    ]
    endings = [record.ending or {} for record in records]
    rows.append(["duration", *(took(e) for e in endings)])
    rows.append(["samples per second", *(number(e.get("samples_per_second")) for e in endings)])
    for key, name in PARTS.items():
        shares = [(e.get("shares") or {}).get(key) for e in endings]
        if any(share is not None for share in shares):
            rows.append([name, *("–" if s is None else f"{s:.0%}" for s in shares)])
    head = ["", *(_named(i, record) for i, record in enumerate(records))]
    return table(head, [row for row in rows if any(cell != "–" for cell in row[1:])])


def _named(index: int, record: RunRecord) -> Html:
    """The name of a run with the colour of its curves."""
    return Html(f'<i class="key c{index % 8}"></i>{escaped(record.name)}')


def _last(record: RunRecord, name: str) -> str:
    points = series(record.logs, name)
    return number(points[-1][1]) if points else "–"


def _settings(records: Sequence[RunRecord]) -> Html:
    found = differing_settings(records)
    if not found:
        return element("p", "None that is recorded.", class_="note")
    head = ["", *(_named(i, record) for i, record in enumerate(records))]
    return table(head, [(name, *values) for name, values in found.items()])
