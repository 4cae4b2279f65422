"""Metrics on the device: names, several outputs, masks and ignored labels, against NumPy."""

import keras
import numpy as np
import pytest
from helpers import arguments, linear_model, make_data, train_logs, with_weights

from kbtrain import Trainer
from kbtrain.errors import ConfigurationError
from kbtrain.model.metrics import ListedMetrics


def tensor(value, dtype="float32"):
    return keras.ops.convert_to_tensor(np.asarray(value, dtype))


def listed(spec, weighted=None):
    return ListedMetrics(keras.Model(), spec, weighted)


def masks(outputs):
    return [None] * len(keras.tree.flatten(outputs))


def built(spec, y, outputs, sample_weight=None, weighted=None):
    metrics = listed(spec, weighted)
    metrics.build(None, y, outputs, sample_weight, masks(outputs))
    return metrics


def test_unknown_name_is_explained():
    with pytest.raises(ConfigurationError, match=r"'MeanSquarredError'.*Did you mean"):
        listed(["MeanSquarredError"])


@pytest.mark.parametrize("item", [3, object()])
def test_what_is_no_metric_is_refused(item):
    with pytest.raises(ConfigurationError, match="metrics must contain"):
        listed([item])


def test_metrics_of_one_name_are_numbered_as_in_keras():
    y, outputs = tensor([[1.0], [1.0]]), tensor([[2.0], [4.0]])
    spec = [keras.metrics.MeanSquaredError(name="m"), keras.metrics.MeanAbsoluteError(name="m")]
    metrics = built(spec, y, outputs, weighted=["mae", keras.metrics.MeanSquaredError(name="m")])
    metrics.update(None, y, outputs, tensor([1.0, 0.0]), [None])
    assert metrics.result() == {"m": 5.0, "m_1": 2.0, "mae": 1.0, "weighted_m": 1.0}


def test_a_dict_entry_without_an_output_is_refused():
    y, outputs = tensor([[1.0]]), tensor([[1.0]])
    with pytest.raises(ConfigurationError, match="do not match the model's outputs.*Keras says"):
        built({"c": "mean_absolute_error"}, {"a": y, "b": y}, {"a": outputs, "b": outputs})


@pytest.mark.core
@pytest.mark.parametrize(
    ("y", "outputs", "expected"),
    [
        ([[1.0], [0.0], [1.0]], [[0.7], [0.6], [0.9]], 2 / 3),  # binary
        ([0, 2, 1], [[3, 1, 0], [0, 1, 2], [5, 1, 2]], 2 / 3),  # sparse
        ([[0], [2], [1]], [[3, 1, 0], [0, 1, 2], [5, 1, 2]], 2 / 3),
        ([[1, 0], [0, 1], [0, 1]], [[2, 1], [2, 1], [1, 2]], 2 / 3),  # categorical
    ],
)
def test_accuracy_means_what_the_shapes_say(y, outputs, expected):
    y, outputs = tensor(y), tensor(outputs)
    metrics = built("accuracy", y, outputs)
    metrics.update(None, y, outputs, None, masks(outputs))
    assert metrics.result() == {"accuracy": pytest.approx(expected)}


def test_building_leaves_nothing_behind():
    y, outputs = tensor([[1.0], [2.0]]), tensor([[5.0], [5.0]])
    metrics = built(["mean_absolute_error", keras.metrics.MeanSquaredError(name="mse")], y, outputs)
    metrics.update(None, outputs, outputs, None, [None])
    assert metrics.result() == {"mean_absolute_error": 0.0, "mse": 0.0}
    assert len(metrics.variables) == 4


def test_a_function_is_averaged():
    def twice(y_true, y_pred):
        return 2 * (y_pred - y_true)[:, 0]

    y, outputs = tensor([[1.0], [2.0]]), tensor([[2.0], [5.0]])
    metrics = built([twice], y, outputs)
    metrics.update(None, y, outputs, None, masks(outputs))
    assert metrics.result() == {"twice": 4.0}


def test_weights_and_mask_multiply():
    y, outputs = tensor(np.zeros((2, 3, 1))), tensor(np.arange(6.0).reshape(2, 3, 1))
    metrics = built([], y, outputs, weighted=["mean_absolute_error"])
    mask = tensor([[1, 1, 0], [0, 1, 0]], "bool")
    metrics.update(None, y, outputs, tensor([1.0, 3.0]), [mask])
    # |0|, |1| with weight 1 and |4| with weight 3
    assert metrics.result()["mean_absolute_error"] == pytest.approx((0 + 1 + 12) / (1 + 1 + 3))


def test_several_outputs_by_name_and_by_position():
    y = {"a": tensor([[1.0]]), "b": tensor([[2.0]])}
    outputs = {"a": tensor([[2.0]]), "b": tensor([[5.0]])}
    metrics = built({"a": "mean_absolute_error", "b": ["mean_absolute_error", "mse"]}, y, outputs)
    metrics.update(None, y, outputs, None, masks(outputs))
    assert metrics.result() == {
        "a_mean_absolute_error": 1.0,
        "b_mean_absolute_error": 3.0,
        "b_mse": 9.0,
    }
    y, outputs = list(y.values()), list(outputs.values())
    metrics = built([["mean_absolute_error"], ["mse"]], y, outputs)
    metrics.update(None, y, outputs, None, masks(outputs))
    assert metrics.result() == {"mean_absolute_error": 1.0, "mse": 9.0}


