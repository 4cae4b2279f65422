"""The texts of all screens: numbers, durations, the facts of a run, evaluations, the ending."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kbtrain.callbacks.base import evaluation_name
from kbtrain.display.view import Evaluation
from kbtrain.report.ending import RunEnding
from kbtrain.report.facts import RunFacts
from kbtrain.utils.files.addresses import scheme_of
from kbtrain.utils.readable import duration, memory

Row = tuple[str, str]


def number(value: Any) -> str:
    """A metric with four significant digits.

    Example:
        >>> number(0.123456), number(3), number(2.0e-7)
        ('0.1235', '3', '2e-07')
    """
    return f"{value:.4g}" if isinstance(value, float) else f"{value}"


def count(value: float) -> str:
    """A count or a speed, with thousands separated.

    Example:
        >>> count(1234567), count(8.26), count(0.123)
        ('1,234,567', '8.3', '0.12')
    """
    if isinstance(value, int) or value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def plural(value: int, noun: str) -> str:
    """A count with its noun.

    Example:
        >>> plural(1, "update"), plural(2100, "update")
        ('1 update', '2,100 updates')
    """
    return f"{value:,} {noun}" if value == 1 else f"{value:,} {noun}s"


def epochs(value: float) -> str:
    """A number of epochs, without decimals where it is whole.

    Example:
        >>> epochs(3.0), epochs(2.4666)
        ('3', '2.47')
    """
    return f"{value:.0f}" if value == int(value) else f"{value:.2f}"


def _epochs_in_words(value: float) -> str:
    return f"{epochs(value)} epoch{'' if value == 1 else 's'}"


def short_path(path: str | os.PathLike[str]) -> str:
    """A path relative to the working directory, where that is shorter; an address as it is."""
    if scheme_of(path) is not None:
        return str(path)
    try:
        relative = os.path.relpath(path)
    except ValueError:  # another drive
        return str(path)
    return str(path) if relative.startswith("..") else relative


def aligned(rows: list[Row], columns: int | None = None) -> list[Row]:
    """The rows as lines: what stands at their beginning, and their text.

    Args:
        rows: Names and texts.
        columns: Width at which texts are wrapped; None for no limit. A command, which begins with
            "$ ", never is.
    """
    indent = max(len(name) for name, _ in rows) + 4
    lines = []
    for name, value in rows:
        parts = [value]
        if columns is not None and not value.startswith("$ "):
            room = max(20, columns - indent)
            parts = textwrap.wrap(value, room, break_long_words=False, break_on_hyphens=False)
        lines += [(f"  {name}".ljust(indent), parts[0] if parts else "")]
        lines += [(" " * indent, part) for part in parts[1:]]
    return lines


# --- the start ----------------------------------------------------------------------------------


def facts_rows(facts: RunFacts) -> list[Row]:
    """The start panel: names and texts."""
    rows = [
        ("model", _model(facts)),
        ("data", _data(facts)),
        ("training", _training(facts)),
        ("optimizer", _optimizer(facts)),
        ("computing", _computing(facts)),
        ("output", short_path(facts.output_dir)),
    ]
    if facts.resumed_from is not None:
        rows.append(
            ("resumed", f"from {short_path(facts.resumed_from)}, after update {facts.start_step:,}")
        )
    return rows


def _model(facts: RunFacts) -> str:
    frozen = facts.parameters - facts.trainable
    parts = f"{facts.trainable:,} trained, {frozen:,} not" if frozen else "all trained"
    size = memory(facts.model_bytes)
    name = facts.model if facts.model_class.lower() in facts.model.lower() else facts.model_class
    return f"{name}: {plural(facts.parameters, 'parameter')} ({parts}), {size}"


def _data(facts: RunFacts) -> str:
    training = "a stream" if facts.examples is None else plural(facts.examples, "example")
    sets = facts.eval_examples
    if not sets:
        return f"{training}, no evaluation set"
    sizes = {n: "a stream" if s is None else f"{s:,}" for n, s in sets.items()}
    if list(sizes) == ["eval"]:
        return f"{training}, evaluated on {sizes['eval']}"
    return f"{training}, evaluated on " + ", ".join(f"{n} ({size})" for n, size in sizes.items())


def _training(facts: RunFacts) -> str:
    length = plural(facts.updates, "update") if facts.updates else "updates as long as data comes"
    if 0 < facts.epochs < 2**31 - 1 and facts.examples is not None:
        length += f" in {_epochs_in_words(facts.epochs)}"
    if not facts.batch_size:
        return f"{length}, batches as they come"
    size = f"{facts.batch_size:,} examples each"
    if facts.accumulation > 1:
        micro = facts.batch_size // facts.accumulation
        size += f" ({facts.accumulation} micro-batches of {micro:,})"
    return f"{length}, {size}"


def _optimizer(facts: RunFacts) -> str:
    if facts.optimizer == "none":
        return "none: the model's own step"
    if facts.learning_rate is None:
        return f"{facts.optimizer}, {facts.schedule}"
    return f"{facts.optimizer}, learning rate {number(facts.learning_rate)}, {facts.schedule}"


def _computing(facts: RunFacts) -> str:
    text = f"{facts.precision} on {facts.backend}, {facts.device}"
    return text if facts.processes == 1 else f"{text}, {facts.processes} processes"


# --- logs and evaluations -------------------------------------------------------------------------


def place(step: int, updates: int) -> str:
    """Where a run is: "7/20", or "7" if its length is unknown."""
    return f"{step}/{updates}" if updates else f"{step}"


def log_line(logs: Mapping[str, Any], step: int, updates: int) -> str:
    """A training log as one line."""
    shown = ", ".join(f"{name} {number(value)}" for name, value in logs.items())
    return f"step {place(step, updates)}: {shown}"


def printable(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by names that a terminal can show: without control characters and line breaks.

    Example:
        >>> printable({"a" + chr(10) + "b": 1})
        {'a b': 1}
    """
    shown = {_one_line(name): value for name, value in values.items()}
    return {name: _one_line(v) if isinstance(v, str) else v for name, v in shown.items()}


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in str(text))


