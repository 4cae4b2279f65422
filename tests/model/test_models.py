"""Models of every kind: unbuilt, several inputs and outputs, losses of their own, model_init."""

import keras
import numpy as np
import pytest
from helpers import (
    arguments,
    batch_norm_model,
    fit,
    make_data,
    same,
    train_logs,
    weights,
    with_weights,
)

from kbtrain import Trainer


def mean_square(model, x, y):
    """The model's mean squared error in inference, in NumPy."""
    outputs = keras.ops.convert_to_numpy(model(x, training=False))
    return float(np.mean((outputs.astype(np.float64) - y) ** 2))


@keras.saving.register_keras_serializable(package="tests")
class Subclassed(keras.Model):
    """Unbuilt until it sees data; dropout that needs the training flag."""

    def __init__(self, dropout=0.0, **kwargs):
        super().__init__(**kwargs)
        self.hidden = keras.layers.Dense(4, kernel_initializer=keras.initializers.Constant(0.1))
        self.drop = keras.layers.Dropout(dropout, seed=1)
        self.out = keras.layers.Dense(1, kernel_initializer=keras.initializers.Constant(0.2))

    def call(self, x, training=None):
        return self.out(self.drop(self.hidden(x), training=training))


# --- kinds of models ------------------------------------------------------------------------------


def test_unbuilt_sequential(tmp_path):
    x, y = make_data(8)
    layer = keras.layers.Dense(1, kernel_initializer=keras.initializers.Constant(0.3))
    trainer = fit(keras.Sequential([layer]), arguments(tmp_path, max_steps=2), (x, y))
    expected = np.mean((0.3 * x.sum(1, keepdims=True) - y) ** 2)
    assert train_logs(trainer)[0] == pytest.approx(expected, rel=1e-6)
    assert layer.kernel.shape == (3, 1)


def test_unbuilt_subclass(tmp_path):
    x, y = make_data(8)
    trainer = fit(Subclassed(), arguments(tmp_path, max_steps=2), (x, y))
    expected = np.mean((0.08 * x.sum(1, keepdims=True) - y) ** 2)
    assert train_logs(trainer)[0] == pytest.approx(expected, rel=1e-6)


def two_input_model(inputs):
    flat = list(inputs.values()) if isinstance(inputs, dict) else inputs
    hidden = keras.layers.Concatenate()(flat)
    return with_weights(keras.Model(inputs, keras.layers.Dense(1, use_bias=False)(hidden)))


def test_several_inputs(tmp_path):
    x, y = make_data(8)
    other = x[:, :2] + 1
    model = two_input_model([keras.Input((3,)), keras.Input((2,))])
    expected = np.mean((np.hstack([x, other]) @ weights(model)[0] - y) ** 2)
    trainer = fit(model, arguments(tmp_path, max_steps=1), ((x, other), y))
    assert train_logs(trainer) == [pytest.approx(expected, rel=1e-6)]


@pytest.mark.parametrize("nested", [True, False])
def test_dict_inputs(tmp_path, nested):
    x, y = make_data(8)
    model = two_input_model({"a": keras.Input((3,), name="a"), "b": keras.Input((3,), name="b")})
    expected = np.mean((np.hstack([x, 2 * x]) @ weights(model)[0] - y) ** 2)
    columns = {"a": x, "b": 2 * x}
    data = (columns, y) if nested else columns | {"labels": y}
    trainer = fit(model, arguments(tmp_path, max_steps=1), data)
    assert train_logs(trainer) == [pytest.approx(expected, rel=1e-6)]


@pytest.mark.parametrize("kind", [dict, list])
def test_several_outputs(tmp_path, kind):
    x, y = make_data(8)
    inputs = keras.Input((3,))
    outputs = {
        "a": keras.layers.Dense(1, name="a")(inputs),
        "b": keras.layers.Dense(1, name="b")(inputs),
    }
    labels, loss = {"a": y, "b": 2 * y}, {"a": "mse", "b": "mae"}
    metrics = {"a": ["mae"], "b": ["mse"]}
    if kind is list:
        outputs, labels, loss = (list(t.values()) for t in (outputs, labels, loss))
        labels, metrics = tuple(labels), list(metrics.values())
    model = with_weights(keras.Model(inputs, outputs))
    (ka, ba), (kb, bb) = weights(model)[:2], weights(model)[2:]
    a, b = x @ ka + ba - y, x @ kb + bb - 2 * y
    trainer = fit(
        model,
        arguments(tmp_path, max_steps=1, learning_rate=0.0),
        (x, labels),
        loss=loss,
        metrics=metrics,
        eval_dataset=(x, labels),
    )
    (entry,) = (e for e in trainer.state.log_history if "loss" in e)
    assert entry["loss"] == pytest.approx(np.mean(a**2) + np.mean(np.abs(b)), rel=1e-6)
    assert entry["a_loss"] == pytest.approx(np.mean(a**2), rel=1e-6)
    assert entry["a_mae"] == pytest.approx(np.mean(np.abs(a)), rel=1e-6)
    assert entry["b_mse"] == pytest.approx(np.mean(b**2), rel=1e-6)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(entry["loss"], rel=1e-6)


