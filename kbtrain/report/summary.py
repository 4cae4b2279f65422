"""The three answers a report begins with: did it converge, which weights, how to go on."""

from __future__ import annotations

import math
import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kbtrain.report.curves import series
from kbtrain.report.record import RunRecord, is_evaluation
from kbtrain.utils.files.addresses import beneath
from kbtrain.utils.html import number
from kbtrain.utils.readable import duration

Point = tuple[float, float]

FEWEST_LOGS = 3
"""Training logs whose mean is compared with another, at least."""


@dataclass(frozen=True)
class Summary:
    """The state of a run in sentences.

    Attributes:
        status: "running", "completed", "stopped", "failed" or "unknown".
        headline: How it ended, one sentence.
        result: Whether it converged.
        weights: Which weights there are, and where.
        best_step: The step of the best evaluation, or None.
        best_value: The metric there.
        metric: Its name in the logs, or None.
    """

    status: str
    headline: str
    result: str
    weights: str
    best_step: int | None
    best_value: float | None
    metric: str | None


def summarize(record: RunRecord) -> Summary:
    """Describe a run."""
    status, headline = _status(record)
    metric, points = watched(record)
    best = best_point(record, metric, points)
    return Summary(
        status=status,
        headline=headline,
        result=_result(record, metric, points, best, status),
        weights=_weights(record, best),
        best_step=None if best is None else int(best[0]),
        best_value=None if best is None else best[1],
        metric=metric if best else None,
    )


def _status(record: RunRecord) -> tuple[str, str]:
    ending = record.ending
    if record.live:
        return "running", f"Running: {progress(record)}."
    if ending is None:
        if record.sessions:
            text = (
                f"No ending was recorded: the process was killed. Last known: {progress(record)}."
            )
            return "unknown", text
        return "unknown", f"How it ended is not recorded. Last known: {progress(record)}."
    reason = str(ending.get("reason") or "ended")
    text = f"{reason[:1].upper()}{reason[1:]}. {progress(record)}, {took(ending)}."
    if ending.get("error"):
        return "failed", text
    return ("completed" if ending.get("completed") else "stopped"), text


def took(ending: Mapping[str, Any]) -> str:
    """How long the last call of ``fit`` took, and from which update if it continued a run."""
    first = ending.get("first_step")
    since = f" since update {number(first)}" if first else ""
    return f"{duration(ending.get('seconds'))}{since}"


def progress(record: RunRecord) -> str:
    """Updates and epochs: "148 of 420 updates, 7.05 epochs"."""
    planned = record.facts.get("updates")
    steps = record.steps
    text = (
        f"{number(steps)} of {_counted(planned, 'update')}"
        if planned
        else _counted(steps, "update")
    )
    epoch = (record.ending or {}).get("epoch") or (
        record.logs[-1].get("epoch") if record.logs else None
    )
    return f"{text}, {_counted(round(float(epoch), 2), 'epoch')}" if epoch else text


def _counted(value: float, noun: str) -> str:
    return f"{number(value)} {noun}{'' if value == 1 else 's'}"


def watched(record: RunRecord) -> tuple[str | None, list[Point]]:
    """The metric that decides which weights are best, or the best substitute, and its values."""
    for name in (record.metric, "eval_loss", "loss"):
        if name and (points := series(record.logs, name)):
            return name, points
    return None, []


def greater_is_better(record: RunRecord, metric: str) -> bool:
    """The direction of a metric: as in the arguments for theirs, else by its name."""
    given = record.arguments.get("greater_is_better")
    if metric == record.metric and isinstance(given, bool):
        return given
    return not metric.endswith("loss")


def best_point(record: RunRecord, metric: str | None, points: list[Point]) -> Point | None:
    """The best evaluation: the recorded one, or the best of the logs."""
    if record.best is not None and record.best.get("value") is not None and metric == record.metric:
        return float(record.best["step"]), float(record.best["value"])
    finite = [p for p in points if math.isfinite(p[1])]
    if metric is None or metric == "loss" or not finite:
        return None
    sign = -1 if greater_is_better(record, metric) else 1
    return min(finite, key=lambda p: (sign * p[1], p[0]))


def _result(
    record: RunRecord, metric: str | None, points: list[Point], best: Point | None, status: str
) -> str:
    sentences = []
    if best is not None and metric is not None:
        sentences.append(f"{metric} was best at step {number(best[0])}: {number(best[1])}.")
        later = [p for p in points if p[0] > best[0]]
        if later:
            times = f"{len(later)} evaluations" if len(later) > 1 else "evaluation"
            sentences.append(
                f"The {times} since then {'were' if len(later) > 1 else 'was'} no better."
            )
        elif len(points) > 1:
            so_far = "so far" if status == "running" else "of the run"
            sentences.append(f"That is the last evaluation {so_far}: it was still improving.")
    losses = series(record.logs, "loss")
    sentences += _of_losses([value for _, value in losses], losses[-1][0] if losses else 0)
    skipped = (record.ending or {}).get("skipped") or 0
    if skipped:
        were = "was" if skipped == 1 else "were"
        sentences.append(
            f"{number(skipped)} of {_counted(record.steps, 'update')} {were} skipped as not finite."
        )
    if best is None and record.logs:
        sentences.append(_without_best(record))
    return " ".join(sentences) or "Nothing was logged."


