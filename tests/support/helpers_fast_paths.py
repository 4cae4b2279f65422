"""Models of many kinds, with their data, that the fast ways of running a step are tried on."""

import keras
import numpy as np
from helpers import arguments, make_data, with_weights
from keras import layers

from kbtrain import Trainer, TrainerCallback


class EveryStep(TrainerCallback):
    """Listens to each update, so each is a call of its own."""

    def __init__(self):
        self.steps = []

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append(state.global_step)


def small_gpt(length=8, width=16):
    tokens = keras.Input((length,), dtype="int32")
    h = layers.Embedding(11, width)(tokens)
    a = layers.LayerNormalization()(h)
    h = h + layers.MultiHeadAttention(2, width // 2)(a, a, use_causal_mask=True)
    h = h + layers.Dense(width, activation="gelu")(layers.LayerNormalization()(h))
    return with_weights(keras.Model(tokens, layers.Dense(11)(h)), scale=0.2)


def convnet():
    inputs = keras.Input((6, 6, 2))
    h = layers.BatchNormalization()(layers.Conv2D(4, 3)(inputs))
    h = layers.MaxPooling2D()(layers.ReLU()(h))
    return with_weights(keras.Model(inputs, layers.Dense(3)(layers.Flatten()(h))), scale=0.2)


def batch_norm_dropout():
    """Without a seed of its own: torch draws from its global generator then."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((3,))
    h = layers.BatchNormalization()(layers.Dense(6, activation="tanh")(inputs))
    return with_weights(keras.Model(inputs, layers.Dense(1)(layers.Dropout(0.3)(h))))


def seeded_noise():
    """Draws from seed generators, in the ways that Keras layers use them."""
    inputs = keras.Input((6, 6, 2))
    h = layers.GaussianNoise(0.1, seed=2)(layers.RandomFlip(seed=1)(inputs))
    h = layers.SpatialDropout2D(0.2, seed=4)(layers.Dropout(0.2, seed=3)(h))
    return with_weights(keras.Model(inputs, layers.Dense(3)(layers.Flatten()(h))), scale=0.2)


def batch_norms():
    """Batch normalisation: axes, ranks, without scale or offset, frozen."""
    inputs = keras.Input((6, 6, 2))
    h = layers.BatchNormalization(axis=1, momentum=0.8)(inputs)
    h = layers.BatchNormalization(scale=False, epsilon=1e-5)(layers.Reshape((12, 6))(h))
    frozen = layers.BatchNormalization(center=False)
    frozen.trainable = False
    h = frozen(layers.Conv1D(4, 3, activation="tanh")(h))
    return with_weights(keras.Model(inputs, layers.Dense(3)(layers.Flatten()(h))), scale=0.2)


def tokens(samples=24):
    generator = np.random.default_rng(5)
    return tuple(generator.integers(0, 11, (samples, 8)) for _ in range(2))


def images(samples=24):
    generator = np.random.default_rng(6)
    x = generator.normal(size=(samples, 6, 6, 2)).astype("float32")
    return x, generator.integers(0, 3, samples)


CASES = {
    "dense, batch norm, dropout": (
        batch_norm_dropout,
        lambda: make_data(24),
        "mse",
        ["mae"],
    ),
    "attention": (
        small_gpt,
        tokens,
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        ["accuracy"],
    ),
    "convolution": (
        convnet,
        images,
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        ["accuracy"],
    ),
    "seeded noise": (
        seeded_noise,
        images,
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        ["accuracy"],
    ),
    "batch norms": (
        batch_norms,
        images,
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        ["accuracy"],
    ),
}


def train(case, folder, callbacks=(), **changes):
    make, data, loss, metrics = CASES[case]
    settings = {
        "per_device_train_batch_size": 4,
        "num_train_epochs": 4,
        "train_sampling_strategy": "random",
        "lr_scheduler_type": "cosine",
        "warmup_steps": 3,
        "weight_decay": 0.1,
    }
    trainer = Trainer(
        make(),
        arguments(folder, **(settings | changes)),
        train_dataset=data(),
        loss=loss,
        metrics=metrics,
        callbacks=list(callbacks),
    )
    trainer.fit()
    return trainer
