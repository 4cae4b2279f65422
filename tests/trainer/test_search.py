"""Hyperparameter search: values, folders, pruning, resuming, several processes, mistakes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import optuna
import pytest
from helpers import arguments
from helpers_regression import Line, regression_data, simulate
from optuna.trial import TrialState
from paths import SUPPORT

from kbtrain import Trainer, TrainerCallback
from kbtrain.errors import ConfigurationError
from kbtrain.trainer import search, search_plot

X, Y = regression_data(32)
RATES = [0.001, 0.1, 0.03]

optuna.logging.set_verbosity(optuna.logging.WARNING)


def make_trainer(folder, model_init=Line, **changes):
    given = {"callbacks": changes.pop("callbacks", None)}
    settings = {"num_train_epochs": 1, "logging_strategy": "no"} | changes
    return Trainer(
        args=arguments(folder, **settings),
        model_init=model_init,
        train_dataset=(X, Y),
        eval_dataset=(X, Y),
        loss="mse",
        **given,
    )


def rates(trial):
    return {"learning_rate": trial.suggest_float("learning_rate", 0.0001, 1.0)}


def grid(values=RATES):
    return optuna.samplers.GridSampler({"learning_rate": values}, seed=0)


def expected_loss(rate, epochs=1):
    """The evaluation loss of a run, from NumPy."""
    run = simulate(X, Y, rate=rate, epochs=epochs, batch_size=8)
    return float(np.mean((run["a"] * X + run["b"] - Y) ** 2))


class Watching(TrainerCallback):
    """Remembers the arguments and the trial of every training."""

    def __init__(self):
        self.seen = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.seen.append((args.learning_rate, args.output_dir, args.run_name, state))


def test_the_best_run_is_the_one_numpy_finds(tmp_path):
    watching = Watching()
    trainer = make_trainer(tmp_path, callbacks=[watching])
    best = trainer.hyperparameter_search(rates, n_trials=3, sampler=grid())
    losses = {rate: expected_loss(rate) for rate in RATES}
    assert best.hyperparameters == {"learning_rate": min(losses, key=losses.get)}
    np.testing.assert_allclose(best.objective, min(losses.values()), rtol=1e-4)
    assert sorted(rate for rate, *_ in watching.seen) == sorted(RATES)
    for number, (rate, folder, name, state) in enumerate(watching.seen):
        assert folder == str(tmp_path / f"run-{number}")
        assert name == f"run-{number}"
        assert state.is_hyper_param_search
        assert state.trial_params == {"learning_rate": rate}
    assert watching.seen[int(best.run_id)][0] == best.hyperparameters["learning_rate"]
    assert trainer.args.output_dir == str(tmp_path)
    assert trainer.args.learning_rate == 0.01


def test_a_study_is_resumed_until_it_has_its_trials(tmp_path):
    common = {
        "storage": f"sqlite:///{tmp_path}/study.db",
        "study_name": "s",
        "load_if_exists": True,
        "hp_name": lambda trial: f"named-{trial.number}",
    }
    watching = Watching()
    trainer = make_trainer(tmp_path, callbacks=[watching])
    trainer.hyperparameter_search(rates, n_trials=1, sampler=grid(), **common)
    with pytest.raises(ConfigurationError, match="load_if_exists=True"):
        trainer.hyperparameter_search(rates, **(common | {"load_if_exists": False}))
    trainer.hyperparameter_search(rates, n_trials=2, sampler=grid(), **common)
    best = trainer.hyperparameter_search(rates, n_trials=2, sampler=grid(), **common)
    assert [name for *_, name, _ in watching.seen] == ["named-0", "named-1"]
    tried = [rate for rate, *_ in watching.seen]
    assert len(set(tried)) == 2
    assert best.hyperparameters["learning_rate"] == min(tried, key=expected_loss)


def test_a_hopeless_trial_is_pruned(tmp_path):
    trainer = make_trainer(tmp_path, num_train_epochs=3, eval_strategy="epoch", learning_rate=0.1)
    limit = (expected_loss(0.1, epochs=3) + expected_loss(0.001)) / 2
    storage = optuna.storages.InMemoryStorage()
    best = trainer.hyperparameter_search(
        rates,
        n_trials=2,
        sampler=grid([0.001, 0.1]),
        pruner=optuna.pruners.ThresholdPruner(upper=limit, n_warmup_steps=5),
        storage=storage,
        study_name="s",
    )
    trials = optuna.load_study(study_name="s", storage=storage).trials
    states = {trial.params["learning_rate"]: trial for trial in trials}
    assert states[0.001].state is TrialState.PRUNED
    assert list(states[0.001].intermediate_values) == [4, 8]
    assert states[0.1].state is TrialState.COMPLETE
    assert list(states[0.1].intermediate_values) == [4, 8, 12]
    assert best.hyperparameters == {"learning_rate": 0.1}


def test_several_directions_give_a_front(tmp_path):
    best = make_trainer(tmp_path).hyperparameter_search(
        rates,
        lambda metrics: (metrics["eval_loss"], -metrics["eval_loss"]),
        n_trials=2,
        direction=["minimize", "minimize"],
        sampler=grid(),
    )
    assert [len(run.objective) for run in best] == [2, 2]


@pytest.mark.parametrize(
    ("direction", "found"),
    [("minimize", (0.1, 0.2)), (["minimize", "maximize"], 0.1), ("minimize", [])],
)
def test_objectives_and_directions_that_do_not_fit_end_the_first_trial(tmp_path, direction, found):
    trainer = make_trainer(tmp_path)
    steps = []
    with pytest.raises(ConfigurationError, match="a number for each direction. Received"):
        trainer.hyperparameter_search(
            rates,
            lambda metrics: steps.append(trainer.state.global_step) or found,
            n_trials=2,
            direction=direction,
            sampler=grid(),
        )
    assert len(steps) == 1


def test_the_model_may_depend_on_the_trial(tmp_path):
    made = []

    def model_init(trial=None):
        made.append(None if trial is None else trial.params["start"])
        return Line(a=made[-1] or 0.0)

    def space(trial):
        return {"start": trial.suggest_categorical("start", [2.0]), "max_steps": 1.0}

    trainer = make_trainer(tmp_path, model_init)
    best = trainer.hyperparameter_search(space, n_trials=1)
    assert made[0] is None
    assert set(made[1:]) == {2.0}
    assert best.hyperparameters == {"start": 2.0, "max_steps": 1.0}
    assert trainer.state.max_steps == 1


def test_the_default_space_is_that_of_the_reference():
    values = {
        "learning_rate": 1e-5,
        "num_train_epochs": 2,
        "seed": 7,
        "per_device_train_batch_size": 16,
    }
    trial = optuna.trial.FixedTrial(values)
    assert search.default_hp_space(trial) == values
    bounds = trial.distributions
    assert (bounds["learning_rate"].low, bounds["learning_rate"].high) == (1e-6, 1e-4)
    assert bounds["learning_rate"].log
    assert (bounds["num_train_epochs"].low, bounds["num_train_epochs"].high) == (1, 5)
    assert (bounds["seed"].low, bounds["seed"].high) == (1, 40)
    assert bounds["per_device_train_batch_size"].choices == (4, 8, 16, 32, 64)


SCRIPT = """
import json, sys
sys.path[:0] = {paths!r}
from test_search import make_trainer, rates
best = make_trainer({folder!r}).hyperparameter_search(rates, n_trials=3, n_jobs=2)
print("BEST", json.dumps([best.objective, best.hyperparameters]))
"""


def run_script(tmp_path, text):
    script = tmp_path / "script.py"
    script.write_text(text)
    return subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=300, env=os.environ
    )


@pytest.mark.slow
@pytest.mark.neutral
def test_trials_are_shared_by_processes(tmp_path):
    folder = str(tmp_path / "out")
    paths = [str(SUPPORT), str(Path(__file__).parent)]
    done = run_script(tmp_path, SCRIPT.format(paths=paths, folder=folder))
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("BEST")]
    objective, values = json.loads(line[5:])
    np.testing.assert_allclose(objective, expected_loss(values["learning_rate"]), rtol=1e-4)
    backend = optuna.storages.journal.JournalFileBackend(f"{folder}/study.journal")
    study = optuna.load_study(
        study_name=search.STUDY, storage=optuna.storages.JournalStorage(backend)
    )
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 3
    assert len({trial.params["learning_rate"] for trial in study.trials}) == 3
    assert study.best_value == objective
    assert sorted(path.name for path in Path(folder).glob("run-*")) == []  # nothing was saved


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"n_trials": 0}, "n_trials=0"),
        ({"n_jobs": 0}, "n_jobs=0"),
        ({"direction": "down"}, "'down'"),
        ({"direction": []}, "direction must be"),
        ({"backend": "ray"}, "'ray'"),
        ({"resume": True}, "no option 'resume'"),
    ],
)
def test_mistakes_in_the_call(tmp_path, changes, said):
    with pytest.raises(ConfigurationError, match=said):
        make_trainer(tmp_path).hyperparameter_search(rates, **changes)


def test_an_unknown_hyperparameter_is_no_use_without_a_model_that_takes_it(tmp_path):
    with pytest.raises(ConfigurationError, match=r"width.*model_init\(trial\)"):
        make_trainer(tmp_path).hyperparameter_search(
            lambda trial: {"width": trial.suggest_int("width", 1, 2)}, n_trials=1
        )


def test_an_objective_of_several_sets_waits_for_all_of_them(tmp_path):
    trainer = make_trainer(tmp_path, eval_strategy="epoch")
    trainer.eval_dataset = {"near": (X, Y), "far": (X, Y)}
    best = trainer.hyperparameter_search(
        rates,
        compute_objective=lambda metrics: metrics["eval_near_loss"] + metrics["eval_far_loss"],
        n_trials=1,
        sampler=grid(RATES[:1]),
    )
    assert best.objective == pytest.approx(2 * expected_loss(RATES[0]), rel=1e-4)


def test_an_objective_that_the_evaluation_does_not_give_is_named(tmp_path):
    with pytest.raises(ConfigurationError, match="asks for 'eval_f1'.*evaluation: eval_loss"):
        make_trainer(tmp_path).hyperparameter_search(
            rates, compute_objective=lambda metrics: metrics["eval_f1"], n_trials=1
        )


def test_a_search_needs_model_init_and_data_to_evaluate(tmp_path):
    trainer = Trainer(Line(), arguments(tmp_path), train_dataset=(X, Y), loss="mse")
    with pytest.raises(ConfigurationError, match="model_init"):
        trainer.hyperparameter_search(rates)
    trainer = make_trainer(tmp_path)
    trainer.eval_dataset = None
    with pytest.raises(ConfigurationError, match="eval_dataset"):
        trainer.hyperparameter_search(rates)


def test_several_processes_need_a_script_and_a_storage_they_can_open(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path)
    monkeypatch.setattr(sys, "argv", ["-c"])
    with pytest.raises(ConfigurationError, match="must be a script"):
        trainer.hyperparameter_search(rates, n_trials=2, n_jobs=2)
    monkeypatch.setattr(sys, "argv", [__file__])
    with pytest.raises(ConfigurationError, match="sqlite"):
        trainer.hyperparameter_search(
            rates, n_trials=2, n_jobs=2, storage=optuna.storages.InMemoryStorage()
        )


def test_without_optuna_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigurationError, match=r"kbtrain\[optuna\]"):
        make_trainer(tmp_path).hyperparameter_search(rates)


def test_all_trials_pruned_is_explained(tmp_path):
    trainer = make_trainer(tmp_path, eval_strategy="epoch")
    with pytest.raises(ConfigurationError, match="of 1, 1 were pruned, 0 failed.*another pruner"):
        trainer.hyperparameter_search(
            rates, n_trials=1, pruner=optuna.pruners.ThresholdPruner(upper=-1.0)
        )
    assert trainer.args.output_dir == str(tmp_path)


def test_objectives_that_are_no_numbers_are_not_called_pruned(tmp_path):
    trainer = make_trainer(tmp_path)
    with pytest.raises(ConfigurationError) as caught:
        trainer.hyperparameter_search(
            rates, n_trials=2, compute_objective=lambda metrics: float("nan")
        )
    assert "of 2, 0 were pruned, 2 failed" in str(caught.value)
    assert "NaN" in str(caught.value)
    assert "pruner" not in str(caught.value)


@pytest.mark.parametrize("given", [None, [("learning_rate", 0.1)], {1: 0.1}])
def test_hp_space_must_return_a_dict(tmp_path, given):
    trainer = make_trainer(tmp_path)
    with pytest.raises(ConfigurationError, match="hp_space must return a dict") as caught:
        trainer.hyperparameter_search(lambda trial: given, n_trials=1)
    assert ("is there a return?" in str(caught.value)) == (given is None)
    assert trainer.args.output_dir == str(tmp_path)


def test_a_picture_of_the_trials_and_of_what_mattered(tmp_path):
    def space(trial):
        return rates(trial) | {"weight_decay": trial.suggest_float("weight_decay", 0.0, 1e-6)}

    sampler = optuna.samplers.RandomSampler(seed=0)
    trainer = make_trainer(tmp_path)
    study = optuna.create_study(sampler=sampler)
    trainer.hyperparameter_search(space, n_trials=6, sampler=sampler)
    assert (tmp_path / "search.png").read_bytes().startswith(b"\x89PNG")

    def objective(trial):
        values = space(trial)
        return expected_loss(values["learning_rate"]) + values["weight_decay"]

    study.optimize(objective, n_trials=20)
    share = search_plot.importances(optuna, study)
    assert list(share) == ["learning_rate", "weight_decay"]
    assert share["learning_rate"] > 0.8
    assert sum(share.values()) == pytest.approx(1.0)


def test_a_picture_of_two_directions(tmp_path):
    study = optuna.create_study(directions=["minimize", "maximize"])
    study.optimize(lambda trial: (x := trial.suggest_float("x", 0, 1), x**2), n_trials=4)
    path = search_plot.save_plot(optuna, study, tmp_path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_no_picture_without_matplotlib_or_room(tmp_path, monkeypatch, caplog):
    study = optuna.create_study()
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=3)
    (tmp_path / "file").write_text("")
    assert search_plot.save_plot(optuna, study, tmp_path / "file" / "below") is None
    assert caplog.text.count("picture of the search could not be made") == 1
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert search_plot.save_plot(optuna, study, tmp_path) is None
    assert not (tmp_path / "search.png").exists()


def test_a_search_shows_its_trials_a_table_and_the_best_as_yaml(tmp_path, capsys):
    trainer = make_trainer(tmp_path, disable_tqdm=True)
    best = trainer.hyperparameter_search(rates, n_trials=3, sampler=grid())
    lines = capsys.readouterr().err.splitlines()
    head = next(line for line in lines if line.startswith("  trial"))
    assert head.split() == ["trial", "objective", "best", "learning_rate", "time"]
    rows = [line for line in lines if re.match(r" +[012]  ", line)]
    assert len(rows) == 6  # as they came, and in order
    marked = [line.split()[0] for line in rows if line.endswith("*")]
    assert marked[0] == "0"
    assert marked[-1] == best.run_id
    first = rows[3].split()
    assert first[0] == best.run_id
    assert first[1] == f"{best.objective:.4g}"
    assert "3 complete" in next(line for line in lines if line.startswith("Search "))
    start = lines.index(f"# trial {best.run_id}, the best one")
    assert lines[start + 1] == f"learning_rate: {best.hyperparameters['learning_rate']}"
    assert not any("Run run-" in line or "Finished" in line for line in lines)


def test_a_pruned_and_a_failed_trial_say_why(tmp_path, capsys):
    class Prune(optuna.pruners.BasePruner):
        def prune(self, study, trial):
            return trial.number == 1

    settings = {"eval_strategy": "steps", "eval_steps": 2, "disable_tqdm": True}
    make_trainer(tmp_path / "a", **settings).hyperparameter_search(
        rates, n_trials=2, sampler=grid(), pruner=Prune()
    )
    rows = [line.split() for line in capsys.readouterr().err.splitlines()]
    assert any("pruned" in row and row[-3:] == ["at", "step", "2"] for row in rows)

    def space(trial):
        if trial.number == 1:
            raise ValueError("no such rate")
        return rates(trial)

    with pytest.raises(ValueError, match="no such rate"):
        make_trainer(tmp_path / "b", disable_tqdm=True).hyperparameter_search(space, n_trials=2)
    rows = capsys.readouterr().err.splitlines()
    assert any("failed" in row and row.endswith("ValueError: no such rate") for row in rows)


def test_an_objective_that_is_no_number_is_explained(tmp_path):
    with pytest.raises(ConfigurationError, match=r"must return a number.*Received: None"):
        make_trainer(tmp_path, disable_tqdm=True).hyperparameter_search(
            rates, lambda metrics: None, n_trials=1
        )


def test_a_nan_is_not_the_best_objective(tmp_path, capsys):
    objectives = iter([float("nan"), 2.0])
    make_trainer(tmp_path, disable_tqdm=True).hyperparameter_search(
        rates, lambda metrics: next(objectives), n_trials=2, sampler=grid()
    )
    live = capsys.readouterr().err.partition("\nSearch ")[0].splitlines()
    rows = {line.split()[0]: line for line in live if line.split()[:1] in (["0"], ["1"])}
    assert not rows["0"].endswith("*")
    assert rows["1"].endswith("*")


def test_a_trial_that_diverges_has_failed_and_the_search_goes_on(tmp_path, capsys):
    trainer = make_trainer(tmp_path, disable_tqdm=True, num_train_epochs=20)
    choices = [1e30, 0.01]

    def space(trial):
        return {"learning_rate": trial.suggest_categorical("learning_rate", choices)}

    best = trainer.hyperparameter_search(space, n_trials=2, sampler=grid(choices))
    assert best.hyperparameters == {"learning_rate": 0.01}
    said = capsys.readouterr().err
    assert any("failed" in row and "NonFiniteError" in row for row in said.splitlines())
    assert "Traceback" not in said
