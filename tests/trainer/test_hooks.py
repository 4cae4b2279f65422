"""Overridden hooks of the Trainer: the loss, optimizers, loaders."""

import keras
import numpy as np
import pytest
from helpers import (
    arguments,
    batch_norm_model,
    fit,
    linear_model,
    make_data,
    train_logs,
    weights,
)

from kbtrain import ConfigurationError, Trainer


def mean_square(model, x, y):
    """The model's mean squared error in inference, in NumPy."""
    outputs = keras.ops.convert_to_numpy(model(x, training=False))
    return float(np.mean((outputs.astype(np.float64) - y) ** 2))


def test_compute_loss_can_be_overridden(tmp_path):
    class Own(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            x, y = inputs
            outputs = model(x)
            loss = keras.ops.mean(keras.ops.abs(outputs - y))
            return (loss, outputs) if return_outputs else loss

    x, y = make_data(8)
    model = linear_model()
    kernel, bias = weights(model)
    trainer = Own(
        model,
        arguments(tmp_path, max_steps=1, learning_rate=0.0),
        train_dataset=(x, y),
        eval_dataset=(x, y),
        metrics=["mse"],
    )
    trainer.fit()
    error = x @ kernel + bias - y
    assert train_logs(trainer) == [pytest.approx(np.mean(np.abs(error)), rel=1e-6)]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(np.mean(np.abs(error)), rel=1e-6)
    assert train_logs(trainer, "mse") == [pytest.approx(np.mean(error**2), rel=1e-6)]


def test_compute_loss_as_it_is_written_for_the_reference(tmp_path):
    """It takes labels and inputs out of the batch by name, and hands a start_time on."""

    class Own(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            y = inputs.pop("labels")
            outputs = model(inputs["features"])
            loss = keras.ops.mean(inputs["weight"] * keras.ops.square(outputs - y))
            return (loss, outputs) if return_outputs else loss

        def log(self, logs, start_time=None):
            super().log(logs | {"mine": 1.0}, start_time)

    x, y = make_data(8)
    weight = np.linspace(0.0, 1.0, 8, dtype="float32")[:, None]
    columns = {"features": x, "weight": weight, "labels": y}
    data = [{name: column[i] for name, column in columns.items()} for i in range(8)]
    model = linear_model()
    kernel, bias = weights(model)
    given = {"train_dataset": data, "eval_dataset": data}
    settings = {"learning_rate": 0.0, "remove_unused_columns": False}
    trainer = Own(model, arguments(tmp_path, max_steps=2, **settings), **given)
    trainer.fit()
    expected = np.mean(weight * (x @ kernel + bias - y) ** 2)
    assert train_logs(trainer) == [pytest.approx(expected, rel=1e-5)] * 2
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert all(entry["mine"] == 1.0 for entry in trainer.state.log_history)


def test_compute_loss_can_build_on_the_default(tmp_path):
    class Own(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            pair, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            pair = pair._replace(sum=2.0 * pair.sum)
            return (pair, outputs) if return_outputs else pair

    data = make_data(8)
    plain = fit(linear_model(), arguments(tmp_path, max_steps=1), data)
    own = Own(linear_model(), arguments(tmp_path, max_steps=1), train_dataset=data, loss="mse")
    own.fit()
    assert train_logs(own)[0] == pytest.approx(2 * train_logs(plain)[0], rel=1e-6)


def test_a_model_called_in_compute_loss_knows_that_it_trains(tmp_path):
    class Own(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(inputs[0])  # no training flag
            loss = keras.ops.mean((outputs - inputs[1]) ** 2)
            return (loss, outputs) if return_outputs else loss

    x, y = make_data(8)
    trainer = Own(
        batch_norm_model(dropout=0.5),
        arguments(tmp_path, max_steps=1, learning_rate=0.0),
        train_dataset=(x, y),
        eval_dataset=(x, y),
    )
    trainer.fit()
    inference = mean_square(trainer.model, x, y)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(inference, rel=1e-5)
    assert train_logs(trainer)[0] != pytest.approx(inference, rel=1e-3)


def test_optimizer_and_scheduler_can_be_overridden(tmp_path):
    asked = []

    class Own(Trainer):
        def create_scheduler(self, num_training_steps):
            asked.append(num_training_steps)
            return keras.optimizers.schedules.PiecewiseConstantDecay([0], [0.4, 0.2])

        def create_optimizer(self):
            return keras.optimizers.SGD(self.lr_scheduler)

    trainer = Own(
        linear_model(), arguments(tmp_path, max_steps=3), train_dataset=make_data(8), loss="mse"
    )
    trainer.fit()
    assert asked == [3]
    assert isinstance(trainer.optimizer, keras.optimizers.SGD)
    np.testing.assert_allclose(train_logs(trainer, "learning_rate"), [0.4, 0.2, 0.2], rtol=1e-6)


def test_loaders_can_be_overridden(tmp_path):
    x, y = make_data(12)

    class Own(Trainer):
        def get_train_dataloader(self):
            return [(x[i : i + 4], y[i : i + 4]) for i in (8, 4, 0)]

        def get_eval_dataloader(self, eval_dataset=None):
            return [(x[:5], y[:5]), (x[5:], y[5:])]

    model = linear_model()
    kernel, bias = weights(model)
    trainer = Own(
        model,
        arguments(tmp_path, num_train_epochs=1, learning_rate=0.0),
        loss="mse",
        eval_dataset="mine",
    )
    trainer.fit()
    square = (x @ kernel + bias - y) ** 2
    expected = [square[8:].mean(), square[4:8].mean(), square[:4].mean()]
    np.testing.assert_allclose(train_logs(trainer), expected, rtol=1e-5)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(square.mean(), rel=1e-5)


FORMS = {
    "scalar": lambda o, y: keras.ops.mean((o - y) ** 2),
    "per element": lambda o, y: (o - y) ** 2,
    "sum and count": lambda o, y: (keras.ops.sum((o - y) ** 2), 8),
    "with extras": lambda o, y: ((o - y) ** 2, {"bias": keras.ops.mean(o - y)}),
    "pair with extras": lambda o, y: (
        (keras.ops.sum((o - y) ** 2), 8.0),
        {"bias": keras.ops.mean(o - y)},
    ),
    "divides by itself": lambda o, y, num_items_in_batch: (
        keras.ops.sum((o - y) ** 2) / num_items_in_batch
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_loss_function_may_return(tmp_path, form):
    x, y = make_data(8)
    model = linear_model()
    kernel, bias = weights(model)
    error = x @ kernel + bias - y
    trainer = fit(
        model,
        arguments(tmp_path, max_steps=1, learning_rate=0.0),
        (x, y),
        loss=None,
        compute_loss_func=FORMS[form],
        eval_dataset=(x, y),
    )
    (entry,) = (e for e in trainer.state.log_history if "loss" in e)
    assert entry["loss"] == pytest.approx(np.mean(error**2), rel=1e-6)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(np.mean(error**2), rel=1e-6)
    if "extras" in form:
        assert entry["bias"] == pytest.approx(error.mean(), rel=1e-5)
        assert metrics["eval_bias"] == pytest.approx(error.mean(), rel=1e-5)


def test_sample_weights_with_a_scalar_loss_are_refused(tmp_path):
    x, y = make_data(8)
    with pytest.raises(ConfigurationError, match="sample weights"):
        fit(
            linear_model(),
            arguments(tmp_path),
            (x, y, np.ones(8, np.float32)),
            loss=None,
            compute_loss_func=FORMS["scalar"],
        )
