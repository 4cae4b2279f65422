"""Hyperparameter search with Optuna: one training per trial, in one or several processes."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from kbtrain.callbacks.base import TrainerCallback
from kbtrain.callbacks.state import TrainerControl, TrainerState
from kbtrain.checkpoint.remote import open_store
from kbtrain.errors import ConfigurationError, NonFiniteError
from kbtrain.optimization import registry
from kbtrain.plan import request as planning
from kbtrain.trainer.search_display import SearchDisplay
from kbtrain.trainer.search_plot import save_plot
from kbtrain.trainer.search_results import BestRun as BestRun
from kbtrain.trainer.search_results import best
from kbtrain.training.dataloaders import is_named_datasets
from kbtrain.training.resuming import make_saver
from kbtrain.training.trainer_base import TrainerBase, takes_trial
from kbtrain.utils.files.addresses import beneath
from kbtrain.utils.machine.processes import current
from kbtrain.utils.packages.optional_imports import require
from kbtrain.utils.timing import without_durations

if TYPE_CHECKING:
    from kbtrain.config.training_args import TrainingArguments

logger = logging.getLogger("kbtrain")

WORKER = "KBTRAIN_SEARCH_WORKER"
"""Environment variable that marks a process started to run trials of a search."""

STUDY = "kbtrain"
"""Default name of a study."""


class Settings(NamedTuple):
    """The settings of a search; see ``Trainer.hyperparameter_search``."""

    hp_space: Callable[[Any], Mapping[str, Any]]
    compute_objective: Callable[[dict[str, float]], float | Sequence[float]]
    n_trials: int
    directions: tuple[str, ...]
    hp_name: Callable[[Any], str] | None
    n_jobs: int
    sampler: Any
    pruner: Any
    storage: Any
    study_name: str | None
    load_if_exists: bool
    timeout: float | None


def default_hp_space(trial: Any) -> dict[str, Any]:
    """The default space of Transformers: learning rate, epochs, seed and batch size."""
    return {
        "learning_rate": trial.suggest_float("learning_rate", 1e-6, 1e-4, log=True),
        "num_train_epochs": trial.suggest_int("num_train_epochs", 1, 5),
        "seed": trial.suggest_int("seed", 1, 40),
        "per_device_train_batch_size": trial.suggest_categorical(
            "per_device_train_batch_size", [4, 8, 16, 32, 64]
        ),
    }


def default_compute_objective(metrics: Mapping[str, float]) -> float:
    """The evaluation loss if there are no other metrics, otherwise the sum of the other metrics.

    Example:
        >>> default_compute_objective({"eval_loss": 0.5, "eval_runtime": 3.0})
        0.5
        >>> default_compute_objective({"eval_loss": 0.5, "eval_f1": 0.25, "eval_accuracy": 0.5})
        0.75
    """
    results = without_durations(metrics)
    loss: float | None = results.pop("eval_loss", None)
    if not results and loss is not None:
        return loss
    return float(sum(results.values()))


def settings(
    hp_space: Callable[[Any], Mapping[str, Any]] | None,
    compute_objective: Callable[[dict[str, float]], Any] | None,
    n_trials: int,
    direction: str | Sequence[str],
    backend: str | None,
    hp_name: Callable[[Any], str] | None,
    n_jobs: int,
    options: Mapping[str, Any],
) -> Settings:
    """The arguments of ``Trainer.hyperparameter_search``, with defaults.

    Raises:
        ConfigurationError: The backend is not Optuna, or an option does not exist.
    """
    if backend not in (None, "optuna"):
        raise ConfigurationError(
            f"hyperparameter_search runs on Optuna. Received: backend={backend!r}. Leave it out."
        )
    known = {
        "sampler": None,
        "pruner": None,
        "storage": None,
        "study_name": None,
        "load_if_exists": False,
        "timeout": None,
    }
    if unknown := sorted(set(options) - set(known)):
        raise ConfigurationError(
            f"hyperparameter_search has no option {unknown[0]!r}. Options: {', '.join(known)}."
        )
    return Settings(
        hp_space or default_hp_space,
        compute_objective or default_compute_objective,
        n_trials,
        (direction,) if isinstance(direction, str) else tuple(direction),
        hp_name,
        n_jobs,
        **(known | dict(options)),
    )


def search(trainer: TrainerBase, settings: Settings) -> BestRun | list[BestRun]:
    """Run the trials; see ``Trainer.hyperparameter_search``."""
    _check(trainer, settings)
    if planning.pending():  # no study, and no other processes
        planning.answer(trainer, "hyperparameter_search")
    optuna = require("optuna", "optuna", "hyperparameter_search")
    order = json.loads(os.environ.get(WORKER, "null"))
    if order is not None:
        _work(optuna, trainer, settings, order)
    display = SearchDisplay(optuna, trainer)
    try:
        with display.instead_of_optuna():
            study = optuna.create_study(
                directions=list(settings.directions),
                sampler=settings.sampler,
                pruner=settings.pruner,
                storage=_storage(optuna, trainer, settings),
                study_name=settings.study_name or (STUDY if settings.n_jobs > 1 else None),
                load_if_exists=settings.load_if_exists,
            )
    except optuna.exceptions.DuplicatedStudyError as error:
        raise ConfigurationError(
            f"{error} Resume it with load_if_exists=True, or use another study_name or storage."
        ) from None
    if study.get_trials(deepcopy=False):
        study.sampler.reseed_rng()  # otherwise a seeded sampler would repeat its first samples
    remaining = settings.n_trials - _finished(optuna, study)
    if remaining <= 0:
        logger.warning(
            "The study %s already has its %d trials.", study.study_name, settings.n_trials
        )
    shares = [len(range(i, max(remaining, 0), settings.n_jobs)) for i in range(settings.n_jobs)]
    workers = [_start_worker(trainer, study, share) for share in shares[1:] if share]
    try:
        if shares[0]:
            _optimize(optuna, study, trainer, settings, shares[0])
    except BaseException:
        for worker in workers:
            worker.terminate()
        raise
    finally:
        failed = [worker.pid for worker in workers if worker.wait() != 0]
    if failed:
        raise RuntimeError(
            f"{len(failed)} of {len(workers)} processes of the search failed; their messages are "
            f"above. The trials that were finished are in the study {study.study_name!r}."
        )
    display.results(study)
    trainer.store.bring_files()
    picture = save_plot(optuna, study, trainer.args.output_folder)
    trainer.store.send_files()
    if picture is not None:
        logger.info("A picture of the search is in %s.", picture)
    return best(optuna, study)


def _check(trainer: TrainerBase, settings: Settings) -> None:
    if current().size > 1:
        raise ConfigurationError(
            "hyperparameter_search runs its trials in one process or in n_jobs of its own. "
            f"Received: {current().size} processes of {current().launcher}. Start it without a "
            "launcher."
        )
    if trainer.model_init is None:
        raise ConfigurationError(
            "hyperparameter_search needs a new model for each trial: pass model_init=... (a "
            "function that returns the model) to the Trainer instead of model=... ."
        )
    if trainer.eval_dataset is None:
        raise ConfigurationError("hyperparameter_search needs an eval_dataset. Received: None.")
    if settings.n_trials < 1 or settings.n_jobs < 1:
        raise ConfigurationError(
            "n_trials and n_jobs must be at least 1. "
            f"Received: n_trials={settings.n_trials}, n_jobs={settings.n_jobs}."
        )
    if settings.n_jobs > 1:
        _check_processes(settings)
    wrong = [d for d in settings.directions if d not in ("minimize", "maximize")]
    if wrong or not settings.directions:
        raise ConfigurationError(
            "direction must be 'minimize' or 'maximize', or a list of these. "
            f"Received: {wrong[0] if wrong else settings.directions!r}."
        )


def _check_processes(settings: Settings) -> None:
    """Check the requirements of running several processes."""
    if not Path(sys.argv[0]).is_file():
        raise ConfigurationError(
            "n_jobs > 1 starts the program again for each process, so it must be a script. "
            f"Received: {sys.argv[0]!r}. Use n_jobs=1, or start several processes yourself with "
            "the same storage and load_if_exists=True."
        )
    if settings.storage is not None and not isinstance(settings.storage, str):
        raise ConfigurationError(
            "With n_jobs > 1 storage must be a URL, such as 'sqlite:///study.db', or None for a "
            f"file in output_dir. Received: {type(settings.storage).__name__}."
        )


def _finished(optuna: Any, study: Any) -> int:
    states = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
    return len(study.get_trials(deepcopy=False, states=states))


# --- one trial ------------------------------------------------------------------------------------


def _optimize(
    optuna: Any, study: Any, trainer: TrainerBase, settings: Settings, share: int
) -> None:
    """Run ``share`` trials in this process, and restore the Trainer's arguments afterwards."""
    args, store, saver = trainer.args, trainer.store, trainer.saver
    display = SearchDisplay(optuna, trainer)
    report = _Report(optuna, settings.compute_objective, settings.directions)
    trainer.add_callback(report)

    def objective(trial: Any) -> Any:
        report.trial = trial
        with display.trial(study, trial) as result:
            values = _hyperparameters(settings.hp_space(trial))
            trial.set_user_attr("hyperparameters", values)
            _adjust(trainer, args, values, trial, settings)
            result.append(_run(trainer, report))
        return result[0]

    try:
        with display.instead_of_optuna():
            study.optimize(
                objective,
                n_trials=share,
                timeout=settings.timeout,
                gc_after_trial=True,
                catch=(NonFiniteError,),  # a trial that diverges has failed, the search has not
            )
    finally:
        trainer.remove_callback(report)
        trainer.args, trainer.store, trainer.saver = args, store, saver
        trainer.trial = None


