"""Regression on scikit-learn's diabetes data: a command line, custom metrics, result files.

Run it with ``KERAS_BACKEND=jax python examples/regression.py`` (or torch, or tensorflow); it needs
the extra ``examples``. ``--help`` lists all options of the model and of training.

There are ten measurements for each of 442 patients; the target is the progression of the disease
one year later. The test set is used once, at the end. For comparison there is a linear regression,
which is hard to beat on so few patients.
"""

from __future__ import annotations

import dataclasses
import sys

import keras
import numpy as np
from sklearn.datasets import load_diabetes
from sklearn.linear_model import LinearRegression
from sklearn.metrics import mean_absolute_error, r2_score
from sklearn.model_selection import train_test_split

from kbtrain import ArgumentParser, EvalPrediction, Trainer, TrainingArguments

DEFAULTS = [
    *("--output_dir", "runs/diabetes", "--num_train_epochs", "100"),
    *("--per_device_train_batch_size", "32", "--learning_rate", "3e-3", "--weight_decay", "0.1"),
    *("--lr_scheduler_type", "cosine", "--logging_strategy", "epoch", "--report_to", "csv"),
    *("--eval_strategy", "epoch", "--save_strategy", "epoch", "--save_total_limit", "1"),
    "--load_best_model_at_end",
]
"""Default options; those on the command line come later and override them."""


@dataclasses.dataclass
class ModelArguments:
    """Options of the model, in addition to those of training."""

    width: int = dataclasses.field(default=32, metadata={"help": "Units of each hidden layer."})
    dropout: float = dataclasses.field(default=0.3, metadata={"help": "Dropout rate."})


def make_model(width: int, dropout: float) -> keras.Model:
    """Two hidden layers; the output is in units of the target's standard deviation."""
    layers = [keras.Input((10,))]
    for _ in range(2):
        layers += [keras.layers.Dense(width, activation="gelu"), keras.layers.Dropout(dropout)]
    return keras.Sequential([*layers, keras.layers.Dense(1)])


def main(words: list[str]) -> dict[str, float]:
    """Train, evaluate on the test set, and write results, logs and a model card."""
    parser = ArgumentParser(ModelArguments, TrainingArguments)
    options, args = parser.parse_args([*DEFAULTS, *words])
    keras.utils.set_random_seed(args.seed)  # for the initial weights

    data = load_diabetes()
    x = (data.data / data.data.std(axis=0)).astype("float32")
    y = data.target.astype("float32")
    x_rest, x_test, y_rest, y_test = train_test_split(x, y, test_size=100, random_state=0)
    x_train, x_val, y_train, y_val = train_test_split(x_rest, y_rest, test_size=60, random_state=0)
    mean, deviation = y_train.mean(), y_train.std()

    def scaled(target: np.ndarray) -> np.ndarray:
        result: np.ndarray = ((target - mean) / deviation)[:, None]
        return result

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        """Called once per evaluation, with NumPy arrays of the whole set."""
        predicted = prediction.predictions * deviation + mean
        truth = prediction.label_ids * deviation + mean
        return {"r2": r2_score(truth, predicted), "mae": mean_absolute_error(truth, predicted)}

    trainer = Trainer(
        make_model(options.width, options.dropout),
        args,
        train_dataset=(x_train, scaled(y_train)),
        eval_dataset=(x_val, scaled(y_val)),
        loss="mse",
        compute_metrics=compute_metrics,
    )
    output = trainer.fit()
    trainer.save_metrics("train", output.metrics)
    test = trainer.predict((x_test, scaled(y_test))).metrics
    trainer.log_metrics("test", test)
    trainer.save_metrics("test", test)
    trainer.save_state()
    card = trainer.create_model_card(tags=["regression"])

    linear = LinearRegression().fit(x_rest, y_rest).predict(x_test)
    print(f"linear regression on the same patients: R2 {r2_score(y_test, linear):.3f}")
    print(f"network: R2 {test['test_r2']:.3f}, model card: {card}")
    return test


if __name__ == "__main__":
    main(sys.argv[1:])
