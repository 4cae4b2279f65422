"""The report of a run: one page that holds everything it shows and loads nothing."""

from __future__ import annotations

import base64
import datetime
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kbtrain.report.curves import SPEED, charts_of, draw
from kbtrain.report.record import RunRecord, is_evaluation
from kbtrain.report.style import DATA, SCRIPT, STYLE
from kbtrain.report.summary import Command, Summary, commands, summarize
from kbtrain.utils.html import (
    Html,
    copyable,
    element,
    escaped,
    joined,
    number,
    pairs,
    setting,
    table,
)
from kbtrain.utils.readable import duration, memory

REFRESH = 15
"""Seconds after which the page of a living run loads itself again."""

PARTS = {
    "compute": "computing",
    "data": "waiting for data",
    "host": "host (callbacks, logging, the loop)",
    "other": "evaluating and saving",
}
"""Shares of the time of a run, as ``RunEnding`` has them."""

_ACTIVE = re.compile(r"<(?=\s*/?(?:script|meta|base|link|iframe|object|embed|form)\b)", re.I)
"""Elements that run, load or lead elsewhere: a section must not have them, so they become text."""

NO_SETTINGS = ("output_dir", "run_name")


def render(record: RunRecord, refresh: bool = False) -> str:
    """The report of one run.

    Args:
        record: Its record.
        refresh: Whether the page loads itself again while the run lives.

    Returns:
        An HTML document.
    """
    summary = summarize(record)
    body = [
        _header(record, summary),
        _answers(record, summary),
        _section("Curves", _charts(record, summary)),
        _section("Evaluations", _evaluations(record, summary)),
        *_of_callbacks(record),
        _section("Where the time went", _time(record)),
        _columns(
            _section("Settings that differ from the defaults", _settings(record)),
            _section("Data", _data(record)),
            _section("Model", _model(record)),
            _section("Machine and versions", _machine(record)),
            _section("Checkpoints", _checkpoints(record)),
            _section("Sessions", _sessions(record)),
        ),
        _section("Layers", _layers(record)),
        _section("Warnings", _warnings(record)),
    ]
    return document(record.name, body, [record], REFRESH if refresh and record.live else None)


def document(
    title: str,
    body: Iterable[str],
    records: Sequence[RunRecord],
    refresh: int | None = None,
) -> str:
    """A whole HTML document around its parts; a browser lets it load nothing.

    The records are part of it, as JSON, so that a page can be compared with other runs.
    """
    data = json.dumps([record.to_dict() for record in records], default=str)
    data = data.replace("<", "\\u003c").encode("utf-8", "replace").decode("utf-8")
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = (
        "default-src 'none'; base-uri 'none'; form-action 'none'; style-src 'unsafe-inline'; "
        "img-src data:; font-src data:; "
        f"script-src 'sha256-{digest}'"
    )
    again = f'<meta http-equiv="refresh" content="{refresh}">\n' if refresh else ""
    now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    note = f"Written by kbtrain, {now}."
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n{again}'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{escaped(title)}</title>\n<link rel="icon" href="data:,">\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n"
        f"{joined(body)}\n{element('footer', note)}\n"
        f'<script type="application/json" id="{DATA}">{data}</script>\n'
        f"<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def _section(title: str, content: str | None) -> Html:
    return element("section", element("h2", title), Html(content)) if content else Html("")


def _columns(*sections: Html) -> Html:
    return element("div", *sections, class_="columns")


# --- the first screen -----------------------------------------------------------------------------


def _header(record: RunRecord, summary: Summary) -> Html:
    facts = record.facts
    parts = [
        facts.get("model_class"),
        f"{number(facts['parameters'])} parameters" if facts.get("parameters") else None,
        f"{facts['backend']} on {facts.get('device') or 'unknown'}"
        if facts.get("backend")
        else None,
        f"started {_time_of(facts['started'])}" if facts.get("started") else None,
    ]
    error = (record.ending or {}).get("error")
    return element(
        "header",
        element("h1", record.name),
        element("p", " · ".join(str(part) for part in parts if part), class_="sub"),
        element("p", summary.headline, class_=f"status {summary.status}", role="status"),
        element("p", error, class_="error") if error else "",
    )


def _time_of(text: Any) -> str:
    return str(text)[:16].replace("T", " ")