def _hyperparameters(values: Any) -> dict[str, Any]:
    """What ``hp_space`` has returned, checked."""
    if not isinstance(values, Mapping) or not all(isinstance(name, str) for name in values):
        raise ConfigurationError(
            "hp_space must return a dict of hyperparameters, such as {'learning_rate': "
            "trial.suggest_float('learning_rate', 1e-5, 1e-2, log=True)}. "
            f"Received: {values!r:.200}{'; is there a return?' if values is None else ''}"
        )
    return dict(values)


def _adjust(
    trainer: TrainerBase,
    args: TrainingArguments,
    values: Mapping[str, Any],
    trial: Any,
    s: Settings,
) -> None:
    """Set the Trainer's arguments, folder and state for a trial."""
    known = args.to_dict()
    changes = {name: _like(known[name], v) for name, v in values.items() if name in known}
    own = sorted(set(values) - set(known))
    if own and not takes_trial(trainer.model_init):
        raise ConfigurationError(
            f"hp_space gives {', '.join(own)}, which TrainingArguments does not have, and "
            "model_init takes no argument that could use it. Write model_init(trial)."
        )
    name = s.hp_name(trial) if s.hp_name is not None else f"run-{trial.number}"
    folder = beneath(args.output_dir, f"run-{trial.number}")
    trainer.args = args.replace(**changes, output_dir=folder, run_name=name)
    registry.find(registry.OPTIMIZERS, trainer.args.optim, "optim")
    trainer.store = open_store(trainer.args.output_dir)
    trainer.saver = make_saver(trainer.store, trainer.args)
    trainer.trial = trial
    trainer.state, trainer.control = TrainerState(), TrainerControl()


