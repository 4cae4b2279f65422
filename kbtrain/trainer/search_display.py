"""What a hyperparameter search shows: a line per trial, a table at the end, the best as YAML."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from kbtrain.display import ProgressCallback
from kbtrain.display.callbacks import is_terminal
from kbtrain.display.format import number
from kbtrain.errors import first_lines
from kbtrain.training.trainer_base import TrainerBase
from kbtrain.utils.best_effort import print_line
from kbtrain.utils.readable import duration

LONGEST = 11
"""Characters of a column's name on a terminal."""

BEST = "*"
"""Mark of a trial that is the best so far."""

MOST_ROWS = 20
"""Trials in the table at the end; the best ones."""


class SearchDisplay:
    """Prints the trials of a search as they end, where the Trainer shows its runs.

    Args:
        optuna: The package.
        trainer: The Trainer.
    """

    def __init__(self, optuna: Any, trainer: TrainerBase) -> None:
        self._optuna, self._trainer = optuna, trainer
        self._names: list[str] = []
        self._widths: list[int] = []
        shown = [c for c in trainer.callback_handler.callbacks if hasattr(c, "notice")]
        self.is_on = bool(shown) and not any(
            isinstance(c, ProgressCallback) and c.is_disabled for c in shown
        )

    @contextlib.contextmanager
    def instead_of_optuna(self) -> Iterator[None]:
        """Context in which Optuna prints no lines of its own, which say the same at length."""
        log = self._optuna.logging
        before = log.get_verbosity()
        if not self.is_on or before != log.INFO:
            yield
            return
        log.set_verbosity(log.ERROR)
        try:
            yield
        finally:
            log.set_verbosity(before)

    @contextlib.contextmanager
    def trial(self, study: Any, trial: Any) -> Iterator[list[Any]]:
        """Context of a trial, which is shown when it ends.

        Args:
            study: The study.
            trial: The trial.

        Yields:
            A list that gets the objective.
        """
        begin, result = time.perf_counter(), list[Any]()
        try:
            yield result
        except self._optuna.TrialPruned as reason:
            self._line(study, trial, f"pruned {reason}".strip(), begin)
            raise
        except Exception as error:
            what = f"failed: {type(error).__name__}: {first_lines(error, 1)}"
            self._line(study, trial, what, begin)
            raise
        self._line(study, trial, _objective(result[0]), begin, result[0])

    def _line(self, study: Any, trial: Any, outcome: str, begin: float, value: Any = None) -> None:
        if not self.is_on:
            return
        values = trial.user_attrs.get("hyperparameters", trial.params)
        shown, notes = outcome, list[str]()
        if value is None:  # "pruned at step 75", "failed: ValueError: ..."
            shown, _, rest = outcome.partition(" ")
            shown, notes = shown.rstrip(":"), [rest] if rest else []
        cells = {"trial": str(trial.number), "objective": shown}
        room = columns()
        if len(study.directions) == 1:
            cells["best"], is_best = self._best(study, trial, value)
            notes += [BEST] if is_best else []
        cells |= {name: _short(given) for name, given in values.items()}
        cells["time"] = duration(time.perf_counter() - begin)
        if room is not None and _width(cells, room) > room:
            cells.pop("best", None)  # the row that is marked has it
        names = list(cells)
        if names != self._names:
            self._names = names
            self._widths = [_column(name, room) for name in names]
            print_line(_row([_head(name, room) for name in names], self._widths))
        line = "  ".join([_row(list(cells.values()), self._widths), *notes])
        if room is not None and len(line) > room and value is None:
            line = "\n".join([_row(list(cells.values()), self._widths), *(f"  {n}" for n in notes)])
        print_line(line)

    def _best(self, study: Any, trial: Any, value: Any) -> tuple[str, bool]:
        """The best objective so far, and whether it is that of this trial.

        The study does not know of this trial yet.
        """
        done = study.get_trials(states=(self._optuna.trial.TrialState.COMPLETE,), deepcopy=False)
        known = [(each.value, each.number) for each in done]
        if value is not None and not math.isnan(float(value)):
            known.append((float(value), trial.number))
        if not known:
            return "", False
        choose = max if study.directions[0].name == "MAXIMIZE" else min
        best, found = choose(known)
        return number(float(best)), found == trial.number

    def results(self, study: Any) -> None:
        """Print the table of all trials, and the best one's arguments."""
        if not self.is_on:
            return
        states = self._optuna.trial.TrialState
        trials = study.get_trials(deepcopy=False)
        complete = [t for t in trials if t.state == states.COMPLETE]
        counts = {s: sum(t.state == s for t in trials) for s in (states.PRUNED, states.FAIL)}
        words = {states.PRUNED: "pruned", states.FAIL: "failed"}
        heads = [f"{len(complete)} complete"]
        heads += [f"{n} {words[state]}" for state, n in counts.items() if n]
        single = len(study.directions) == 1
        if single:
            sign = -1 if study.directions[0].name == "MAXIMIZE" else 1
            complete.sort(key=lambda t: sign * t.value)
        else:
            front = {t.number for t in study.best_trials}
            complete = [t for t in complete if t.number in front]
        title = f"Search {study.study_name}: {len(trials)} trials, {', '.join(heads)}"
        print_line("\n".join(["", title, *table(complete[:MOST_ROWS])]))
        if len(complete) > MOST_ROWS:
            print_line(f"  and {len(complete) - MOST_ROWS} more")
        if single and complete:
            best = complete[0]
            values = best.user_attrs.get("hyperparameters", best.params)
            print_line("\n".join(["", *self.yaml(best.number, values), ""]))

    def yaml(self, trial: int, values: Mapping[str, Any]) -> list[str]:
        """The arguments of a trial as lines of YAML, to paste into a file of arguments."""
        known = self._trainer.args.to_dict()
        lines = [f"# trial {trial}, the best one"]
        lines += [f"{name}: {yaml_value(v)}" for name, v in values.items() if name in known]
        own = {name: v for name, v in values.items() if name not in known}
        lines += [f"# for model_init(trial): {n}: {yaml_value(v)}" for n, v in own.items()]
        return lines


