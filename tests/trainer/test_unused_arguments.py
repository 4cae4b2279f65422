"""Arguments about the loss and metrics that nothing asks for: said once, never silently unused."""

import keras
import pytest
from helpers import arguments, make_data, weights, with_weights
from keras import ops

from kbtrain import Trainer

X, Y = make_data(10)


class Base(keras.Model):
    """One dense layer."""

    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(1)

    def call(self, x):
        return self.dense(x)


class OwnLoss(Base):
    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return super().compute_loss(x, y, y_pred, sample_weight, training) + 100.0


class OwnSteps(Base):
    def train_step(self, data):
        return {"loss": ops.sum(data[0])}


class OwnTest(Base):
    def test_step(self, data):
        return {"loss": ops.sum(data[0])}


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (OwnLoss, "is not used: the model has a custom compute_loss (OwnLoss.compute"),
        (OwnSteps, "is not used: the model has a custom train_step (OwnSteps.train_step)"),
        (OwnTest, "is not used in evaluations: the model has a custom test_step (OwnTest."),
    ],
)
def test_loss_weights_that_a_method_of_the_model_does_not_see(tmp_path, caplog, kind, message):
    model = kind()
    model.compile("sgd", "mse")
    Trainer(model, arguments(tmp_path, log_level="warning"), loss_weights=2.0)
    assert "loss_weights=... " + message in caplog.text
    assert caplog.text.count("loss_weights=...") == 1
    caplog.clear()
    Trainer(model, arguments(tmp_path, log_level="warning"))
    assert not caplog.text


class Replacing(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(inputs[0])
        loss = ops.mean(ops.abs(outputs - inputs[1]))
        return (loss, outputs) if return_outputs else loss


class Calling(Trainer):
    def compute_loss(self, *args, **kwargs):
        return super().compute_loss(*args, **kwargs)


class Reading(Replacing):
    def helper(self, outputs, labels):
        return [self.loss(labels, outputs) for _ in range(1)][0]


def by_function(outputs, labels):
    return ops.mean(outputs - labels)


@pytest.mark.parametrize(
    ("trainer", "given", "unused"),
    [
        (Replacing, {"loss": "mse"}, "loss=... is not used: Replacing.compute_loss is overr"),
        (Replacing, {"compute_loss_func": by_function}, "compute_loss_func=... is not used"),
        (
            Replacing,
            {"loss": "mse", "loss_weights": 2.0},
            "loss=... and loss_weights=... are not used: Replacing.compute_loss is overridden",
        ),
        (Reading, {"loss": "mse"}, None),
        (Calling, {"loss": "mse", "loss_weights": 2.0}, None),
        (Replacing, {}, None),
    ],
)
def test_losses_beside_an_overridden_compute_loss(tmp_path, caplog, trainer, given, unused):
    trainer(Base(), arguments(tmp_path, log_level="warning"), **given)
    assert unused in caplog.text if unused else not caplog.text


def test_a_loss_that_is_given_holds_in_an_overridden_compute_loss_too(tmp_path, caplog):
    model, args = OwnLoss(), arguments(tmp_path, log_level="warning", jit_compile=False)
    model.compile("sgd", "mse")
    found = [
        kind(model, args, eval_dataset=(X, Y), loss="mse").evaluate()["eval_loss"]
        for kind in (Trainer, Calling)
    ]
    assert found[0] == found[1] < 100
    assert caplog.text.count("OwnLoss.compute_loss is not used") == 2


def test_metrics_of_the_trainer_beside_compute_metrics_of_the_model(tmp_path):
    class Own(Base):
        def compute_metrics(self, x, y, y_pred, sample_weight=None):
            return {"largest": ops.max(y_pred)}

    model = Own()
    model(X[:1])
    with_weights(model)
    kernel, bias = weights(model)
    outputs = X @ kernel + bias
    args = arguments(tmp_path, per_device_eval_batch_size=5, jit_compile=False)
    given = {"loss": "mse", "metrics": ["mae"]}
    found = Trainer(model, args, eval_dataset=(X, Y), **given).evaluate()
    assert found["eval_mae"] == pytest.approx(abs(outputs - Y).mean(), rel=1e-5)
    assert found["eval_largest"] == pytest.approx(outputs[5:].max(), rel=1e-5)


def test_compute_metrics_that_is_not_called(tmp_path, caplog):
    args = arguments(tmp_path, prediction_loss_only=True, log_level="warning")
    Trainer(Base(), args, loss="mse", compute_metrics=lambda prediction: {})
    assert "compute_metrics is not called in evaluations" in caplog.text