# --- through the Trainer --------------------------------------------------------------------------


def token_model(mask_zero=False):
    inputs = keras.Input((5,), dtype="int32")
    hidden = keras.layers.Embedding(9, 4, mask_zero=mask_zero)(inputs)
    return with_weights(keras.Model(inputs, keras.layers.Dense(6)(hidden)), 3, scale=1.0)


def token_data(samples=8):
    generator = np.random.default_rng(2)
    x = generator.integers(1, 9, size=(samples, 5)).astype(np.int32)
    y = generator.integers(0, 6, size=(samples, 5)).astype(np.int32)
    lengths = generator.integers(1, 6, size=samples)
    padded = np.arange(5)[None] >= lengths[:, None]
    return x, y, padded


def accuracy(model, x, y, keep):
    """Share of right tokens, in NumPy."""
    right = keras.ops.convert_to_numpy(model(x, training=False)).argmax(-1) == y
    return right[keep].mean()


CROSS_ENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", ["ignored labels", "Keras mask"])
def test_padding_is_left_out_of_metrics(tmp_path, kind, compiled):
    x, y, padded = token_data()
    if kind == "ignored labels":
        y = np.where(padded, -100, y)
    else:
        x = np.where(padded, 0, x)
    model = token_model(mask_zero=kind == "Keras mask")
    metric = keras.metrics.SparseCategoricalAccuracy(name="accuracy")
    args = arguments(
        tmp_path,
        per_device_eval_batch_size=3,
        per_device_train_batch_size=8,
        max_steps=1,
        learning_rate=0.0,
    )
    if compiled:
        model.compile(optimizer=keras.optimizers.SGD(0.0), loss=CROSS_ENTROPY, metrics=[metric])
        trainer = Trainer(model, args, train_dataset=(x, y), eval_dataset=(x, y))
    else:
        trainer = Trainer(
            model,
            args,
            train_dataset=(x, y),
            eval_dataset=(x, y),
            loss=CROSS_ENTROPY,
            metrics=[metric],
        )
    expected = accuracy(model, x, y, ~padded)
    assert trainer.evaluate()["eval_accuracy"] == pytest.approx(expected, rel=1e-6)
    trainer.fit()
    assert train_logs(trainer, "accuracy") == [pytest.approx(expected, rel=1e-6)]


@pytest.mark.core
def test_training_metrics_cover_the_steps_since_the_last_log(tmp_path):
    x, y = make_data(16, 3)
    model = linear_model()
    trainer = Trainer(
        model,
        arguments(
            tmp_path,
            max_steps=4,
            per_device_train_batch_size=4,
            logging_steps=2,
            learning_rate=0.0,
            eval_strategy="steps",
            eval_steps=1,
        ),
        train_dataset=(x, y),
        eval_dataset=(x + 100, y),
        loss="mse",
        metrics=["mean_absolute_error"],
    )
    trainer.evaluate()  # leaves nothing behind
    trainer.fit()
    error = np.abs(trainer.predict(x).predictions - y)[:, 0]
    logged = train_logs(trainer, "mean_absolute_error")
    np.testing.assert_allclose(logged, [error[:8].mean(), error[8:].mean()], rtol=1e-5)
    trainer.fit()
    np.testing.assert_allclose(train_logs(trainer, "mean_absolute_error"), logged, rtol=1e-6)


def test_a_second_fit_begins_with_empty_metrics(tmp_path):
    x, y = make_data(8, 3)
    trainer = Trainer(
        linear_model(),
        arguments(
            tmp_path,
            max_steps=1,
            per_device_train_batch_size=8,
            logging_strategy="no",
            learning_rate=0.0,
        ),
        train_dataset=(x, y),
        loss="mse",
        metrics=["mean_absolute_error"],
    )
    trainer.fit()
    expected = np.abs(trainer.predict(x).predictions - y).mean()
    trainer.train_dataset = (x, y + 1000)
    trainer.args = trainer.args.replace(logging_strategy="steps")
    trainer.fit()
    shifted = np.abs(trainer.predict(x).predictions - y - 1000).mean()
    assert train_logs(trainer, "mean_absolute_error") == [pytest.approx(shifted, rel=1e-6)]
    assert shifted != pytest.approx(expected, rel=1e-2)


def test_a_stateful_metric_is_exact_over_the_set(tmp_path):
    generator = np.random.default_rng(0)
    x = generator.normal(size=(30, 3)).astype(np.float32)
    y = (generator.random((30, 1)) > 0.4).astype(np.float32)
    model = linear_model(activation="sigmoid")
    results = []
    for size in (1, 7, 30):
        trainer = Trainer(
            model,
            arguments(tmp_path, per_device_eval_batch_size=size),
            eval_dataset=(x, y),
            loss="binary_crossentropy",
            metrics=[keras.metrics.Precision(name="p")],
        )
        results.append(trainer.evaluate()["eval_p"])
    positive = trainer.predict(x).predictions > 0.5
    expected = (y[positive] == 1).mean()
    np.testing.assert_allclose(results, expected, rtol=1e-6)
