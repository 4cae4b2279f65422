"""The Trainer's method for hyperparameter search."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kbtrain.errors import concise
from kbtrain.trainer import search


class SearchMethods:
    """``Trainer.hyperparameter_search``."""

    @concise
    def hyperparameter_search(
        self,
        hp_space: Callable[[Any], Mapping[str, Any]] | None = None,
        compute_objective: Callable[[dict[str, float]], Any] | None = None,
        n_trials: int = 20,
        direction: str | Sequence[str] = "minimize",
        backend: str | None = None,
        hp_name: Callable[[Any], str] | None = None,
        *,
        n_jobs: int = 1,
        **options: Any,
    ) -> search.BestRun | list[search.BestRun]:
        """Train with several hyperparameters and say which were best (extra ``optuna``).

        Each trial begins with a new model and writes to ``{output_dir}/run-{number}``.

        Args:
            hp_space: From an Optuna trial to arguments and their values (``trial.suggest_float``
                and so on); names that are no arguments are for ``model_init(trial)``.
            compute_objective: From the results of an evaluation to the value that is optimized, or
                one for each direction; the default is the loss, or the sum of the other metrics.
            n_trials: Trials the study has in the end; a resumed study runs those that are missing.
            direction: "minimize", "maximize", or a list of these.
            backend: "optuna" or None.
            hp_name: From a trial to its ``run_name``.
            n_jobs: Processes. All but this one run the program anew up to this call, and share the
                device with it. The study is then kept in ``{output_dir}/study.journal``.
            **options: ``sampler``, ``pruner``, ``storage``, ``study_name``, ``load_if_exists``
                (to resume a study) and ``timeout`` (seconds), as in Optuna.

        Returns:
            The best run; for several directions those that no other one beats in all.

        Raises:
            ConfigurationError: There is no ``model_init`` or ``eval_dataset``, or see the message.
        """
        return search.search(
            self,  # type: ignore[arg-type]
            search.settings(
                hp_space, compute_objective, n_trials, direction, backend, hp_name, n_jobs, options
            ),
        )
