"""What a step has captured from Python is followed when it is changed, within a fit and between."""

import dataclasses
import logging
import types

import keras
import numpy as np
import pytest
from helpers import arguments, linear_model, make_data, train_logs, with_weights
from keras import ops

from kbtrain import Trainer, TrainerCallback
from kbtrain.errors import ConfigurationError
from kbtrain.tracing.frozen_values import frozen, is_changeable
from kbtrain.tracing.objects import intercepted

FACTOR = 1.0
SETTINGS = {"factor": 1.0}


@dataclasses.dataclass
class Config:
    factor: float = 1.0
    nested: dict = dataclasses.field(default_factory=lambda: {"factors": [1.0]})


class Factor(keras.layers.Layer):
    """Multiplies by a number of Python's, kept in one of several ways."""

    shared = 1.0

    def __init__(self):
        super().__init__()
        self.factor, self.factors, self.named = 1.0, [1.0], {"a": 1.0}
        self.config, self.on = Config(), True
        self.array = np.ones(1, "float32")

    def call(self, x):
        x = x * self.factor * self.factors[0] * self.named["a"] * float(self.array[0])
        x = x * self.config.factor * self.config.nested["factors"][0] * self.shared
        return x if self.on else x * 0.0


class Model(keras.Model):
    """The linear model, then the factor."""

    def __init__(self):
        super().__init__()
        self.linear, self.scale = keras.layers.Dense(1), Factor()

    def call(self, x):
        return self.scale(self.linear(x))


class EpochTwo(TrainerCallback):
    """Does something before the second of three epochs."""

    def __init__(self, action):
        self.action = action

    def on_epoch_begin(self, args, state, control, **kwargs):
        if state.epoch == 1:
            self.action(kwargs["trainer"])


def set_class_attribute(trainer):
    type(trainer.model.scale).shared = 0.0


LAYER = {
    "number": lambda t: setattr(t.model.scale, "factor", 0.0),
    "list": lambda t: t.model.scale.factors.__setitem__(0, 0.0),
    "dict": lambda t: t.model.scale.named.update({"a": 0.0}),
    "array": lambda t: t.model.scale.array.fill(0.0),
    "dataclass": lambda t: setattr(t.model.scale.config, "factor", 0.0),
    "nested": lambda t: t.model.scale.config.nested["factors"].__setitem__(0, 0.0),
    "flag": lambda t: setattr(t.model.scale, "on", False),
    "class": set_class_attribute,
    "hidden class attribute": lambda t: setattr(t.model.scale, "shared", 0.0),
}


def options(folder, **changes):
    defaults = {"num_train_epochs": 3, "learning_rate": 1e-30, "logging_strategy": "epoch"}
    return arguments(folder, **(defaults | changes))


@pytest.mark.parametrize("kind", LAYER)
def test_attributes_of_a_layer(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(Factor, "shared", 1.0)
    x, y = make_data(8)
    model = Model()
    model(x)
    with_weights(model)
    trainer = Trainer(
        model,
        options(tmp_path, eval_strategy="epoch"),
        train_dataset=(x, y),
        eval_dataset=(x, y),
        loss="mse",
        callbacks=[EpochTwo(LAYER[kind])],
    )
    trainer.fit()
    outputs = ops.convert_to_numpy(model.linear(x))
    before, after = np.mean(np.square(outputs - y)), np.mean(np.square(y))
    expected = [float(v) for v in (before, after, after)]
    np.testing.assert_allclose(train_logs(trainer), expected, rtol=1e-5)
    np.testing.assert_allclose(train_logs(trainer, "eval_loss"), expected, rtol=1e-5)


class Weighted(Trainer):
    """The loss times a number of the Trainer's."""

    weight = 1.0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True)
        return self.weighted(loss), outputs

    def weighted(self, loss):
        return loss._replace(sum=loss.sum * self.weight)


def by_global(y, outputs):
    return ops.mean(ops.square(outputs - y), -1) * FACTOR


def by_dict(y, outputs):
    return ops.mean(ops.square(outputs - y), -1) * SETTINGS["factor"]


def by_closure():
    factor = 1.0

    def loss(y, outputs):
        return ops.mean(ops.square(outputs - y), -1) * helper()

    def helper():
        return factor

    def change(_):
        nonlocal factor
        factor = 2.0

    return loss, change


class LossObject(keras.losses.Loss):
    factor = 1.0

    def call(self, y, outputs):
        return ops.mean(ops.square(outputs - y), -1) * self.factor


