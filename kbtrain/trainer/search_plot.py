"""The picture of a hyperparameter search: its trials, and which parameters mattered."""

from __future__ import annotations

import itertools
import logging
import warnings
from pathlib import Path
from typing import Any

from kbtrain.errors import first_lines
from kbtrain.utils.files.output_files import writing

logger = logging.getLogger("kbtrain")

FILE_NAME = "search.png"

BLUE, GREY, ORANGE = "#1f6feb", "#8b949e", "#d2691e"


def save_plot(optuna: Any, study: Any, folder: Path) -> Path | None:
    """Write ``search.png``, where matplotlib is installed; a failure costs a warning.

    With one direction: the objective of each trial and the best so far, and beside it how much
    each hyperparameter mattered, where Optuna can tell. With two, their Pareto front.

    Returns:
        The file; None if there is none.
    """
    complete = study.get_trials(states=(optuna.trial.TrialState.COMPLETE,), deepcopy=False)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    if len(complete) < 2:
        return None
    try:
        share = importances(optuna, study) if len(study.directions) == 1 else {}
        figure = Figure(figsize=(10 if share else 6, 4), layout="constrained")
        axes = figure.subplots(1, 2 if share else 1, squeeze=False)[0]
        if len(study.directions) == 2:
            _draw_front(axes[0], study, complete)
        else:
            _draw_trials(axes[0], study, complete)
        if share:
            _draw_importances(axes[1], share)
        figure.suptitle(f"Search {study.study_name}: {len(complete)} complete trials")
        path = folder / FILE_NAME
        with writing(path) as temporary:
            figure.savefig(temporary, dpi=120)
    except Exception as error:
        logger.warning(
            "The picture of the search could not be made: %s: %s",
            type(error).__name__,
            first_lines(error, 1),
        )
        return None
    return path


def importances(optuna: Any, study: Any) -> dict[str, float]:
    """How much of the differences in the objective each hyperparameter explains, largest first.

    Empty if Optuna cannot tell: after a few trials, or for a single value of each.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an experimental evaluator
        for evaluator in ("FanovaImportanceEvaluator", "PedAnovaImportanceEvaluator"):
            try:
                # The first one needs scikit-learn, and takes a seed.
                seed = {"seed": 0} if evaluator.startswith("Fanova") else {}
                judge = getattr(optuna.importance, evaluator)(**seed)
                found = optuna.importance.get_param_importances(study, evaluator=judge)
            except (ImportError, AttributeError, ValueError, RuntimeError):
                continue
            return {name: float(share) for name, share in found.items()}
    return {}


def best_so_far(values: list[float], maximize: bool) -> list[float]:
    """The best of the values up to each.

    Example:
        >>> best_so_far([3.0, 4.0, 1.0, 2.0], maximize=False)
        [3.0, 3.0, 1.0, 1.0]
    """
    return list(itertools.accumulate(values, max if maximize else min))


def _draw_trials(axis: Any, study: Any, complete: list[Any]) -> None:
    numbers = [trial.number for trial in complete]
    for index, direction in enumerate(study.directions):
        values = [trial.values[index] for trial in complete]
        color = BLUE if len(study.directions) == 1 else f"C{index}"
        name = "objective" if len(study.directions) == 1 else f"objective {index}"
        axis.plot(numbers, values, "o", color=color, markersize=5, label=name)
        best = best_so_far(values, direction.name == "MAXIMIZE")
        axis.step(numbers, best, where="post", color=color, alpha=0.6, label="best so far")
    axis.set_xlabel("trial")
    axis.set_ylabel("objective")
    axis.grid(alpha=0.3)
    axis.legend()


def _draw_front(axis: Any, study: Any, complete: list[Any]) -> None:
    front = sorted(tuple(trial.values) for trial in study.best_trials)
    axis.plot(*zip(*[trial.values for trial in complete], strict=True), "o", color=GREY)
    axis.plot(*zip(*front, strict=True), "o-", color=BLUE, label="Pareto front")
    for set_label, direction, name in zip(
        (axis.set_xlabel, axis.set_ylabel), study.directions, ("first", "second"), strict=True
    ):
        set_label(f"{name} objective ({direction.name.lower()})")
    axis.grid(alpha=0.3)
    axis.legend()


def _draw_importances(axis: Any, share: dict[str, float]) -> None:
    names = list(share)[::-1]
    axis.barh(names, [share[name] for name in names], color=ORANGE)
    axis.set_xlim(0, 1)
    axis.set_xlabel("share of the differences explained")
    axis.set_title("Importance", fontsize=10)
