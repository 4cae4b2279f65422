"""Models and data of every kind, overridden hooks, compiled models, other optimizers."""

import keras
import numpy as np
import pytest
from helpers import (
    arguments,
    batch_norm_model,
    fit,
    linear_model,
    make_data,
    same,
    train_logs,
    weights,
    with_weights,
)

from kbtrain import ConfigurationError, Trainer


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


# --- compiled models ------------------------------------------------------------------------------


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


# --- optimizers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SGD", "Adam", "RMSprop", "Lion", "Adafactor", "Nadam", "Ftrl"])
def test_stock_optimizers(tmp_path, name):
    """One update equals one of Keras' own with the clipped mean gradient."""
    x, y = make_data(8)
    model = linear_model(use_bias=False)
    kernel = weights(model)[0]
    gradient = (2 * x.T @ (x @ kernel - y) / 8).astype(np.float32)
    variable = keras.Variable(kernel)
    make = getattr(keras.optimizers, name)
    make(0.05).apply([keras.ops.convert_to_tensor(gradient)], [variable])
    fit(
        model,
        arguments(tmp_path, max_steps=1, max_grad_norm=0),
        (x, y),
        optimizers=(make(0.05), None),
    )
    expected = keras.ops.convert_to_numpy(variable.value)
    np.testing.assert_allclose(weights(model)[0], expected, rtol=1e-4, atol=1e-6)
    assert not np.allclose(expected, kernel)


def test_a_given_schedule_is_used(tmp_path):
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([1, 2], [0.3, 0.2, 0.1])
    trainer = fit(
        linear_model(), arguments(tmp_path, max_steps=4), make_data(8), optimizers=(None, schedule)
    )
    np.testing.assert_allclose(
        train_logs(trainer, "learning_rate"), [0.3, 0.3, 0.2, 0.1], rtol=1e-6
    )
    trainer = fit(
        linear_model(),
        arguments(tmp_path, max_steps=4),
        make_data(8),
        optimizers=(keras.optimizers.SGD(9.0), schedule),
    )
    np.testing.assert_allclose(
        train_logs(trainer, "learning_rate"), [0.3, 0.3, 0.2, 0.1], rtol=1e-6
    )