class Callable:
    factor = 1.0

    def __call__(self, outputs, labels):
        return ops.mean(ops.square(outputs - labels)) * self.factor


def losses():
    closure, change_closure = by_closure()
    namespace = types.SimpleNamespace(factor=1.0)
    holder = Callable()
    loss_object = LossObject()
    module = globals()
    yield "global", {"loss": by_global}, lambda t: module.update(FACTOR=2.0)
    yield "global dict", {"loss": by_dict}, lambda t: SETTINGS.update(factor=2.0)
    yield "closure", {"loss": closure}, change_closure
    yield "loss object", {"loss": loss_object}, lambda t: setattr(loss_object, "factor", 2.0)
    yield "callable", {"compute_loss_func": holder}, lambda t: setattr(holder, "factor", 2.0)
    yield (
        "namespace",
        {"compute_loss_func": lambda o, y: ops.mean(ops.square(o - y)) * namespace.factor},
        lambda t: setattr(namespace, "factor", 2.0),
    )
    yield "trainer", {"loss": "mse"}, lambda t: setattr(t, "weight", 2.0)
    yield (
        "another function",
        {"compute_loss_func": lambda o, y: ops.mean(ops.square(o - y))},
        lambda t: setattr(t, "compute_loss_func", lambda o, y: 2 * ops.mean(ops.square(o - y))),
    )


NAMES = [kind for kind, _, _ in losses()]


@pytest.mark.parametrize(("kind", "arguments_", "action"), list(losses()), ids=NAMES)
def test_what_a_loss_reads(tmp_path, kind, arguments_, action, monkeypatch):
    monkeypatch.setitem(globals(), "FACTOR", 1.0)
    monkeypatch.setitem(SETTINGS, "factor", 1.0)
    x, y = make_data(8)
    trainer = Weighted(
        linear_model(),
        options(tmp_path),
        train_dataset=(x, y),
        eval_dataset=(x, y),
        callbacks=[EpochTwo(action)],
        **arguments_,
    )
    trainer.fit()
    first, *rest = train_logs(trainer)
    np.testing.assert_allclose(rest, [2 * first] * 2, rtol=1e-5)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(2 * first, rel=1e-5)


def test_between_fits_and_evaluations(tmp_path):
    x, y = make_data(8)
    trainer = Weighted(
        linear_model(), options(tmp_path), train_dataset=(x, y), eval_dataset=(x, y), loss="mse"
    )
    first = trainer.evaluate()["eval_loss"]
    for weight in (2.0, 0.5):
        trainer.weight = weight
        assert trainer.evaluate()["eval_loss"] == pytest.approx(weight * first, rel=1e-5)
        trainer.fit()
        assert train_logs(trainer)[-1] == pytest.approx(weight * first, rel=1e-5)


def test_a_model_that_is_compiled_anew(tmp_path):
    x, y = make_data(8)
    model = linear_model()
    model.compile(keras.optimizers.SGD(1e-30), "mse")
    trainer = Trainer(model, options(tmp_path), train_dataset=(x, y), eval_dataset=(x, y))
    trainer.fit()
    error = ops.convert_to_numpy(model(x)) - y
    np.testing.assert_allclose(train_logs(trainer), [np.mean(error**2)] * 3, rtol=1e-5)
    model.compile(keras.optimizers.SGD(1e-30), "mae", metrics=["mse"])
    results = trainer.evaluate()
    assert results["eval_loss"] == pytest.approx(np.mean(np.abs(error)), rel=1e-5)
    assert results["eval_mse"] == pytest.approx(np.mean(error**2), rel=1e-5)
    model.compile(keras.optimizers.SGD(1e-30), "mae")
    trainer.fit()
    np.testing.assert_allclose(train_logs(trainer), [np.mean(np.abs(error))] * 3, rtol=1e-5)
    trainer.add_callback(EpochTwo(lambda t: t.model.compile("sgd", "mse")))
    with pytest.raises(ConfigurationError, match="recompiled during training"):
        trainer.fit()


def test_a_schedule_that_is_assigned(tmp_path):
    optimizer = keras.optimizers.SGD(0.5)
    schedule = keras.optimizers.schedules.InverseTimeDecay(0.25, 1, 1.0)
    trainer = Trainer(
        linear_model(),
        options(tmp_path),
        train_dataset=make_data(8),
        loss="mse",
        optimizers=(optimizer, None),
        callbacks=[EpochTwo(lambda t: setattr(t.optimizer, "learning_rate", schedule))],
    )
    trainer.fit()
    np.testing.assert_allclose(train_logs(trainer, "learning_rate"), [0.5, 0.125, 0.25 / 3])