def _like(old: Any, value: Any) -> Any:
    """Convert a value to the argument's numeric type (a sampler may return 3.0 for 3)."""
    if isinstance(old, int) and isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _run(trainer: TrainerBase, report: _Report) -> Any:
    trainer.fit(resume_from_checkpoint=False)
    if report.step != trainer.state.global_step or trainer.args.load_best_model_at_end:
        report.metrics = trainer.evaluate()
    return report.objective()


class _Report(TrainerCallback):
    """Keeps the latest results, reports them to the trial, and stops a pruned one."""

    def __init__(
        self,
        optuna: Any,
        compute: Callable[[dict[str, float]], Any],
        directions: tuple[str, ...],
    ):
        self._optuna, self._compute, self._directions = optuna, compute, directions
        self.trial: Any = None
        self.metrics: dict[str, float] = {}
        self.step = -1

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Discard the results of the previous trial."""
        self.metrics, self.step = {}, -1

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report; with several evaluation sets, when all results of the step are complete."""
        if state.global_step != self.step:
            self.metrics = {}
        self.step = state.global_step
        self.metrics |= kwargs["metrics"]
        if not kwargs["trainer"].is_in_train:
            return
        data = kwargs["trainer"].eval_dataset
        sets = [f"eval_{name}_" for name in data] if is_named_datasets(data) else []
        if not all(any(key.startswith(one) for key in self.metrics) for one in sets):
            return
        found = self.objective()
        if len(self._directions) > 1:
            return  # Optuna prunes on a single objective only
        self.trial.report(float(found), state.global_step)
        if self.trial.should_prune():
            raise self._optuna.TrialPruned(f"at step {state.global_step}")

    def objective(self) -> Any:
        """The objective of the trial, computed from the latest results.

        Raises:
            ConfigurationError: ``compute_objective`` uses a metric that does not exist, or returns
                something else than a number for each direction.
        """
        try:
            found = self._compute(self.metrics)
        except KeyError as error:
            raise ConfigurationError(
                f"compute_objective asks for {error}, which is not among the results of the "
                f"evaluation: {', '.join(self.metrics)}."
            ) from error
        values = found if isinstance(found, list | tuple) else [found]
        if len(values) != len(self._directions):
            raise ConfigurationError(
                f"compute_objective must return a number for each direction. Received: "
                f"{found!r:.100}, with direction={list(self._directions)!r}."
            )
        try:
            for value in values:
                float(value)
        except (TypeError, ValueError):
            raise ConfigurationError(
                "compute_objective must return a number, or one for each direction. "
                f"Received: {found!r:.100}."
            ) from None
        return values if len(values) > 1 else values[0]