def _answers(record: RunRecord, summary: Summary) -> Html:
    value = ""
    if summary.best_value is not None:
        value = element(
            "p", number(summary.best_value), " ", element("small", f"best {summary.metric}")
        )
        value = Html(value.replace("<p>", '<p class="value">', 1))
    tests = {k: v for k, v in record.tests.items() if is_result(k)}
    test = ", ".join(f"{name} {number(v)}" for name, v in tests.items())
    result = [
        value,
        element("p", summary.result),
        element("p", f"Test set: {test}.") if test else "",
    ]
    return element(
        "div",
        element(
            "div",
            element("section", element("h2", "Did it converge?"), *result),
            element(
                "section", element("h2", "Which weights are there?"), element("p", summary.weights)
            ),
        ),
        element("section", element("h2", "How to go on"), _commands(commands(record))),
        class_="answers",
    )


def _commands(found: Sequence[Command]) -> Html:
    if not found:
        return element("p", "Without a checkpoint there is nothing to go on from.", class_="note")
    parts = []
    for command in found:
        note = element("small", f" {command.note}") if command.note else ""
        parts += [element("h3", command.title, note), copyable(command.text, command.title)]
    return joined(parts)


def is_result(name: str) -> bool:
    """Whether a value of an evaluation is a result, not what it took of time or memory."""
    return not name.endswith(SPEED) and "_mem_" not in name


# --- curves and results ---------------------------------------------------------------------------


def _charts(record: RunRecord, summary: Summary) -> Html:
    marks = []
    if summary.best_step is not None:
        marks.append((float(summary.best_step), "best", "best"))
    for session in record.sessions[1:]:
        step = session.get("facts", {}).get("start_step")
        if step:
            marks.append((float(step), "resumed", "resume"))
    charts = charts_of([(record.name, with_speed(record))], marks)
    return element("div", *map(draw, charts), class_="charts")


def with_speed(record: RunRecord) -> list[Mapping[str, Any]]:
    """The logs, and the speeds measured between them, for the charts."""
    name = "train_samples_per_second"
    # The one at the end is the mean of the run, not its speed there.
    logs = [{k: v for k, v in log.items() if k != name} for log in record.logs]
    return [*logs, *({"step": step, name: rate} for step, rate in record.throughput)]


def _evaluations(record: RunRecord, summary: Summary) -> Html | None:
    rows: dict[int, dict[str, Any]] = {}
    loss: Any = None
    for log in record.logs:
        loss = log.get("loss", loss)
        if is_evaluation(log):
            row = rows.setdefault(int(log["step"]), {"epoch": log.get("epoch"), "loss": loss})
            row |= {k: v for k, v in log.items() if k.startswith("eval_") and is_result(k)}
    if not rows:
        return None
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    shown = [(number(step), *(number(row.get(n)) for n in names)) for step, row in rows.items()]
    marked = next((i for i, step in enumerate(rows) if step == summary.best_step), None)
    return table(("step", *names), shown, marked, numeric=True)


def _of_callbacks(record: RunRecord) -> list[Html]:
    found = []
    for section in record.sections:
        rows = section.get("table")
        if rows:
            head, *rest = rows
            content = table(head, [[_cell(c) for c in row] for row in rest])
        else:
            content = Html(_ACTIVE.sub("&lt;", section.get("html") or ""))
        found.append(_section(section["title"], element("div", content, class_="section")))
    return found


def _cell(value: Any) -> Any:
    return number(value) if isinstance(value, int | float) else value


def _time(record: RunRecord) -> Html | None:
    ending = record.ending
    shares: Mapping[str, float] = (ending or {}).get("shares") or {}
    if ending is None or not shares:
        return None
    compiling = float(ending.get("compile_seconds") or 0.0)
    total = float(ending.get("seconds") or 0.0)
    loop = max(total - compiling, 0.0)
    parts = [(PARTS.get(name, name), share * loop) for name, share in shares.items()]
    parts.append(("compiling, with the first update", compiling))
    whole = sum(seconds for _, seconds in parts) or 1.0
    bar, rows = [], []
    for i, (name, seconds) in enumerate(parts):
        share = seconds / whole
        bar.append(Html(f'<i class="fill{i % 5}" style="width:{share * 100:.2f}%"></i>'))
        key = Html(f'<i class="key fill{i % 5}"></i>{escaped(name)}')
        rows.append((key, f"{share:.0%}", duration(seconds)))
    speeds = {
        "samples per second": ending.get("samples_per_second"),
        "tokens per second": ending.get("tokens_per_second"),
    }
    text = ", ".join(f"{number(v)} {name}" for name, v in speeds.items() if v)
    note = f"{text}, without compiling, evaluating and saving." if text else ""
    return joined(
        [
            element("div", *bar, class_="bar", role="presentation"),
            table((), rows, numeric=True),
            element("p", note, class_="note") if note else "",
        ]
    )


