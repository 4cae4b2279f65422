"""Classify images with augmentation inside the model and averaged weights (EMA).

Run it with ``KERAS_BACKEND=jax python examples/image_classification.py`` (or torch, or tensorflow);
it needs the extra ``examples``. ``--help`` lists all options. The images, handwritten digits of 8x8
pixels, come with scikit-learn: nothing is downloaded.

There are only 300 training images, so augmentation matters: try ``--augment 0``. The learning rate
stays high to the end, so the weights keep moving. Their average moves less, and every evaluation
uses it. For comparison, the training weights are evaluated too.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import keras
from keras import layers
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from kbtrain import ArgumentParser, Trainer, TrainerCallback, TrainingArguments

DEFAULTS = [
    *("--output_dir", "runs/images", "--max_steps", "600", "--per_device_train_batch_size", "32"),
    *("--learning_rate", "1e-2", "--lr_scheduler_type", "constant_with_warmup"),
    *("--warmup_steps", "30", "--weight_decay", "0.05", "--per_device_eval_batch_size", "256"),
    *("--eval_strategy", "steps", "--eval_steps", "0.2", "--logging_steps", "0.2"),
    *("--save_strategy", "no", "--ema", '{"decay": 0.99}'),
]
"""Default options; those on the command line come later and override them."""


@dataclasses.dataclass
class ModelArguments:
    """Options of the model, in addition to those of training."""

    width: int = dataclasses.field(default=32, metadata={"help": "Filters of the first block."})
    augment: float = dataclasses.field(
        default=0.13, metadata={"help": "Largest shift, as a fraction of the image size."}
    )


def make_model(width: int, augment: float) -> keras.Model:
    """A small ConvNet; its first layers augment the images, in training only."""
    model = keras.Sequential([keras.Input((8, 8, 1))])
    if augment > 0:
        # Part of the model: it runs on the device in the compiled step and is saved with the model.
        # A checkpoint has its random state, so a resumed run draws the same augmentation.
        model.add(
            layers.RandomTranslation(
                augment, augment, fill_mode="constant", interpolation="nearest"
            )
        )
    for filters in (width, 2 * width):
        model.add(layers.Conv2D(filters, 3, padding="same", use_bias=False))
        model.add(layers.BatchNormalization(momentum=0.9))
        model.add(layers.Activation("relu"))
        model.add(layers.MaxPooling2D(2))
    model.add(layers.Flatten())
    model.add(layers.Dropout(0.3))
    model.add(layers.Dense(10))
    return model


class KeepTrained(TrainerCallback):
    """Keeps the training weights, because after ``fit`` the model holds their average."""

    def on_evaluate(self, args: object, state: object, control: object, **kwargs: Any) -> None:
        """Copy the weights; the evaluation has already swapped the training weights back."""
        self.weights = kwargs["model"].get_weights()


def main(words: list[str]) -> None:
    """Train, and evaluate both the averaged weights and the training weights."""
    parser = ArgumentParser(ModelArguments, TrainingArguments, description=__doc__.splitlines()[0])
    options, args = parser.parse_args([*DEFAULTS, *words])
    keras.utils.set_random_seed(args.seed)
    digits = load_digits()
    x_train, x_test, y_train, y_test = train_test_split(
        (digits.images[..., None] / 16).astype("float32"),
        digits.target,
        train_size=300,
        stratify=digits.target,
        random_state=0,
    )
    kept = KeepTrained()
    trainer = Trainer(
        make_model(options.width, options.augment),
        args,
        train_dataset=(x_train, y_train),
        eval_dataset=(x_test, y_test),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=[keras.metrics.SparseCategoricalAccuracy(name="accuracy")],
        callbacks=[kept],
    )
    output = trainer.fit()
    in_training = kept.weights
    averaged = trainer.evaluate()
    file = trainer.save_model(Path(args.output_dir) / "digits.keras")
    trainer.model.set_weights(in_training)
    trained = trainer.evaluate()
    print(f"{output.global_step} updates on {trainer.backend.name}, {len(x_test)} test images")
    for name, metrics in (("averaged weights", averaged), ("training weights", trained)):
        print(
            f"{name:>20}: accuracy {metrics['eval_accuracy']:.4f}, loss {metrics['eval_loss']:.4f}"
        )
    print(f"averaged model: {file}")


if __name__ == "__main__":
    main(sys.argv[1:])