@pytest.mark.parametrize("accumulation", [1, 2])
def test_loss_scaling_changes_nothing_but_the_scale(tmp_path, accumulation):
    data, runs = make_data(16), []
    for scaled in (False, True):
        optimizer = keras.optimizers.SGD(0.05)
        if scaled:
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=2.0**10)
        model = linear_model()
        trainer = fit(
            model,
            arguments(
                tmp_path,
                per_device_train_batch_size=4,
                max_steps=3,
                gradient_accumulation_steps=accumulation,
            ),
            data,
            optimizers=(optimizer, None),
        )
        runs.append((train_logs(trainer), train_logs(trainer, "grad_norm"), weights(model)))
    np.testing.assert_allclose(runs[1][0], runs[0][0], rtol=1e-6)
    np.testing.assert_allclose(runs[1][1], runs[0][1], rtol=1e-5)
    for a, b in zip(runs[0][2], runs[1][2], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_loss_scaling_skips_an_overflow_and_halves_the_scale(tmp_path):
    optimizer = keras.optimizers.LossScaleOptimizer(
        keras.optimizers.SGD(0.05), initial_scale=2.0**127
    )
    model = linear_model()
    before = weights(model)
    trainer = fit(
        model,
        arguments(tmp_path, max_steps=1),
        (make_data(8)[0], np.full((8, 1), 9.0)),
        optimizers=(optimizer, None),
    )
    assert same(weights(model), before)
    assert float(keras.ops.convert_to_numpy(optimizer.dynamic_scale.value)) == 2.0**126
    assert np.isfinite(train_logs(trainer)).all()


def test_bfloat16_computes_low_and_keeps_the_weights_high(tmp_path):
    x, y = make_data(64)
    runs = []
    for bf16 in (False, True):
        model = batch_norm_model()
        seen = []

        def look(outputs, labels, seen=seen):
            seen.append(keras.backend.standardize_dtype(outputs.dtype))
            return (keras.ops.cast(outputs, "float32") - labels) ** 2

        trainer = fit(
            model,
            arguments(tmp_path, bf16=bf16, num_train_epochs=2),
            (x, y),
            loss=None,
            compute_loss_func=look,
            eval_dataset=(x, y),
        )
        runs.append([*train_logs(trainer), trainer.evaluate()["eval_loss"]])
        assert {v.dtype for v in model.trainable_variables} == {"float32"}
        assert set(seen) == {"bfloat16" if bf16 else "float32"}
    assert runs[0] != runs[1]
    np.testing.assert_allclose(runs[1], runs[0], rtol=0.05)


# --- hooks ----------------------------------------------------------------------------------------


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


# --- kinds of data --------------------------------------------------------------------------------


class MapDataset:
    """What a torch ``Dataset`` or a ``datasets.Dataset`` looks like from outside."""

    def __init__(self, as_dict):
        self.x, self.y = make_data(16)
        self.as_dict = as_dict

    def __len__(self):
        return 16

    def __getitem__(self, index):
        x, y = self.x[index], self.y[index]
        return {"x": x, "label": y} if self.as_dict else (x, y)


def named_model():
    inputs = keras.Input((3,), name="x")
    return with_weights(keras.Model({"x": inputs}, keras.layers.Dense(1)(inputs)))


def sources():
    x, y = make_data(16)
    return {
        "arrays": (x, y),
        "lists": (x.tolist(), y.tolist()),
        "samples": list(zip(x, y, strict=True)),
        "map": MapDataset(False),
        "generator function": lambda: zip(x, y, strict=True),
        "generator": iter(list(zip(x, y, strict=True)) * 2),
        "dict of arrays": {"x": x, "labels": y},
        "map of dicts": MapDataset(True),
        "dicts": [{"x": a, "label_ids": b} for a, b in zip(x, y, strict=True)],
    }


@pytest.mark.parametrize("kind", sources())
def test_every_kind_of_data_gives_the_same_run(tmp_path, kind):
    args = arguments(tmp_path, max_steps=8, per_device_train_batch_size=4)
    reference = fit(linear_model(), args, make_data(16))
    model = named_model() if "dict" in kind else linear_model()
    trainer = fit(model, args, sources()[kind])
    np.testing.assert_allclose(train_logs(trainer), train_logs(reference), rtol=1e-6)
    assert trainer.state.global_step == 8


def test_a_generator_that_ends_ends_the_run(tmp_path, caplog):
    x, y = make_data(8)
    trainer = fit(
        linear_model(),
        arguments(tmp_path, max_steps=8, per_device_train_batch_size=4),
        iter(list(zip(x, y, strict=True))),
    )
    assert trainer.state.global_step == 2
    assert "No data" in caplog.text


def test_sample_weights(tmp_path):
    x, y = make_data(8)
    w = np.linspace(0, 2, 8).astype(np.float32)
    model = linear_model()
    kernel, bias = weights(model)
    square = ((x @ kernel + bias - y) ** 2)[:, 0]
    for data in ((x, y, w), {"x": x, "labels": y, "sample_weight": w}):
        model = named_model() if isinstance(data, dict) else linear_model()
        trainer = fit(
            model,
            arguments(tmp_path, max_steps=1, learning_rate=0.0),
            data,
            metrics=[keras.metrics.MeanSquaredError(name="plain")],
            weighted_metrics=[keras.metrics.MeanSquaredError(name="m")],
        )
        assert train_logs(trainer, "plain") == [pytest.approx(square.mean(), rel=1e-6)]
        assert train_logs(trainer) == [pytest.approx((square * w).sum() / 8, rel=1e-6)]
        assert train_logs(trainer, "m") == [pytest.approx((square * w).sum() / w.sum(), rel=1e-6)]


def test_integer_inputs_of_every_width(tmp_path):
    for dtype in (np.int32, np.int64, np.uint8):
        x = np.arange(8).reshape(8, 1).astype(dtype)
        inputs = keras.Input((1,), dtype="int32")
        hidden = keras.layers.Flatten()(keras.layers.Embedding(8, 2)(inputs))
        model = with_weights(keras.Model(inputs, keras.layers.Dense(1)(hidden)))
        trainer = fit(
            model,
            arguments(tmp_path, max_steps=1, learning_rate=0.0),
            (x, np.zeros((8, 1), np.float32)),
        )
        assert train_logs(trainer) == [
            pytest.approx(mean_square(model, x.astype(np.int32), 0.0), rel=1e-5)
        ]


def test_labels_by_name_for_a_model_that_returns_a_list(tmp_path):
    """As in ``Model.compile``: losses and labels are keyed by the names of the output layers."""

    def make(structure):
        inputs = keras.Input((3,))
        outputs = [keras.layers.Dense(1, name=name)(inputs) for name in ("height", "weight")]
        if structure is dict:
            outputs = dict(zip(("height", "weight"), outputs, strict=True))
        return with_weights(keras.Model(inputs, outputs))

    x, y = make_data(16, outputs=2)
    labels = {"weight": y[:, 1:], "height": y[:, :1]}
    losses = {"height": "mse", "weight": "mae"}
    results = []
    for structure in (list, dict):
        trainer = Trainer(
            make(structure),
            arguments(tmp_path),
            train_dataset=(x, labels),
            loss=losses,
            metrics={"weight": ["mae"]},
        )
        trainer.fit()
        names = ("loss", "weight_loss", "weight_mae")
        results.append([train_logs(trainer, name) for name in names])
    assert results[0] == results[1]
    assert len(results[0][2]) == len(results[0][0]) > 0


@pytest.mark.parametrize("kind", ["sequential", "functional"])
@pytest.mark.parametrize("remove", [True, False])
def test_a_dict_with_the_only_input_and_more(kind, remove, tmp_path, caplog):
    """As tokenizers give it: Keras takes it too, but with a warning at each trace."""
    x, y = make_data(8)
    tokens = keras.Input((3,), name="tokens")
    dense = keras.layers.Dense(1)
    sequential = keras.Sequential([tokens, dense])
    model = sequential if kind == "sequential" else keras.Model(tokens, dense(tokens))
    data = [{"tokens": a, "mask": a, "labels": b} for a, b in zip(x, y, strict=True)]
    settings = arguments(tmp_path, num_train_epochs=1, remove_unused_columns=remove)
    trainer = Trainer(model, settings, train_dataset=data, loss="mse")
    trainer.fit()
    assert ("does not take (it takes tokens): mask" in caplog.text) == remove
    kernel, bias = model.get_weights()
    expected = np.mean((x @ kernel + bias - y) ** 2)
    assert trainer.evaluate(data)["eval_loss"] == pytest.approx(expected, rel=1e-5)
    outputs = trainer.predict([{"tokens": a, "mask": a} for a in x]).predictions
    np.testing.assert_allclose(outputs, x @ kernel + bias, rtol=1e-5)