def test_settings_of_keras_objects(tmp_path):
    x, y = make_data(8)
    dense = keras.layers.Dense(1, kernel_regularizer=keras.regularizers.L2(0.0))
    drop = keras.layers.Dropout(1e-9, seed=1)
    model = with_weights(keras.Sequential([keras.Input((3,)), drop, dense]))
    optimizer = keras.optimizers.SGD(1.0, clipnorm=1e-9)
    weights = {}

    class Change(TrainerCallback):
        def on_epoch_begin(self, args, state, control, **kwargs):
            epoch = round(state.epoch)
            weights[epoch] = np.array(dense.get_weights()[0])
            if epoch == 1:
                dense.kernel_regularizer.l2 = 1.0
            if epoch == 2:
                dense.kernel_regularizer.l2, drop.rate = 0.0, 0.999999
            if epoch == 3:
                drop.rate, optimizer.clipnorm = 1e-9, 10.0

    trainer = Trainer(
        model,
        options(tmp_path, num_train_epochs=4, max_grad_norm=0),
        train_dataset=(x, y),
        loss="mse",
        optimizers=(optimizer, None),
        callbacks=[Change()],
    )
    trainer.fit()
    plain, regularized, dropped, _ = train_logs(trainer)
    kernel = weights[1].astype("float64")
    assert regularized == pytest.approx(plain + np.square(kernel).sum(), rel=1e-4)
    assert dropped == pytest.approx(np.mean(np.square(y)), rel=0.2)
    moved = np.abs(dense.get_weights()[0] - weights[3]).max()
    assert moved > 1e-3 > np.abs(weights[3] - weights[0]).max()


def test_nothing_is_traced_again_without_a_change(tmp_path, caplog):
    traces = []

    class Counting(Weighted):
        def compute_loss(self, *args, **kwargs):
            traces.append(1)
            return super().compute_loss(*args, **kwargs)

    class Busy(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            kwargs["trainer"].seen = kwargs["model"].remark = state.global_step
            self.count = state.global_step

    def run(callbacks):
        traces.clear()
        args = options(tmp_path, per_device_train_batch_size=2)
        data = make_data(8)
        Counting(linear_model(), args, train_dataset=data, loss="mse", callbacks=callbacks).fit()
        return len(traces)

    with caplog.at_level(logging.INFO, "kbtrain"):
        assert run([Busy()]) == run([])
    assert "recompiled" not in caplog.text


def test_a_value_that_changes_often_is_named_with_its_line(tmp_path, caplog):
    class Anneal(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            kwargs["trainer"].weight = 1.0 + state.global_step

    x, y = make_data(16)
    args = options(tmp_path, num_train_epochs=1, per_device_train_batch_size=2, logging_steps=1)
    trainer = Weighted(
        linear_model(),
        args.replace(logging_strategy="steps"),
        train_dataset=(x[:2].repeat(8, 0), y[:2].repeat(8, 0)),
        loss="mse",
        callbacks=[Anneal()],
    )
    with caplog.at_level(logging.WARNING, "kbtrain"):
        trainer.fit()
    warnings = [r.message for r in caplog.records if "Weighted.weight" in r.message]
    assert len(warnings) == 1
    assert "test_retrace.py:" in warnings[0]
    assert "keras.Variable" in warnings[0]


def test_classes_are_as_they_were_after_a_trace():
    class Base:
        def __init__(self):
            self.a = 1

    class Own(Base):
        def __getattribute__(self, name):
            return super().__getattribute__(name)

    seen, before = [], Own.__getattribute__
    with intercepted([Base, Own], lambda owner, name, value: seen.append((name, value))):
        Own().a, Base().a  # noqa: B018
    assert ("a", 1) in seen
    assert Own.__getattribute__ is before
    assert "__getattribute__" not in vars(Base)


def test_frozen_values_are_equal_until_the_value_changes():
    cyclic = {}
    cyclic["self"] = cyclic
    values = [1, "a", (1, [2]), {"a": {1}}, np.arange(3), float("nan"), cyclic, Config(), len]
    for value in values:
        assert frozen(value) == frozen(value)
    assert frozen(np.arange(3)) != frozen(np.arange(3) + 1)
    assert frozen(Config()) != frozen(Config())  # not the same object
    config = Config()
    before = frozen(config)
    config.nested["factors"].append(2)
    assert frozen(config) != before
    assert [
        is_changeable(v) for v in (1, (1, 2), ([],), [], Config(), ops, keras.layers.Layer())
    ] == [*(False, False, True, True, True, False, False)]
