"""What a model's class brings with it: compute_loss, compute_metrics, metrics in call, no call."""

import keras
import numpy as np
import pytest
from helpers import arguments, fit, make_data, train_logs, weights, with_weights
from keras import ops

import kbtrain
from kbtrain import ConfigurationError, DataError, Trainer

X, Y = make_data(10)


class Base(keras.Model):
    """One dense layer."""

    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(1)

    def call(self, x):
        return self.dense(x)


class Penalized(Base):
    """Its loss has a term of the batch and a regularizer's, and it counts its calls."""

    def __init__(self):
        super().__init__()
        self.dense.kernel_regularizer = keras.regularizers.L2(0.1)
        self.seen = keras.metrics.Sum(name="seen")

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        self.seen.update_state(ops.ones_like(x[:, 0]))
        loss = super().compute_loss(x, y, y_pred, sample_weight, training)
        return loss + (0.0 if training else 100.0)


def penalized():
    model = Penalized()
    model(X[:1])
    model.compile(keras.optimizers.SGD(0.1), "mse", metrics=["mae"])
    return with_weights(model)


def test_compute_loss_of_the_model(tmp_path):
    model, reference = penalized(), penalized()
    history = reference.fit(X, Y, batch_size=5, epochs=2, shuffle=False, verbose=0).history
    args = arguments(
        tmp_path,
        learning_rate=None,
        num_train_epochs=2,
        per_device_train_batch_size=5,
        logging_strategy="epoch",
    )
    trainer = Trainer(model, args, train_dataset=(X, Y), eval_dataset=(X, Y))
    trainer.fit()
    for got, expected in zip(weights(model), weights(reference), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    assert train_logs(trainer) == pytest.approx(history["loss"], rel=1e-5)
    assert train_logs(trainer, "mae") == pytest.approx(history["mae"], rel=1e-5)
    assert train_logs(trainer, "seen") == [10, 10]
    expected = reference.evaluate(X, Y, batch_size=5, verbose=0, return_dict=True)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert metrics["eval_loss"] > 100
    assert metrics["eval_seen"] == 10


def test_a_loss_given_to_the_trainer_replaces_it_and_is_said_to(tmp_path, caplog):
    model = penalized()
    args = arguments(tmp_path, log_level="warning")
    trainer = Trainer(model, args, eval_dataset=(X, Y), loss="mse")
    assert "Penalized.compute_loss is not used" in caplog.text
    kernel, bias = weights(model)
    expected = np.mean((X @ kernel + bias - Y) ** 2) + 0.1 * np.sum(kernel**2)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_an_overridden_compute_loss_of_the_trainer_may_call_it(tmp_path):
    class Doubled(Trainer):
        def compute_loss(self, *args, return_outputs=False, **kwargs):
            loss, outputs = super().compute_loss(*args, return_outputs=True, **kwargs)
            return (loss._replace(sum=2 * loss.sum), outputs) if return_outputs else 2 * loss.sum

    model = penalized()
    single = Trainer(model, arguments(tmp_path), eval_dataset=(X, Y)).evaluate()["eval_loss"]
    double = Doubled(model, arguments(tmp_path), eval_dataset=(X, Y)).evaluate()["eval_loss"]
    assert double == pytest.approx(2 * single, rel=1e-6)


def test_what_its_loss_is_compiled_with_is_asked_for(tmp_path):
    class Own(Base):
        def compile(self, weight):
            super().compile()
            self.weight = weight

        def compute_loss(self, x, y, y_pred, sample_weight=None):
            return self.weight * ops.mean(ops.square(y - y_pred))

    with pytest.raises(ConfigurationError, match=r"Call its compile\(\) first"):
        Trainer(Own(), arguments(tmp_path), eval_dataset=(X, Y)).evaluate()
    model = Own()
    model.compile(3.0)
    metrics = Trainer(model, arguments(tmp_path), eval_dataset=(X, Y)).evaluate()
    kernel, bias = weights(model)
    assert metrics["eval_loss"] == pytest.approx(
        3 * np.mean((X @ kernel + bias - Y) ** 2), rel=1e-5
    )


def test_no_loss_at_all_says_what_can_be_defined(tmp_path):
    with pytest.raises(ConfigurationError, match="define compute_loss"):
        Trainer(Base(), arguments(tmp_path), eval_dataset=(X, Y)).evaluate()


def test_compute_metrics_of_the_model(tmp_path):
    class Own(Base):
        def __init__(self):
            super().__init__()
            self.largest = keras.metrics.Mean(name="largest")

        def compute_metrics(self, x, y, y_pred, sample_weight=None):
            self.largest.update_state(ops.max(ops.abs(y - y_pred), axis=0))
            return super().compute_metrics(x, y, y_pred, sample_weight)

    model = Own()
    model(X[:1])
    args = arguments(tmp_path, per_device_eval_batch_size=4)
    metrics = Trainer(with_weights(model), args, eval_dataset=(X, Y), loss="mse").evaluate()
    kernel, bias = weights(model)
    errors = np.abs(X @ kernel + bias - Y)
    expected = np.mean([errors[i : i + 4].max() for i in (0, 4, 8)])
    assert metrics["eval_largest"] == pytest.approx(expected, rel=1e-6)


def test_what_compute_metrics_returns_under_a_name_of_its_own_is_reported(tmp_path):
    class Own(Base):
        def __init__(self):
            super().__init__()
            self.error = keras.metrics.MeanAbsoluteError(name="error")

        def compute_metrics(self, x, y, y_pred, sample_weight=None):
            self.error.update_state(y, y_pred, sample_weight)
            results = super().compute_metrics(x, y, y_pred, sample_weight)
            return results | {"percent": 100 * self.error.result(), "curve": ops.ones(3)}

    model = Own()
    model(X[:1])
    model.compile("sgd", "mse", metrics=["mse"])
    args = arguments(tmp_path, per_device_train_batch_size=4, per_device_eval_batch_size=5)
    trainer = Trainer(with_weights(model), args, train_dataset=(X, Y), eval_dataset=(X, Y))
    for _ in range(2):  # the second starts anew
        metrics = trainer.evaluate()
        kernel, bias = weights(model)
        expected = np.mean(np.abs(X @ kernel + bias - Y))
        assert metrics["eval_error"] == pytest.approx(expected, rel=1e-6)
        assert metrics["eval_percent"] == pytest.approx(100 * expected, rel=1e-6)
        assert "eval_mse" in metrics
        assert "eval_curve" not in metrics
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "percent" in entry]
    assert logged
    assert all(e["percent"] == pytest.approx(100 * e["error"], rel=1e-6) for e in logged)


