"""A custom optimizer, registered by name like one from a package, on every backend.

Run it with ``KERAS_BACKEND=jax python examples/custom_optimizer.py`` (or torch, or tensorflow).

Signed momentum (Bernstein et al. 2018, https://arxiv.org/abs/1802.04434) is written as a rule for
one variable; the base class turns it into a Keras optimizer with slots, weight decay and float32
arithmetic for low-precision weights. A package registers it in its ``pyproject.toml``::

    [project.entry-points."kbtrain.optimizers"]
    signum = "custom_optimizer:Signum"

This program is not a package, so it writes the metadata that ``pip install`` would write into a
temporary folder. After that, ``optim="signum"`` works like any other name, with ``optim_args``.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import keras
from keras import ops
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from kbtrain import Trainer, TrainingArguments
from optim import Optimizer


class Signum(Optimizer):
    """``m <- b m + (1 - b) g; p <- p - lr (sign(m) + decay p)``.

    Args:
        learning_rate: Step size.
        momentum: ``b``, between 0 and 1.
        weight_decay: Decoupled weight decay.
        **kwargs: Arguments of ``optim.Optimizer``.
    """

    def __init__(
        self,
        learning_rate: Any = 1e-3,
        momentum: float = 0.9,
        weight_decay: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(learning_rate=learning_rate, weight_decay=weight_decay, **kwargs)
        if not 0.0 <= momentum < 1.0:
            raise ValueError(f"momentum must be in [0, 1). Received: {momentum}.")
        self.momentum = momentum

    def slot_shapes(self, shape: tuple[int, ...]) -> dict[str, Any]:
        """One momentum slot per variable."""
        return {"momentum": shape}

    def update(
        self,
        parameter: Any,
        gradient: Any,
        slots: dict[str, Any],
        step: Any,
        learning_rate: Any,
        weight_decay: float,
    ) -> tuple[Any, dict[str, Any]]:
        """The update rule; everything is float32 here, whatever the variable's dtype."""
        momentum = self.momentum * slots["momentum"] + (1 - self.momentum) * gradient
        direction = ops.sign(momentum) + weight_decay * parameter
        return parameter - learning_rate * direction, {"momentum": momentum}

    def get_config(self) -> dict[str, Any]:
        """The arguments to recreate the optimizer."""
        return super().get_config() | {"momentum": self.momentum}


def register(folder: Path) -> None:
    """Write the metadata that ``pip install`` of a package with this file would write."""
    info = folder / "signum-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: signum\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[kbtrain.optimizers]\nsignum = custom_optimizer:Signum\n"
    )
    sys.path.insert(0, str(folder))


def main() -> None:
    """Train on handwritten digits, with the optimizer selected by name."""
    parser = argparse.ArgumentParser(description="Digits with a custom optimizer.")
    parser.add_argument("--output-dir", default="runs/signum")
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args()
    keras.utils.set_random_seed(0)
    digits = load_digits()
    x_train, x_test, y_train, y_test = train_test_split(
        (digits.data / 16).astype("float32"), digits.target, test_size=300, random_state=0
    )
    with tempfile.TemporaryDirectory() as folder:
        register(Path(folder))
        trainer = Trainer(
            keras.Sequential(
                [
                    keras.Input((64,)),
                    keras.layers.Dense(64, activation="relu"),
                    keras.layers.Dense(10),
                ]
            ),
            TrainingArguments(
                output_dir=options.output_dir,
                optim="signum",
                optim_args={"momentum": 0.95},
                learning_rate=1e-3,
                weight_decay=0.1,
                num_train_epochs=options.epochs,
                per_device_train_batch_size=32,
                save_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=(x_train, y_train),
            eval_dataset=(x_test, y_test),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=[keras.metrics.SparseCategoricalAccuracy(name="accuracy")],
        )
        trainer.fit()
    optimizer = type(trainer.optimizer).__name__
    print(f"{optimizer}: test accuracy {trainer.evaluate()['eval_accuracy']:.4f}")


if __name__ == "__main__":
    main()
