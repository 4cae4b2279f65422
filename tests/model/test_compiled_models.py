"""Compiled models: what they bring, and what is given in its place."""

import keras
import numpy as np
import pytest
from helpers import (
    arguments,
    fit,
    linear_model,
    make_data,
    train_logs,
    weights,
    with_weights,
)

from kbtrain import Trainer


def mean_square(model, x, y):
    """The model's mean squared error in inference, in NumPy."""
    outputs = keras.ops.convert_to_numpy(model(x, training=False))
    return float(np.mean((outputs.astype(np.float64) - y) ** 2))


def test_a_compiled_model_brings_everything(tmp_path):
    x, y = make_data(8)
    model = linear_model(use_bias=False)
    model.compile(optimizer=keras.optimizers.SGD(0.1), loss="mse", metrics=["mae"])
    kernel = weights(model)[0]
    trainer = Trainer(
        model,
        arguments(tmp_path, max_steps=1, max_grad_norm=0, learning_rate=0.2),
        train_dataset=(x, y),
        eval_dataset=(x, y),
    )
    trainer.fit()  # with the optimizer of compile, and the rate that was set
    error = x @ kernel - y
    (entry,) = (e for e in trainer.state.log_history if "loss" in e)
    assert entry["loss"] == pytest.approx(np.mean(error**2), rel=1e-6)
    assert entry["mae"] == pytest.approx(np.mean(np.abs(error)), rel=1e-6)
    assert entry["learning_rate"] == pytest.approx(0.2)
    assert trainer.optimizer is model.optimizer
    np.testing.assert_allclose(weights(model)[0], kernel - 0.2 * 2 * x.T @ error / 8, rtol=1e-5)
    assert "eval_mae" in trainer.evaluate()


def test_what_is_given_wins_over_what_was_compiled(tmp_path):
    x, y = make_data(8)
    model = linear_model()
    model.compile(optimizer=keras.optimizers.SGD(0.1), loss="mse", metrics=["mae"])
    kernel, bias = weights(model)
    trainer = fit(
        model,
        arguments(tmp_path, max_steps=1),
        (x, y),
        loss="mae",
        metrics=["mse"],
        optimizers=(keras.optimizers.Adam(0.5), None),
    )
    (entry,) = (e for e in trainer.state.log_history if "loss" in e)
    assert entry["loss"] == pytest.approx(np.mean(np.abs(x @ kernel + bias - y)), rel=1e-6)
    assert "mse" in entry
    assert "mae" not in entry
    assert entry["learning_rate"] == 0.5


def test_loss_weights_of_a_compiled_model(tmp_path):
    x, y = make_data(8)
    inputs = keras.Input((3,))
    model = with_weights(
        keras.Model(
            inputs,
            {
                "a": keras.layers.Dense(1, name="a")(inputs),
                "b": keras.layers.Dense(1, name="b")(inputs),
            },
        )
    )
    model.compile(
        loss={"a": "mse", "b": "mse"}, loss_weights={"a": 1.0, "b": 0.25}, optimizer="sgd"
    )
    outputs = {k: keras.ops.convert_to_numpy(v) for k, v in model(x).items()}
    expected = np.mean((outputs["a"] - y) ** 2) + 0.25 * np.mean((outputs["b"] - y) ** 2)
    trainer = fit(model, arguments(tmp_path, max_steps=1), (x, {"a": y, "b": y}), loss=None)
    assert train_logs(trainer) == [pytest.approx(expected, rel=1e-6)]


def test_weights_come_back_after_fit_for_plain_keras(tmp_path):
    """After kbtrain has trained a compiled model, Keras' own methods go on from there."""
    x, y = make_data(8)
    model = linear_model()
    model.compile(optimizer=keras.optimizers.SGD(0.1), loss="mse", jit_compile=False)
    fit(model, arguments(tmp_path, max_steps=2), (x, y), loss=None)
    assert model.evaluate(x, y, verbose=0) == pytest.approx(mean_square(model, x, y), rel=1e-5)
    model.fit(x, y, verbose=0, epochs=1)
    assert int(keras.ops.convert_to_numpy(model.optimizer.iterations.value)) == 3
