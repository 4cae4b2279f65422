"""Train a small ConvNet on handwritten digits, on any backend.

Run it with ``KERAS_BACKEND=jax python examples/quickstart.py`` (or torch, or tensorflow). The data,
1,797 real images of 8x8 pixels, comes with scikit-learn: nothing is downloaded.

The images are split into three sets. The model is trained on the training set; after each epoch the
validation set decides which weights are best and when to stop; the test set is used once, at the
end.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import kbtrain  # noqa: F401  (before Keras: without the messages of TensorFlow's start)

if __name__ == "__main__":
    print("importing Keras and its backend takes some seconds", flush=True)

# ruff: noqa: E402
# isort: split

from rich.console import Console

with Console().status("importing"):  # moves on a terminal, and shows nothing elsewhere
    import keras
    import numpy as np
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    from kbtrain import EarlyStoppingCallback, Trainer, TrainingArguments, plot_history

Arrays = tuple[np.ndarray, np.ndarray]


def load_data() -> tuple[Arrays, Arrays, Arrays]:
    """Training, validation and test set: images (n, 8, 8, 1) in [0, 1] and labels (n,).

    The split is always the same, so that runs with different seeds can be compared.
    """
    digits = load_digits()
    images = (digits.images[..., None] / 16.0).astype("float32")
    labels = digits.target.astype("int32")
    rest, test, rest_labels, test_labels = train_test_split(
        images, labels, test_size=300, stratify=labels, random_state=0
    )
    train, val, train_labels, val_labels = train_test_split(
        rest, rest_labels, test_size=200, stratify=rest_labels, random_state=0
    )
    return (train, train_labels), (val, val_labels), (test, test_labels)


def make_model() -> keras.Model:
    """Two convolutional blocks and a linear layer; the outputs are logits."""
    layers: list[Any] = [keras.Input((8, 8, 1))]
    for filters in (32, 64):
        layers += [
            keras.layers.Conv2D(filters, 3, padding="same", use_bias=False),
            # With 21 updates per epoch, Keras' default momentum of 0.99 would lag 5 epochs behind.
            keras.layers.BatchNormalization(momentum=0.9),
            keras.layers.Activation("relu"),
            keras.layers.MaxPooling2D(2),
            keras.layers.Dropout(0.25),
        ]
    return keras.Sequential([*layers, keras.layers.Flatten(), keras.layers.Dense(10)])


def history_rows(log_history: list[dict[str, Any]]) -> list[dict[str, float]]:
    """One row per epoch from the trainer's log: training and validation loss and accuracy."""
    rows: dict[int, dict[str, float]] = {}
    for entry in log_history:
        row = rows.setdefault(entry["step"], {"epoch": entry["epoch"], "step": entry["step"]})
        row.update({name: value for name, value in entry.items() if name not in row})
    return [row for row in rows.values() if "loss" in row and "eval_loss" in row]


def print_table(rows: list[dict[str, float]], best_step: int | None) -> None:
    """Print one line per epoch, with a mark at the best one."""
    print(f"\n{'epoch':>5}  {'train loss':>10}  {'val. loss':>9}  {'val. accuracy':>13}")
    for row in rows:
        mark = "  <- best" if row["step"] == best_step else ""
        print(
            f"{row['epoch']:>5.0f}  {row['loss']:>10.4f}  {row['eval_loss']:>9.4f}"
            f"  {row['eval_accuracy']:>13.4f}{mark}"
        )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", default="runs/quickstart", help="checkpoints and the plot")
    parser.add_argument("--epochs", type=int, default=20, help="passes over the data, at most")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="at its peak")
    parser.add_argument("--patience", type=int, default=5, help="epochs without improvement")
    parser.add_argument("--seed", type=int, default=42, help="for weights, dropout and data order")
    return parser.parse_args()


def main() -> None:
    options = parse_args()
    start = time.perf_counter()
    keras.utils.set_random_seed(options.seed)
    train, val, test = load_data()
    trainer = Trainer(
        model=make_model(),
        args=TrainingArguments(
            output_dir=options.output_dir,
            num_train_epochs=options.epochs,
            per_device_train_batch_size=options.batch_size,
            per_device_eval_batch_size=256,
            learning_rate=options.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.1,
            weight_decay=0.01,
            logging_strategy="epoch",
            eval_strategy="epoch",
            save_strategy="epoch",
            save_total_limit=2,
            load_best_model_at_end=True,
            metric_for_best_model="loss",
            seed=options.seed,
        ),
        train_dataset=train,
        eval_dataset=val,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=[keras.metrics.SparseCategoricalAccuracy(name="accuracy")],
        callbacks=[EarlyStoppingCallback(early_stopping_patience=options.patience)],
    )
    backend, device = trainer.backend.name, trainer.backend.device_info()
    print(f"backend {backend}, device {device}, {len(train[0])} training images")

    result = trainer.fit()
    rows = history_rows(trainer.state.log_history)
    best_step = trainer.state.best_global_step
    metrics = trainer.predict(test).metrics

    print_table(rows, best_step)
    plot = Path(options.output_dir) / "history.png"
    plot_history(trainer, plot, f"Digits, Keras on {backend}")
    model_file = trainer.save_model(Path(options.output_dir) / "digits.keras")
    print(
        f"\ntest accuracy {metrics['test_accuracy']:.4f}, test loss {metrics['test_loss']:.4f} "
        f"({len(test[0])} images, never used before)\n"
        f"{result.global_step} updates, {time.perf_counter() - start:.1f} s on {backend}\n"
        f"model {model_file}, plot {plot}"
    )


if __name__ == "__main__":
    main()