def runtime(metrics: Mapping[str, Any]) -> float:
    """How long an evaluation took, in seconds."""
    return float(sum(v for n, v in metrics.items() if n.endswith("_runtime")))


def evaluation_parts(result: Evaluation) -> tuple[str, list[str], str]:
    """An evaluation in three parts: where, the values, and what became of it."""
    where = f"step {place(result.step, result.updates)}, epoch {epochs(result.epoch)}"
    values = [f"{name} {number(value)}" for name, value in result.metrics.items()]
    if "loss" in result.training:
        values.insert(0, f"loss {number(result.training['loss'])}")
    notes = ["best"] if result.best else []
    # It is written in the background, and that may fail.
    notes += [f"saving {result.saved}"] if result.saved else []
    return where, values, ", ".join(notes)


def evaluation_line(result: Evaluation) -> str:
    """An evaluation during the training as one line."""
    where, values, notes = evaluation_parts(result)
    line = f"{where}: {', '.join(values)}"
    return f"{line} ({notes})" if notes else line


def lone_evaluation_line(result: Evaluation) -> str:
    """An evaluation or prediction outside of ``fit`` as one line."""
    values = ", ".join(f"{name} {number(value)}" for name, value in result.metrics.items())
    return f"{values or 'done'} ({duration(result.seconds)})"


# --- the end --------------------------------------------------------------------------------------


def ending_title(ending: RunEnding) -> str:
    """How the run ended, in a few words."""
    if ending.completed:
        return f"Finished: {ending.reason}."
    return f"Stopped: {ending.reason}." if ending.error is None else f"Failed: {ending.reason}."


def ending_rows(ending: RunEnding) -> list[Row]:
    """The end of a run: names and texts."""
    of = f" of {ending.updates:,}" if ending.updates > ending.step else ""
    updates = f"{ending.step:,}{of} updates" if of else plural(ending.step, "update")
    skipped = f", {ending.skipped:,} of them skipped as not finite" if ending.skipped else ""
    done = f"{updates}{skipped}, {_epochs_in_words(ending.epoch)}"
    if ending.first_step:
        done += f"; {ending.step - ending.first_step:,} of them now"
    rows = [("trained", f"{done}, in {duration(ending.seconds)}{_compiling(ending)}")]
    if ending.best_step is not None and ending.best_value is not None:
        rows.append(("best", _best(ending)))
    rows.append(("weights", f"the model holds {ending.weights}"))
    if ending.samples_per_second is not None:
        rows.append(("speed", _speed(ending)))
    if ending.shares:
        rows.append(("time", _shares(ending)))
    rows.append(("to go on", _going_on(ending)))
    if ending.resume_command:
        rows.append(("", f"$ {ending.resume_command}"))
    return rows


def _compiling(ending: RunEnding) -> str:
    if ending.compile_seconds < 0.05:
        return ""
    return f" ({duration(ending.compile_seconds)} of it compiling)"


def _best(ending: RunEnding) -> str:
    name = evaluation_name(str(ending.best_metric))
    text = f"{name} {number(ending.best_value)} at update {ending.best_step:,}"
    since = ending.evaluations_since_best
    if since is None:
        return text
    if since == 0:
        return f"{text} (the last: still improving)"
    return f"{text} ({plural(since, 'evaluation')} ago)"


def _speed(ending: RunEnding) -> str:
    assert ending.samples_per_second is not None
    text = f"{count(ending.samples_per_second)} samples/s"
    if ending.tokens_per_second is not None:
        text += f", {count(ending.tokens_per_second)} tokens/s"
    return f"{text} (without compiling, eval, save)"


def _shares(ending: RunEnding) -> str:
    names = {"compute": "compute", "data": "data", "host": "host", "other": "eval and save"}
    parts = [f"{round(100 * ending.shares[n])}% {names[n]}" for n in names if n in ending.shares]
    return ", ".join(parts)


def _going_on(ending: RunEnding) -> str:
    if ending.checkpoint is None:
        return "there is no checkpoint: a new run begins from scratch"
    text = f"from {Path(ending.checkpoint).name}"
    if ending.error is not None:
        text += ", once the cause is mended"
    change = ending.resume_change
    if ending.completed and ending.step >= ending.updates:
        change = " and ".join(filter(None, (ending.resume_longer, change)))
    return f"{text}, with {change}" if change else text