@pytest.mark.parametrize("where", ["model", "layer"])
def test_a_metric_that_call_updates(tmp_path, where):
    class Counting(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.mean_input = keras.metrics.Mean(name="mean_input")

        def call(self, x):
            self.mean_input.update_state(ops.mean(x))
            return x

    class Own(Base):
        def __init__(self):
            super().__init__()
            if where == "layer":
                self.counting = Counting()
            else:
                self.mean_input = keras.metrics.Mean(name="mean_input")

        def call(self, x):
            if where == "layer":
                x = self.counting(x)
            else:
                self.mean_input.update_state(ops.mean(x))
            return self.dense(x)

    args = arguments(tmp_path, max_steps=2, per_device_train_batch_size=5, logging_steps=2)
    args = args.replace(per_device_eval_batch_size=5)
    trainer = fit(Own(), args, (X, Y), eval_dataset=(X, Y))
    assert train_logs(trainer, "mean_input") == [pytest.approx(X.mean(), rel=1e-5)]
    assert trainer.evaluate()["eval_mean_input"] == pytest.approx(X.mean(), rel=1e-5)


# --- models without a call ------------------------------------------------------------------------


class Parts(keras.Model):
    """Two layers, and no way from one to the other."""

    def __init__(self, built):
        super().__init__()
        self.first, self.second = keras.layers.Dense(2), keras.layers.Dense(1)
        if built:
            self.second(self.first(X[:1]))


class TrainsParts(Trainer):
    """Knows the way."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        x, y = inputs
        outputs = model.second(model.first(x))
        loss = ops.mean(ops.square(outputs - y))
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize("built", [True, False])
def test_no_call_is_needed_with_compute_loss(tmp_path, built):
    args = arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    trainer = TrainsParts(Parts(built), args, train_dataset=(X, Y), eval_dataset=(X, Y))
    trainer.fit()
    assert len(weights(trainer.model)) == 4
    (first, first_bias, second, second_bias) = weights(trainer.model)
    outputs = (X @ first + first_bias) @ second + second_bias
    assert trainer.evaluate()["eval_loss"] == pytest.approx(np.mean((outputs - Y) ** 2), rel=1e-5)


def test_without_either_compute_loss_is_named(tmp_path):
    with pytest.raises(ConfigurationError, match=r"no call.*override Trainer.compute_loss"):
        fit(Parts(built=True), arguments(tmp_path, max_steps=1), (X, Y))


# --- outputs, states, statistics ------------------------------------------------------------------


class OddOutputs(Base):
    """One output that is a tensor of the batch, and four that are something else."""

    def call(self, x):
        logits = self.dense(x)
        return {"logits": logits, "mean": ops.mean(logits), "hidden": None, "temperature": 0.5}


@pytest.mark.parametrize("built", [True, False])
def test_outputs_that_are_no_tensors(tmp_path, built):
    model = OddOutputs()
    if built:
        model(X[:1])
    args = arguments(tmp_path, max_steps=1, per_device_eval_batch_size=4)
    seen = []
    trainer = fit(
        model,
        args,
        (X, Y),
        loss={"logits": "mse"},
        eval_dataset=(X, Y),
        compute_metrics=lambda p: seen.append(p.predictions) or {},
    )
    kernel, bias = weights(model)
    logits = X @ kernel + bias
    assert trainer.evaluate()["eval_loss"] == pytest.approx(np.mean((logits - Y) ** 2), rel=1e-5)
    predictions = trainer.predict(X).predictions
    for each in (seen[0], predictions):
        assert each["hidden"] is None
        np.testing.assert_allclose(each["logits"], logits, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(each["temperature"], [0.5] * 3)
        assert each["mean"].shape == (3,)
    assert set(trainer.predict(X, ignore_keys=["hidden", "mean"]).predictions) == {
        "logits",
        "temperature",
    }


def test_a_tuple_with_none(tmp_path):
    class Own(Base):
        def call(self, x):
            return self.dense(x), None

    model = Own()
    predictions = Trainer(model, arguments(tmp_path)).predict(X).predictions
    assert predictions[1] is None
    assert predictions[0].shape == (10, 1)


def test_an_output_that_is_a_text_is_named(tmp_path):
    class Own(Base):
        def call(self, x):
            return {"logits": self.dense(x), "kind": "linear"}

    trainer = Trainer(Own(), arguments(tmp_path))
    with pytest.raises(ConfigurationError, match=r"'kind'.*is not a tensor.*ignore_keys"):
        trainer.predict(X)
    assert set(trainer.predict(X, ignore_keys=["kind"]).predictions) == {"logits"}


def test_a_stateful_rnn_needs_whole_batches(tmp_path):
    x = np.random.default_rng(0).normal(size=(10, 3, 2)).astype(np.float32)
    layers = [keras.layers.LSTM(2, stateful=True), keras.layers.Dense(1)]
    model = keras.Sequential([keras.Input(batch_shape=(4, 3, 2)), *layers])
    args = arguments(tmp_path, max_steps=3, per_device_train_batch_size=4)
    with pytest.raises(DataError, match=r"stateful.*of 4 samples.*batch of 2.*drop_last"):
        fit(model, args, (x, x[:, 0, :1]))
    trainer = fit(model, args.replace(dataloader_drop_last=True), (x, x[:, 0, :1]))
    assert np.isfinite(train_logs(trainer)).all()
    with pytest.raises(DataError, match="batch of 8"):
        trainer.predict(x[:8])


def test_statistics_of_a_normalization_go_into_a_clone(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (8, 4, 4, 3), dtype=np.uint8)
    labels = np.arange(8) % 3
    normalization = keras.layers.Normalization(axis=-1)
    normalization.adapt(images.astype(np.float32))
    model = keras.Sequential(
        [
            keras.Input((4, 4, 3), dtype="uint8"),
            normalization,
            keras.layers.RandomFlip(seed=1),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(3),
        ]
    )
    before = np.array(ops.convert_to_numpy(normalization.mean))
    args = arguments(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    fit(model, args, (images, labels), loss=loss)
    np.testing.assert_array_equal(ops.convert_to_numpy(normalization.mean), before)
    clone = keras.models.clone_model(model)
    kbtrain.load_weights(clone, tmp_path / "checkpoint-1")
    np.testing.assert_allclose(
        ops.convert_to_numpy(clone(images, training=False)),
        ops.convert_to_numpy(model(images, training=False)),
        rtol=1e-6,
    )


def test_a_detector_that_compiles_itself_and_knows_its_labels(tmp_path):
    class Detector(Base):
        def __init__(self):
            super().__init__()
            self.compile(loss={"box": keras.losses.Huber(reduction="sum"), "score": "mse"})

        def call(self, x):
            return {"box": self.dense(x), "score": -self.dense(x)}

        def compute_loss(self, x, y, y_pred, sample_weight, **kwargs):
            return 2 * ops.mean(ops.abs(y["corner"] - y_pred["box"]))

    model = Detector()
    labels = {"corner": Y, "kind": 0 * Y}
    trainer = Trainer(model, arguments(tmp_path), eval_dataset=(X, labels))
    got = trainer.evaluate()["eval_loss"]
    kernel, bias = weights(model)
    assert got == pytest.approx(2 * np.mean(np.abs(Y - X @ kernel - bias)), rel=1e-5)
