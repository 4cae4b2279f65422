"""NEFTune: the noise is what the formula says, in training only, and resumes exactly."""

import math

import keras
import numpy as np
import pytest
from helpers import StopAt, arguments, same, weights, with_weights
from keras import ops

from kbtrain import Trainer
from kbtrain.errors import ConfigurationError

LENGTH, WIDTH, ALPHA = 20, 16, 3.0
GENERATOR = np.random.default_rng(0)
TOKENS = GENERATOR.integers(0, 5, size=(12, LENGTH)).astype("int32")
TARGETS = GENERATOR.normal(size=(12, 1)).astype("float32")


class Tied(keras.layers.Embedding):
    """Like KerasHub's: with ``reverse`` it is the output layer."""

    def call(self, inputs, reverse=False):
        if reverse:
            return ops.matmul(inputs, ops.transpose(self.embeddings))
        return super().call(inputs)

    def compute_output_spec(self, inputs, reverse=False):
        width = self.input_dim if reverse else self.output_dim
        shape = inputs.shape[:-1] if reverse else inputs.shape
        return keras.KerasTensor((*shape, width), self.compute_dtype)


def the_size(outputs, labels):
    """The loss and two values by which to know a uniform distribution."""
    extras = {"largest": ops.max(ops.abs(outputs)), "first": ops.mean(ops.abs(outputs))}
    return ops.mean(ops.square(outputs)), extras


def test_the_noise_has_the_size_of_the_formula_and_is_gone_afterwards(tmp_path):
    inputs = keras.Input((LENGTH,), dtype="int32")
    embedding = keras.layers.Embedding(5, WIDTH, embeddings_initializer="zeros")
    model = keras.Model(inputs, embedding(inputs))
    args = arguments(tmp_path, learning_rate=0.0, max_steps=2, per_device_train_batch_size=12,
                     eval_strategy="steps", eval_steps=1, neftune_noise_alpha=ALPHA)  # fmt: skip
    trainer = Trainer(model, args, train_dataset=(TOKENS, TARGETS), eval_dataset=(TOKENS, TARGETS),
                      compute_loss_func=the_size)  # fmt: skip
    trainer.fit()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    largest = ALPHA / math.sqrt(LENGTH * WIDTH)
    for entry in logs:
        assert 0.99 * largest < entry["largest"] <= largest * (1 + 1e-6)
        assert entry["loss"] == pytest.approx(largest**2 / 3, rel=0.05)
        assert entry["first"] == pytest.approx(largest / 2, rel=0.05)
    assert logs[0]["loss"] != logs[1]["loss"]
    assert [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e] == [0.0, 0.0]
    assert "call" not in vars(embedding)
    assert not np.any(keras.ops.convert_to_numpy(model(TOKENS, training=True)))


def tied_model():
    embedding = Tied(5, 4)
    inputs = keras.Input((LENGTH,), dtype="int32")
    hidden = keras.layers.Dropout(0.2, seed=3)(embedding(inputs))
    outputs = keras.layers.GlobalAveragePooling1D()(embedding(hidden, reverse=True))
    return with_weights(keras.Model(inputs, keras.layers.Dense(1)(outputs)))


def run(path, alpha=ALPHA, callbacks=(), resume=None, **changes):
    args = arguments(path, max_steps=4, per_device_train_batch_size=4, neftune_noise_alpha=alpha,
                     save_strategy="steps", save_steps=2, **changes)  # fmt: skip
    trainer = Trainer(tied_model(), args, train_dataset=(TOKENS, TARGETS), loss="mse",
                      callbacks=list(callbacks))  # fmt: skip
    trainer.fit(resume)
    return weights(trainer.model)


def test_a_resumed_run_draws_the_same_noise(tmp_path):
    whole = run(tmp_path / "whole")
    run(tmp_path / "part", callbacks=[StopAt(2)])
    keras.utils.set_random_seed(99)
    assert same(run(tmp_path / "part", resume=True), whole)
    assert not same(run(tmp_path / "quiet", alpha=None), whole)


def test_a_model_without_embeddings(tmp_path):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    trainer = Trainer(model, arguments(tmp_path, neftune_noise_alpha=5), loss="mse",
                      train_dataset=(np.zeros((4, 2)), np.zeros((4, 1))))  # fmt: skip
    with pytest.raises(ConfigurationError, match=r"needs a keras\.layers\.Embedding"):
        trainer.fit()
