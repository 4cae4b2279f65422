"""Search for hyperparameters with Optuna, with unpromising trials pruned.

Run it with ``KERAS_BACKEND=jax python examples/hyperparameter_search.py`` (or torch, tensorflow);
it needs the extras ``examples`` and ``optuna``. ``--n-jobs 2`` runs trials in two processes.
``--resume`` continues the study that an earlier run has written to the output directory.

The search only uses the training and the validation set. The test set is used once, at the end, for
the accuracy of the best model.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import keras
import optuna
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from kbtrain import Trainer, TrainingArguments


def model_init(trial: Any) -> keras.Model:
    """A model with the trial's width, or the default one without a trial."""
    return make_model(64 if trial is None else trial.params["width"])


def make_model(width: int) -> keras.Model:
    """One hidden layer; the outputs are logits."""
    return keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(width, activation="relu"),
            keras.layers.Dense(10),
        ]
    )


def hp_space(trial: Any) -> dict[str, Any]:
    """The search space. ``width`` is not a training argument: ``model_init`` uses it."""
    return {
        "learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-1, log=True),
        "weight_decay": trial.suggest_float("weight_decay", 1e-3, 1.0, log=True),
        "per_device_train_batch_size": trial.suggest_categorical("batch_size", [16, 32, 64]),
        "width": trial.suggest_categorical("width", [16, 64, 128]),
    }


def main() -> None:
    """Search, then train again with the best hyperparameters."""
    parser = argparse.ArgumentParser(description="Hyperparameter search on handwritten digits.")
    parser.add_argument("--output-dir", default="runs/search")
    parser.add_argument("--n-trials", type=int, default=20)
    parser.add_argument("--n-jobs", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()

    digits = load_digits()
    images = (digits.data / 16).astype("float32")
    rest, test, rest_labels, test_labels = train_test_split(
        images, digits.target, test_size=300, random_state=0
    )
    train, val, train_labels, val_labels = train_test_split(
        rest, rest_labels, test_size=300, random_state=0
    )
    args = TrainingArguments(
        output_dir=options.output_dir,
        num_train_epochs=options.epochs,
        lr_scheduler_type="cosine",
        eval_strategy="epoch",
        save_strategy="no",
    )

    def make_trainer(args: TrainingArguments, init: Any) -> Trainer:
        return Trainer(
            args=args,
            model_init=init,
            train_dataset=(train, train_labels),
            eval_dataset=(val, val_labels),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=[keras.metrics.SparseCategoricalAccuracy(name="accuracy")],
        )

    # In the worker processes of n_jobs, this call does not return.
    Path(options.output_dir).mkdir(parents=True, exist_ok=True)
    best = make_trainer(args, model_init).hyperparameter_search(
        hp_space,
        lambda metrics: metrics["eval_accuracy"],
        n_trials=options.n_trials,
        direction="maximize",
        n_jobs=options.n_jobs,
        sampler=optuna.samplers.TPESampler(seed=0),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=5),
        storage=f"sqlite:///{options.output_dir}/study.db",
        study_name="digits",
        load_if_exists=options.resume,
    )
    assert not isinstance(best, list)
    print(f"best: run {best.run_id}, accuracy {best.objective:.4f}, {best.hyperparameters}")

    chosen = dict(best.hyperparameters)
    width = chosen.pop("width")
    winner = make_trainer(args.replace(**chosen), lambda: make_model(width))
    winner.fit()
    print(f"test accuracy: {winner.predict((test, test_labels)).metrics['test_accuracy']:.4f}")


if __name__ == "__main__":
    main()
