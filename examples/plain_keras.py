"""An optimizer and a schedule of ``optim`` in plain ``model.compile`` and ``model.fit``.

Run it with ``KERAS_BACKEND=jax python examples/plain_keras.py`` (or torch, or tensorflow). Nothing
here imports kbtrain; the digits come with scikit-learn.
"""

from __future__ import annotations

import argparse

import keras
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import optim


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="at its peak")
    parser.add_argument("--seed", type=int, default=42)
    return parser.parse_args()


def main() -> None:
    options = parse_args()
    keras.utils.set_random_seed(options.seed)
    digits = load_digits()
    x = (digits.data / 16.0).astype("float32")
    y = digits.target.astype("int32")
    x_train, x_test, y_train, y_test = train_test_split(
        x, y, test_size=300, stratify=y, random_state=0
    )

    model = keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(128, activation="relu"),
            keras.layers.Dropout(0.2),
            keras.layers.Dense(10),
        ]
    )
    steps = options.epochs * int(np.ceil(len(x_train) / options.batch_size))
    schedule = optim.CosineWithWarmup(
        options.learning_rate, num_warmup_steps=steps // 10, num_training_steps=steps
    )
    model.compile(
        optimizer=optim.AdamW(schedule, weight_decay=0.01),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    history = model.fit(
        x_train, y_train, batch_size=options.batch_size, epochs=options.epochs, verbose=0
    )
    test_loss, test_accuracy = model.evaluate(x_test, y_test, verbose=0)
    print(
        f"{steps} updates, training loss {history.history['loss'][-1]:.4f}, "
        f"test loss {test_loss:.4f}, test accuracy {test_accuracy:.4f}"
    )


if __name__ == "__main__":
    main()