def table(trials: Sequence[Any]) -> list[str]:
    """Trials as the rows of a table: number, objective, hyperparameters, duration."""
    settings = [t.user_attrs.get("hyperparameters", t.params) for t in trials]
    names = list(dict.fromkeys(name for values in settings for name in values))
    room = columns()
    rows = [["trial", "objective", *(_head(name, room) for name in names), "time"]]
    for each, values in zip(trials, settings, strict=True):
        spent = "" if each.duration is None else duration(each.duration.total_seconds())
        found = each.value if len(each.values) == 1 else each.values
        cells = [_short(values.get(name, "")) for name in names]
        rows.append([str(each.number), _objective(found), *cells, spent])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [_row(row, widths) for row in rows]


def columns() -> int | None:
    """Width of the terminal; None if there is none, which has no limit."""
    return shutil.get_terminal_size().columns if is_terminal() else None


def _head(name: str, room: int | None) -> str:
    """The name of a column, not longer than there is room for on a terminal."""
    return name if room is None or len(name) <= LONGEST else f"{name[: LONGEST - 3]}..."


def _width(names: Iterable[str], room: int) -> int:
    """The width of a line of the trials, a note included."""
    return sum(2 + _column(name, room) for name in names) + 2 + len(BEST)


def _column(name: str, room: int | None) -> int:
    """The width of a column, which the first trial fixes."""
    least = {"trial": 5, "objective": 9, "best": 8, "time": 6}.get(name, 8)
    return max(len(_head(name, room)), least)


def _row(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "".join(f"  {cell:>{width}}" for cell, width in zip(cells, widths, strict=True))


def yaml_value(value: Any) -> str:
    """A value as YAML 1.1 and 1.2 read it; a number with an exponent needs a point in 1.1.

    Example:
        >>> yaml_value(1e-05), yaml_value(True), yaml_value("no"), yaml_value([1, 2])
        ('1.0e-05', 'true', '"no"', '[1, 2]')
    """
    text = json.dumps(value, default=str)
    mantissa, exponent, power = text.partition("e")
    if isinstance(value, float) and exponent and "." not in mantissa:
        return f"{mantissa}.0e{power}"
    return text


def _short(value: Any) -> str:
    return number(value) if isinstance(value, int | float) else str(value)


def _objective(value: Any) -> str:
    if isinstance(value, Sequence):
        return " ".join(number(float(one)) for one in value)
    return number(float(value))
