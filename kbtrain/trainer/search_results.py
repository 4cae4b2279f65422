"""The result of a hyperparameter search: the best trial, or why there is none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from kbtrain.errors import ConfigurationError


class BestRun(NamedTuple):
    """The best trial of a search, or one of the Pareto front with several directions.

    Attributes:
        run_id: Number of the trial, as a string; its files are in ``{output_dir}/run-{run_id}``.
        objective: Its value, or a list with one per direction.
        hyperparameters: The hyperparameters of the trial.
    """

    run_id: str
    objective: float | list[float]
    hyperparameters: dict[str, Any]


def best(optuna: Any, study: Any) -> BestRun | list[BestRun]:
    """The best trial of a study, or the Pareto front of one in several directions.

    Raises:
        ConfigurationError: No trial was completed.
    """
    states = optuna.trial.TrialState
    trials = study.get_trials(deepcopy=False)
    if not any(trial.state == states.COMPLETE for trial in trials):
        raise ConfigurationError(_why_none(study, trials, states))
    if len(study.directions) > 1:
        return [_as_run(trial, list(trial.values)) for trial in study.best_trials]
    return _as_run(study.best_trial, study.best_trial.value)


def _why_none(study: Any, trials: Sequence[Any], states: Any) -> str:
    """Why no trial was completed, and what to do."""
    pruned, failed = (sum(t.state == s for t in trials) for s in (states.PRUNED, states.FAIL))
    advice = []
    if pruned:
        advice.append("Use another pruner, or one that waits longer (n_warmup_steps).")
    if failed:
        advice.append(
            "See the errors of the trials that failed above, and an objective of NaN among them."
        )
    if not trials:
        advice.append("Allow more time (timeout).")
    counts = f"{pruned} were pruned, {failed} failed, {len(trials) - pruned - failed} did not end"
    return (
        f"No trial of the study {study.study_name!r} was completed: of {len(trials)}, {counts}. "
        f"{' '.join(advice)}".rstrip()
    )


def _as_run(trial: Any, objective: Any) -> BestRun:
    values = trial.user_attrs.get("hyperparameters", trial.params)
    return BestRun(str(trial.number), objective, dict(values))