# --- several processes ----------------------------------------------------------------------------


def _storage(optuna: Any, trainer: TrainerBase, settings: Settings) -> Any:
    """The storage of the study: a file in the output directory if several processes share it."""
    if settings.storage is not None or settings.n_jobs == 1:
        return settings.storage
    path = trainer.args.output_folder / "study.journal"
    path.parent.mkdir(parents=True, exist_ok=True)
    return _journal(optuna, str(path))


def _journal(optuna: Any, path: str) -> Any:
    journal = optuna.storages.journal
    return optuna.storages.JournalStorage(journal.JournalFileBackend(path))


def _start_worker(trainer: TrainerBase, study: Any, share: int) -> subprocess.Popen[bytes]:
    """Start this program again; when it reaches its search, it runs ``share`` trials."""
    folder = str(trainer.args.output_folder.resolve())
    order = {"study": study.study_name, "share": share, "output_dir": folder}
    environment = os.environ | {WORKER: json.dumps(order)}
    return subprocess.Popen([sys.executable, *sys.argv], env=environment)


def _work(optuna: Any, trainer: TrainerBase, settings: Settings, order: Mapping[str, Any]) -> None:
    """In a worker process: run its share of trials and exit the program."""
    folder = str(trainer.args.output_folder.resolve())
    if folder != order["output_dir"]:
        raise ConfigurationError(
            "A program can have one search with n_jobs > 1: a process started for the search in "
            f"{order['output_dir']} came to another one first, in {folder}."
        )
    storage = settings.storage or _journal(optuna, str(Path(folder) / "study.journal"))
    study = optuna.load_study(
        study_name=order["study"],
        storage=storage,
        sampler=settings.sampler,
        pruner=settings.pruner,
    )
    study.sampler.reseed_rng()  # otherwise all processes would try the same values
    _optimize(optuna, study, trainer, settings, int(order["share"]))
    raise SystemExit(0)