# --- what the run is ------------------------------------------------------------------------------


def _settings(record: RunRecord) -> Html:
    changed = record.facts.get("changed") or {}
    rows = {k: setting(v) for k, v in changed.items() if k not in NO_SETTINGS}
    return pairs(rows) if rows else element("p", "None.", class_="note")


def _data(record: RunRecord) -> Html | None:
    facts = record.facts
    if not facts.get("batch_size"):
        return None
    evaluated: Mapping[str, Any] = facts.get("eval_examples") or {}
    rows: dict[str, Any] = {"training examples": _count(facts.get("examples"))}
    for name, count in evaluated.items():
        title = "evaluation examples" if name == "eval" else f"evaluation examples, {name}"
        rows[title] = _count(count)
    micro = facts.get("accumulation") or 1
    rows["examples of an update"] = number(facts["batch_size"]) + (
        f" ({micro} micro-batches)" if micro > 1 else ""
    )
    rows["updates planned"] = number(facts.get("updates")) if facts.get("updates") else "unknown"
    rows["epochs planned"] = number(facts.get("epochs"))
    return pairs(rows)


def _count(count: Any) -> str:
    return "unknown" if count is None else number(count)


def _model(record: RunRecord) -> Html | None:
    facts = record.facts
    if not facts.get("model_class"):
        return None
    frozen = facts["parameters"] - facts["trainable"]
    more = f", {number(frozen)} not trained" if frozen else ""
    rate = facts.get("learning_rate")
    return pairs(
        {
            "model": f"{facts['model_class']} {facts.get('model', '')}",
            "parameters": f"{number(facts['parameters'])}{more}",
            "memory": memory(facts.get("model_bytes")),
            "precision": facts.get("precision"),
            "optimizer": facts.get("optimizer"),
            "learning rate": None if rate is None else f"{number(rate)}, {facts.get('schedule')}",
        }
    )


def _machine(record: RunRecord) -> Html | None:
    facts = record.facts
    rows = {
        "backend": facts.get("backend"),
        "device": facts.get("device"),
        "processes": number(facts["processes"]) if facts.get("processes", 1) > 1 else None,
        "host": facts.get("host"),
        "folder": facts.get("output_dir"),
        "command": facts.get("command"),
        **(facts.get("versions") or {}),
    }
    return pairs(rows) if any(rows.values()) else None


def _checkpoints(record: RunRecord) -> Html | None:
    found = record.checkpoints
    if not found:
        return None
    newest = found[-1]["name"]
    rows, marked = [], None
    for i, checkpoint in enumerate(found):
        remarks = []
        if checkpoint.get("best"):
            remarks, marked = ["best"], i
        if checkpoint["name"] == newest:
            remarks.append("newest")
        rows.append((checkpoint["name"], ", ".join(remarks)))
    return table((), rows, marked)


def _sessions(record: RunRecord) -> Html | None:
    if len(record.sessions) < 2:
        return None
    rows = []
    for session in record.sessions:
        facts, ending = session.get("facts") or {}, session.get("ending") or {}
        end = ending.get("reason") or ("running" if record.live else "killed")
        rows.append(
            (
                _time_of(facts.get("started", "")),
                number(facts.get("start_step", 0)),
                number(ending.get("step")),
                duration(ending.get("seconds")),
                end,
            )
        )
    return table(("started", "from step", "to step", "took", "ended"), rows)


def _layers(record: RunRecord) -> Html | None:
    if not record.layers:
        return None
    rows = [(name, kind, shape, number(count)) for name, kind, shape, count in record.layers]
    return table(("layer", "class", "output", "parameters"), rows)


def _warnings(record: RunRecord) -> Html:
    if not record.warnings:
        return element("p", "None.", class_="note")
    rows = [
        (
            number(w.get("step", 0)),
            w.get("level", ""),
            w["text"] + (f" ({w['count']} times)" if w.get("count", 1) > 1 else ""),
        )
        for w in record.warnings
    ]
    return table(("step", "level", "text"), rows)
