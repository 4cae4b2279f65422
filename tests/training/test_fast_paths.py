"""The fast ways of running a step give the numbers of the plain one."""

import keras
import numpy as np
import pytest
from helpers import arguments, batch_norm_model, make_data, same, train_logs, weights, with_weights
from helpers_fast_paths import (
    CASES,
    EveryStep,
    train,
)
from keras import layers

from kbtrain import Trainer, TrainerCallback
from kbtrain.training.run import Run


@pytest.mark.parametrize("case", CASES)
def test_the_compiled_step_gives_the_numbers_of_the_eager_one(case, tmp_path, caplog):
    with caplog.at_level("DEBUG", "kbtrain"):
        fast = train(case, tmp_path / "a", max_steps=2)
    assert "eagerly" not in caplog.text
    assert "make_fx" not in caplog.text  # several times as slow as recording without it
    assert "in Python" not in caplog.text
    plain = train(case, tmp_path / "b", max_steps=2, jit_compile=False)
    for key in ("loss", "grad_norm", "learning_rate"):
        np.testing.assert_allclose(train_logs(fast, key), train_logs(plain, key), rtol=2e-5)
    metric = {"mse": "mae"}.get(CASES[case][2], "accuracy")
    assert len(train_logs(fast, metric)) == len(train_logs(fast)) > 0
    np.testing.assert_allclose(train_logs(fast, metric), train_logs(plain, metric), rtol=2e-5)
    # Not the weights: a bias before a batch norm has no gradient but noise, which Adam makes large.


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def test_what_is_drawn_does_not_depend_on_the_length_of_the_run(tmp_path):
    settings = {"lr_scheduler_type": "constant", "warmup_steps": 0, "logging_steps": 1}
    short = train("dense, batch norm, dropout", tmp_path / "a", max_steps=3, **settings)
    stop = [StopAt(3)]
    long = train("dense, batch norm, dropout", tmp_path / "b", stop, max_steps=400, **settings)
    assert len(train_logs(long)) == 3
    np.testing.assert_allclose(train_logs(long), train_logs(short), rtol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_the_numbers_do_not_depend_on_how_many_updates_run_in_one_call(case, tmp_path, monkeypatch):
    sizes = []
    update = Run.update

    def recorded(self, block):
        sizes.append(block.updates)
        return update(self, block)

    monkeypatch.setattr(Run, "update", recorded)
    monkeypatch.setattr(
        "kbtrain.data.block_length.BLOCK_SECONDS", 1e9
    )  # however slow the machine is
    together = train(case, tmp_path / "a", logging_steps=100)
    assert max(sizes) > 1
    assert sum(sizes) == 24
    sizes.clear()
    each = EveryStep()
    apart = train(case, tmp_path / "b", [each], logging_steps=1)
    assert sizes == [1] * 24
    assert each.steps == list(range(1, 25))
    assert same(weights(together.model), weights(apart.model))
    sizes.clear()
    fixed = train(case, tmp_path / "c", logging_steps=100, steps_per_execution=4)
    assert sum(sizes) == 24
    assert max(sizes) == 4
    assert same(weights(fixed.model), weights(apart.model))
    mean = np.mean(train_logs(apart, "loss"))
    assert together.state.log_history[-1]["train_loss"] == pytest.approx(mean, rel=1e-12)


def test_a_nonfinite_update_inside_a_block_stops_at_its_step(tmp_path):
    from kbtrain import NonFiniteError

    x, y = make_data(64)
    x[45] = np.nan
    model = batch_norm_model()
    trainer = Trainer(
        model,
        arguments(
            tmp_path,
            per_device_train_batch_size=2,
            logging_steps=1000,
            lr_scheduler_type="constant",
        ),
        train_dataset=(x, y),
        loss="mse",
    )
    with pytest.raises(NonFiniteError, match="Update 23 was not finite"):
        trainer.fit()
    assert trainer.state.global_step == 22
    reference = batch_norm_model()
    first = Trainer(
        reference,
        arguments(
            tmp_path, per_device_train_batch_size=2, max_steps=22, lr_scheduler_type="constant"
        ),
        train_dataset=(x, y),
        loss="mse",
    )
    first.fit()
    assert same(weights(model), weights(reference))


class NumPyNoise(layers.Layer):
    """Draws outside of what any framework records."""

    def call(self, x):
        return x + keras.ops.convert_to_tensor(np.random.normal(size=3).astype("float32"))


def test_a_step_that_draws_numpy_numbers_still_trains(tmp_path):
    """It must not be recorded with the numbers of one step; where it would be, it runs eagerly."""
    inputs = keras.Input((3,))
    model = with_weights(keras.Model(inputs, layers.Dense(1)(NumPyNoise()(inputs))))
    trainer = Trainer(
        model,
        arguments(tmp_path, per_device_train_batch_size=8, num_train_epochs=2),
        train_dataset=make_data(32),
        loss="mse",
    )
    before = weights(model)
    trainer.fit()
    assert trainer.state.global_step == 8
    assert np.isfinite(train_logs(trainer)).all()
    assert not same(before, weights(model))


@pytest.mark.parametrize("case", ["dense, batch norm, dropout", "seeded noise"])
def test_accumulation_gives_the_numbers_of_the_eager_one(case, tmp_path):
    """A step of 4 + 4 + 2 and one of 4 + 4 samples: equal ones in a loop, another shape apart."""
    settings = {"num_train_epochs": 1, "gradient_accumulation_steps": 3}
    x, y = CASES[case][1]()
    CASES["short"] = (CASES[case][0], lambda: (x[:18], y[:18]), *CASES[case][2:])
    try:
        fast = train("short", tmp_path / "a", **settings)
        plain = train("short", tmp_path / "b", jit_compile=False, **settings)
    finally:
        del CASES["short"]
    for key in ("loss", "grad_norm", "learning_rate", *CASES[case][3]):
        np.testing.assert_allclose(train_logs(fast, key), train_logs(plain, key), rtol=2e-5)


@pytest.mark.parametrize("case", CASES)
def test_each_shape_is_compiled_once(case, tmp_path, monkeypatch):
    """The model's Python runs while it is traced: two shapes, not one run for each update."""
    make = CASES[case][0]
    calls = []
    model = make()
    call = type(model.layers[-1]).call

    def counted(self, *args, **kwargs):
        if self is model.layers[-1]:
            calls.append(1)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(type(model.layers[-1]), "call", counted)

    def run(epochs):
        calls.clear()
        Trainer(
            model,
            arguments(tmp_path, per_device_train_batch_size=5, num_train_epochs=epochs),
            train_dataset=CASES[case][1](),
            loss=CASES[case][2],
        ).fit()
        return len(calls)

    short = run(2)
    assert run(8) == short


def test_the_history_in_the_state_is_bounded_and_the_log_file_has_all(tmp_path, monkeypatch):
    monkeypatch.setattr("kbtrain.callbacks.state.HISTORY_LIMIT", 10)
    trainer = train("dense, batch norm, dropout", tmp_path, logging_steps=1, report_to="json")
    assert [entry["step"] for entry in trainer.state.log_history] == [*range(16, 25), 24]
    lines = (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 25


def test_low_precision_variables_are_trained_by_the_compiled_step(tmp_path):
    # Their optimizer advances a float32 sum in place and assigns what of it fits.
    x, y = make_data(16)
    trained = []
    for name, jit_compile in (("compiled", "auto"), ("eager", False)):
        model = with_weights(
            keras.Sequential([keras.Input((3,)), layers.Dense(1, dtype="bfloat16")])
        )
        before = weights(model)
        args = arguments(
            tmp_path / name,
            jit_compile=jit_compile,
            per_device_train_batch_size=4,
            learning_rate=0.1,
        )
        Trainer(model, args, train_dataset=(x, y), loss="mse").fit()
        assert not any(np.array_equal(a, b) for a, b in zip(before, weights(model), strict=True))
        trained.append([np.asarray(w, "float32") for w in weights(model)])
    for compiled, eager in zip(*trained, strict=True):
        np.testing.assert_allclose(compiled, eager, rtol=2**-6, atol=2**-8)


class SwitchesOff(TrainerCallback):
    def __init__(self, variable):
        self.variable = variable

    def on_step_end(self, args, state, control, **kwargs):
        self.variable.assign(0.0)


def test_a_variable_that_only_the_loss_knows_may_change_between_steps(tmp_path):
    """It belongs to neither the model nor a metric, and must not be compiled in as a constant."""
    factor = keras.Variable(1.0, trainable=False)
    trainer = Trainer(
        with_weights(keras.Sequential([keras.Input((3,)), layers.Dense(1)])),
        arguments(tmp_path, max_steps=3),
        train_dataset=make_data(24),
        compute_loss_func=lambda outputs, y: keras.ops.square(outputs - y) * (factor * 2.0),
        callbacks=[SwitchesOff(factor)],
    )
    trainer.fit()
    first, *others = train_logs(trainer)
    assert first > 0
    assert others == [0.0, 0.0]


class Rising(keras.losses.Loss):
    """Counts its calls, in a variable that belongs to no model; a call counts that often."""

    def __init__(self):
        super().__init__()
        self.calls = keras.Variable(0.0, trainable=False)

    def call(self, y, outputs):
        self.calls.assign(self.calls + 1.0)
        return keras.ops.mean(keras.ops.square(outputs - y), -1) * self.calls


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_loss_may_have_state_of_its_own(accumulation, tmp_path):
    x, y = make_data(16)
    x[8:], y[8:] = x[:8], y[:8]
    loss = Rising()
    model = with_weights(keras.Sequential([keras.Input((3,)), layers.Dense(1)]))
    kernel, bias = weights(model)
    square = np.mean((x @ kernel + bias - y) ** 2)
    trainer = Trainer(
        model,
        arguments(
            tmp_path,
            num_train_epochs=2 * accumulation,
            learning_rate=0.0,
            gradient_accumulation_steps=accumulation,
        ),
        train_dataset=(x, y),
        eval_dataset=(x, y),
        loss=loss,
    )
    loss.calls.assign(0.0)
    trainer.fit()
    counted = np.arange(1, 4 * accumulation + 1).reshape(4, accumulation).mean(1)
    np.testing.assert_allclose(train_logs(trainer), counted * square, rtol=1e-5)
    # An evaluation changes nothing, and sees what was assigned since it was compiled.
    for calls in (4 * accumulation, 11):
        loss.calls.assign(float(calls))
        result = trainer.evaluate()["eval_loss"]
        assert result == pytest.approx((calls + 1) * square, rel=1e-5)
    assert float(keras.ops.convert_to_numpy(loss.calls.value)) == 11


def test_a_stateful_rnn_goes_on_where_the_last_batch_ended(tmp_path):
    """Its states are no variables of the model to Keras."""
    generator = np.random.default_rng(3)
    x = generator.normal(size=(16, 5, 3)).astype("float32")
    y = generator.normal(size=(16, 4)).astype("float32")
    rnn = layers.SimpleRNN(4, stateful=True)
    model = with_weights(keras.Sequential([keras.Input(batch_shape=(4, 5, 3)), rnn]))
    kernel, recurrent, bias = (w.astype("float64") for w in weights(model)[:3])
    state, losses = np.zeros((4, 4)), []
    for start in range(0, 16, 4):
        for step in range(5):
            state = np.tanh(x[start : start + 4, step] @ kernel + state @ recurrent + bias)
        losses.append(np.mean((state - y[start : start + 4]) ** 2))
    settings = {"per_device_train_batch_size": 4, "learning_rate": 0.0, "num_train_epochs": 1}
    saving = {"save_strategy": "steps", "save_steps": 2}
    args = arguments(tmp_path, **settings, **saving)
    trainer = Trainer(model, args, train_dataset=(x, y), loss="mse")
    trainer.fit()
    np.testing.assert_allclose(train_logs(trainer), losses, rtol=1e-5)
    rnn.reset_state()
    trainer = Trainer(model, args, train_dataset=(x, y), loss="mse")
    trainer.fit(resume_from_checkpoint=tmp_path / "checkpoint-2")
    np.testing.assert_allclose(train_logs(trainer), losses, rtol=1e-5)


class Halving(layers.Layer):
    """Assigns its own weight in training, as ``SpectralNormalization`` does."""

    def build(self, shape):
        self.w = self.add_weight(shape=(shape[-1],), initializer="ones")

    def call(self, x, training=False):
        if training:
            self.w.assign(self.w / 2.0)
        return x * self.w


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_layer_may_assign_its_own_weights(accumulation, tmp_path):
    """The gradient is that at the new value, and the optimizer updates the new value."""
    x, y = make_data(24, outputs=3)
    w, gradient, losses, expected = np.ones(3), np.zeros(3), [], []
    for micro in range(6):
        rows = slice(4 * micro, 4 * micro + 4)
        w = w / 2
        error = x[rows] * w - y[rows]
        gradient = gradient + 2 * np.mean(error * x[rows], 0) / 3 / accumulation
        losses.append(np.mean(error**2))
        if micro % accumulation == accumulation - 1:
            w, gradient = w - 0.5 * gradient, np.zeros(3)
            expected.append(np.mean(losses[-accumulation:]))
    model = keras.Sequential([keras.Input((3,)), Halving()])
    trainer = Trainer(
        model,
        arguments(
            tmp_path,
            num_train_epochs=1,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=accumulation,
            max_grad_norm=0,
        ),
        train_dataset=(x, y),
        loss="mse",
        optimizers=(keras.optimizers.SGD(0.5), None),
    )
    trainer.fit()
    np.testing.assert_allclose(train_logs(trainer), expected, rtol=1e-5)
    np.testing.assert_allclose(weights(model)[0], w, rtol=1e-5)


class Branching(layers.Layer):
    """Python that looks at values, which no framework can record."""

    def call(self, x):
        return 2.0 * x if float(keras.ops.sum(x)) > 0 else x

    def compute_output_shape(self, shape):
        return shape

    def compute_output_spec(self, x):
        return keras.KerasTensor(x.shape, x.dtype)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_python_that_looks_at_values_runs_eagerly(accumulation, tmp_path, caplog):
    x, y = make_data(24)
    model = with_weights(keras.Sequential([keras.Input((3,)), Branching(), layers.Dense(1)]))
    kernel, bias = weights(model)
    losses = []
    for batch in np.split(np.arange(24), 6):
        factor = 2.0 if x[batch].sum() > 0 else 1.0
        losses.append(np.mean((factor * x[batch] @ kernel + bias - y[batch]) ** 2))
    settings = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4}
    with caplog.at_level("INFO", "kbtrain"):
        trainer = Trainer(
            model,
            arguments(
                tmp_path,
                num_train_epochs=1,
                learning_rate=0.0,
                gradient_accumulation_steps=accumulation,
                **settings,
            ),
            train_dataset=(x, y),
            eval_dataset=(x, y),
            loss="mse",
            metrics=["mae"],
        )
        trainer.fit()
    assert "reads values of tensors (test_fast_paths.py:" in caplog.text
    expected = np.reshape(losses, (-1, accumulation)).mean(1)
    np.testing.assert_allclose(train_logs(trainer), expected, rtol=1e-5)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(np.mean(losses), rel=1e-5)


class BranchingModel(keras.Model):
    """Not built beforehand, and cannot be by shapes alone."""

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(1, kernel_initializer="ones")

    def call(self, x):
        y = self.dense(x)
        return 2.0 * y if float(keras.ops.stop_gradient(keras.ops.sum(y))) > 0 else y


def test_a_model_that_looks_at_values_is_built_by_values(tmp_path):
    x, y = make_data(8)
    losses = []
    for batch in (slice(0, 4), slice(4, 8)):
        factor = 2.0 if x[batch].sum() > 0 else 1.0
        losses.append(np.mean((factor * x[batch].sum(1, keepdims=True) - y[batch]) ** 2))
    settings = arguments(
        tmp_path, num_train_epochs=1, learning_rate=0.0, per_device_train_batch_size=4
    )
    model = BranchingModel()
    for _ in range(2):  # the second time it is built
        trainer = Trainer(model, settings, train_dataset=(x, y), loss="mse")
        trainer.fit()
        np.testing.assert_allclose(train_logs(trainer), losses, rtol=1e-5)


def scores(name):
    """Metrics whose Keras code on PyTorch looks at values, unless it is replaced."""
    if name == "one output":
        return [keras.metrics.AUC(num_thresholds=20, name="score")], "binary_crossentropy", 1
    union = keras.metrics.MeanIoU(3, sparse_y_pred=False, name="score")
    return [union], "sparse_categorical_crossentropy", 3


@pytest.mark.filterwarnings("ignore:Explicitly requested dtype int64")  # MeanIoU on JAX
@pytest.mark.parametrize("outputs", ["one output", "three outputs"])
def test_metrics_that_sum_by_index_do_not_keep_the_step_from_being_recorded(
    outputs, tmp_path, caplog
):
    results = []
    for jit_compile in ("auto", False):
        metrics, loss, units = scores(outputs)
        activation = "sigmoid" if units == 1 else "softmax"
        layer = layers.Dense(units, activation=activation)
        x, _ = make_data(16)
        y = np.random.default_rng(3).integers(0, max(units, 2), (16, 1))
        with caplog.at_level("INFO", "kbtrain"):
            trainer = Trainer(
                with_weights(keras.Sequential([keras.Input((3,)), layer])),
                arguments(tmp_path, max_steps=2, jit_compile=jit_compile),
                train_dataset=(x, y),
                loss=loss,
                metrics=metrics,
            )
            trainer.fit()
        results.append(train_logs(trainer, "score"))
    assert "eagerly" not in caplog.text
    assert results[0][0] > 0
    np.testing.assert_allclose(results[0], results[1], rtol=1e-5)


def test_a_learning_rate_that_is_read_as_a_number_is_read_anew_for_each_update(tmp_path):
    """Keras' SGD with momentum does so on PyTorch; a record must not keep the first value."""
    x, y = make_data(8)
    model = with_weights(keras.Sequential([keras.Input((3,)), layers.Dense(1, use_bias=False)]))
    (kernel,) = (w.astype("float64") for w in weights(model))
    momentum = np.zeros_like(kernel)
    for rate in (0.3, 0.1, 0.05):
        momentum = 0.9 * momentum - rate * 2 * x.T @ (x @ kernel - y) / 8
        kernel = kernel + momentum
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([0, 1], [0.3, 0.1, 0.05])
    trainer = Trainer(
        model,
        arguments(tmp_path, max_steps=3, max_grad_norm=0),
        train_dataset=(x, y),
        loss="mse",
        optimizers=(keras.optimizers.SGD(schedule, momentum=0.9), None),
    )
    trainer.fit()
    np.testing.assert_allclose(weights(model)[0], kernel, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:Explicitly requested dtype float64")  # JAX has none
def test_weights_in_float64_are_trained(tmp_path):
    x, y = make_data(8)
    layer = layers.Dense(1, use_bias=False, dtype="float64")
    model = with_weights(keras.Sequential([keras.Input((3,), dtype="float64"), layer]))
    (kernel,) = (w.astype("float64") for w in weights(model))
    gradient = 2 * x.T @ (x @ kernel - y) / 8
    clipped = gradient * 0.01 / (np.linalg.norm(gradient) + 1e-6)
    trainer = Trainer(
        model,
        arguments(tmp_path, max_steps=1, max_grad_norm=0.01),
        train_dataset=(x.astype("float64"), y.astype("float64")),
        loss="mse",
        optimizers=(keras.optimizers.SGD(10.0), None),
    )
    trainer.fit()
    np.testing.assert_allclose(weights(model)[0], kernel - 10 * clipped, rtol=1e-5)
    assert train_logs(trainer, "grad_norm") == [pytest.approx(np.linalg.norm(gradient), rel=1e-5)]


class Sampling(layers.Layer):
    """Draws in inference, too, as a variational autoencoder may."""

    def __init__(self):
        super().__init__()
        self.seed_generator = keras.random.SeedGenerator(3)

    def call(self, x):
        return x + keras.random.normal(keras.ops.shape(x), seed=self.seed_generator)


def test_each_batch_of_a_prediction_draws_anew_and_training_does_not_notice(tmp_path):
    layer = Sampling()
    model = keras.Sequential([keras.Input((2,)), layer])
    trainer = Trainer(model, arguments(tmp_path, per_device_eval_batch_size=4))
    before = weights(model)
    first, second = (trainer.predict(np.zeros((12, 2), "float32")).predictions for _ in "12")
    assert len(np.unique(first)) == 24
    np.testing.assert_array_equal(first, second)
    assert same(before, weights(model))