def test_add_loss_and_regularizers(tmp_path):
    class WithLoss(keras.layers.Layer):
        def call(self, x):
            self.add_loss(0.5 * keras.ops.mean(x**2))
            return x

    x, y = make_data(8)
    inputs = keras.Input((3,))
    layer = keras.layers.Dense(1, kernel_regularizer=keras.regularizers.L1(0.1))
    model = with_weights(keras.Model(inputs, WithLoss()(layer(inputs))))
    kernel, bias = weights(model)
    outputs = x @ kernel + bias
    expected = np.mean((outputs - y) ** 2) + 0.5 * np.mean(outputs**2) + 0.1 * np.abs(kernel).sum()
    trainer = fit(
        model, arguments(tmp_path, max_steps=1, learning_rate=0.0), (x, y), eval_dataset=(x, y)
    )
    assert train_logs(trainer) == [pytest.approx(expected, rel=1e-6)]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)


def test_a_model_with_nothing_but_add_loss(tmp_path):
    class Own(keras.layers.Layer):
        def build(self, shape):
            self.w = self.add_weight(shape=(3,), initializer="ones")

        def call(self, x):
            self.add_loss(keras.ops.mean((x - self.w) ** 2))
            return x

    x, _ = make_data(8)
    model = keras.Sequential([keras.Input((3,)), Own()])
    trainer = fit(model, arguments(tmp_path, max_steps=1), x, loss=None, eval_dataset=x)
    assert train_logs(trainer) == [pytest.approx(np.mean((x - 1.0) ** 2), rel=1e-6)]
    assert trainer.evaluate()["eval_loss"] < train_logs(trainer)[0]


def test_a_model_that_returns_its_loss(tmp_path):
    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(1)

        def call(self, inputs):
            outputs = self.dense(inputs["x"])
            return {"loss": keras.ops.mean((outputs - inputs["target"]) ** 2), "logits": outputs}

    x, y = make_data(8)
    trainer = fit(
        Own(), arguments(tmp_path, max_steps=1, learning_rate=0.0), {"x": x, "target": y}, loss=None
    )
    kernel, bias = weights(trainer.model)
    assert train_logs(trainer) == [pytest.approx(np.mean((x @ kernel + bias - y) ** 2), rel=1e-6)]


def test_dropout_and_batch_norm_in_training_and_evaluation(tmp_path):
    x, y = make_data(8)
    model = batch_norm_model(dropout=0.5)
    trainer = fit(
        model, arguments(tmp_path, max_steps=1, learning_rate=0.0), (x, y), eval_dataset=(x, y)
    )
    inference = mean_square(model, x, y)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(inference, rel=1e-5)
    assert train_logs(trainer)[0] != pytest.approx(inference, rel=1e-3)
    kernel, bias = weights(batch_norm_model())[:2]
    hidden = x @ kernel + bias
    moving = {v.path.split("/")[-1]: keras.ops.convert_to_numpy(v.value) for v in model.variables}
    np.testing.assert_allclose(moving["moving_mean"], 0.3 * hidden.mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(moving["moving_variance"], 0.7 + 0.3 * hidden.var(0), rtol=1e-5)


def test_dropout_draws_anew_every_step_and_the_same_for_the_same_seed(tmp_path):
    data = (np.ones((8, 3), np.float32), np.zeros((8, 1), np.float32))

    def run():
        model = keras.Sequential(
            [
                keras.Input((3,)),
                keras.layers.Dropout(0.5, seed=3),
                keras.layers.Dense(1, kernel_initializer="ones"),
            ]
        )
        return train_logs(fit(model, arguments(tmp_path, max_steps=6, learning_rate=0.0), data))

    first = run()
    assert len(set(first)) > 3
    assert run() == first


# --- model_init -----------------------------------------------------------------------------------


def test_model_init_makes_a_new_equal_model_for_every_fit(tmp_path):
    def init():
        return keras.Sequential(
            [
                keras.Input((3,)),
                keras.layers.Dense(4),
                keras.layers.Dropout(0.5),
                keras.layers.Dense(1),
            ]
        )

    args = arguments(tmp_path, max_steps=3, seed=11)
    trainer = Trainer(args=args, model_init=init, train_dataset=make_data(8), loss="mse")
    trainer.fit()
    first, losses = trainer.model, train_logs(trainer)
    values = weights(first)
    trainer.fit()
    assert trainer.model is not first
    assert train_logs(trainer) == losses
    assert same(weights(trainer.model), values)
    other = Trainer(
        args=args.replace(seed=12), model_init=init, train_dataset=make_data(8), loss="mse"
    )
    other.fit()
    assert train_logs(other) != losses