def _of_losses(losses: Sequence[float], step: float) -> list[str]:
    """Whether the training loss fell: means of the first and last tenth, as one log is noise."""
    if not losses:
        return []
    if not math.isfinite(losses[-1]):
        return [f"The training loss at step {number(step)} is {number(losses[-1])}."]
    finite = [loss for loss in losses if math.isfinite(loss)]
    count = max(len(finite) // 10, FEWEST_LOGS)
    if len(finite) < 2 * count:
        return [f"The last training loss is {number(losses[-1])}."]
    first, last = statistics.fmean(finite[:count]), statistics.fmean(finite[-count:])
    means = f"(means of the first and last {count} logs)"
    if number(first) == number(last):
        return [f"The training loss stayed at {number(first)} {means}."]
    way = "fell" if last < first else "rose"
    return [f"The training loss {way} from {number(first)} to {number(last)} {means}."]


def _without_best(record: RunRecord) -> str:
    """What was evaluated, where no evaluation is the best."""
    evaluations = [log for log in record.logs if is_evaluation(log)]
    steps = {log.get("step") for log in evaluations}
    if not evaluations:
        return "It was not evaluated."
    names = dict.fromkeys(
        name
        for log in evaluations
        for name in log
        if name.startswith("eval_") and name.endswith("loss")
    )
    text = f"It was evaluated at {_counted(len(steps), 'step')}"
    text += f" ({', '.join(names)})" if names else ""
    metric = record.metric or "eval_loss"
    if any(metric in log for log in evaluations):
        return f"{text}, but {metric} was never finite, so no evaluation is the best."
    if record.metric is not None:
        return f"{text}, but no evaluation has {metric}, so none is the best."
    return f"{text}; no metric_for_best_model was chosen, so no evaluation is the best."


def _weights(record: RunRecord, best: Point | None) -> str:
    ending, sentences = record.ending, []
    if ending is not None and ending.get("weights"):
        weights = str(ending["weights"])
        sentences.append(f"The model held at the end: {weights}.")
    marked = next((c["name"] for c in record.checkpoints if c.get("best")), None)
    newest = record.checkpoints[-1]["name"] if record.checkpoints else None
    if marked and marked == newest:
        sentences.append(f"{marked} is the newest checkpoint and the best.")
    elif marked:
        sentences.append(f"{marked} is the best checkpoint, {newest} the newest.")
    elif newest:
        sentences.append(f"{newest} is the newest checkpoint.")
    elif record.sessions:
        sentences.append("There are no checkpoints.")
    if best is not None and marked and marked != f"checkpoint-{int(best[0])}":
        sentences.append(f"The best step, {number(best[0])}, has no checkpoint.")
    return " ".join(sentences) or "Which weights there are is not recorded."


@dataclass(frozen=True)
class Command:
    """Something to copy.

    Attributes:
        title: What it does.
        text: The command or program.
        note: What has to be changed first; may be empty.
    """

    title: str
    text: str
    note: str = ""


def commands(record: RunRecord) -> list[Command]:
    """How to go on with the run, and how to load its weights."""
    ending: dict[str, Any] = record.ending or {}
    found = []
    folder = str(record.facts.get("output_dir", "."))
    if record.checkpoints:
        command, change = ending.get("resume_command") or "", ending.get("resume_change") or ""
        if not command and not ending and record.facts.get("command"):
            command, change = record.facts["command"], 'fit(resume_from_checkpoint="auto")'
        planned = record.facts.get("updates") or 0
        over = bool(planned) and record.steps >= planned
        note = f"With {change} in the program." if command and change else ""
        if over:
            more = ending.get("resume_longer") or "more epochs"
            note = f"All updates are done: set {more} first. {note}".strip()
        text = command or 'trainer.fit(resume_from_checkpoint="auto")'
        found.append(Command("Go on", text, note))
        title, chosen, other = _to_load(record)
        path = beneath(folder, chosen)
        load = f"import kbtrain\n\nkbtrain.load_weights(model, {path!r})"
        note = f"model: built as in training.{other}"
        found.append(Command(f"Load {title}", load, note))
        export = f"kbtrain checkpoint export {shlex.quote(path)} model.keras"
        found.append(Command("Export them as a Keras file", export))
    return found


def _to_load(record: RunRecord) -> tuple[str, str, str]:
    """The checkpoint to load: what it holds, its name, and what it does not hold."""
    names = {c["name"]: c for c in record.checkpoints}
    best = next((name for name, c in names.items() if c.get("best")), None)
    newest = str(record.checkpoints[-1]["name"])
    ending = record.ending or {}
    other, step = "", ending.get("weights_step")
    if "weights_step" in ending and step is None:  # a callback gave the model others at the end
        other = f" The model held others, {ending['weights']}: trainer.save_model() writes those."
    if best is not None:
        return "the best weights", best, other
    if step is not None and (held := f"checkpoint-{step}") in names and held != newest:
        return "the weights that the model held", held, ""
    return "the newest weights", newest, other
