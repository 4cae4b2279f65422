"""Accumulation is exact: 4 micro-batches of 2 are one batch of 8, whatever counts in them."""

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
    with_weights,
)

from kbtrain import Trainer

CROSS_ENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
TOKENS, CLASSES = 6, 5


def token_model(mask_zero=False):
    inputs = keras.Input((TOKENS,), dtype="int32")
    hidden = keras.layers.Embedding(9, 4, mask_zero=mask_zero)(inputs)
    hidden = keras.layers.Dense(7, activation="tanh")(hidden)
    return with_weights(keras.Model(inputs, keras.layers.Dense(CLASSES)(hidden)), 3, scale=1.0)


def token_data(samples, kind):
    """Very uneven lengths, so that a mean of means would be far off."""
    generator = np.random.default_rng(2)
    x = generator.integers(1, 9, size=(samples, TOKENS)).astype(np.int32)
    y = generator.integers(0, CLASSES, size=(samples, TOKENS)).astype(np.int32)
    lengths = np.resize([1, 6, 2, 5, 1, 1, 6, 3], samples)
    padded = np.arange(TOKENS)[None] >= lengths[:, None]
    weight = (0.25 + generator.random(samples)).astype(np.float32)
    token_weight = generator.random((samples, TOKENS)).astype(np.float32)
    return {
        "ignored labels": (x, np.where(padded, -100, y)),
        "Keras mask": (np.where(padded, 0, x), y),
        "sample weights": (x, y, weight),
        "token weights": (x, y, token_weight),
        "all at once": (
            np.where(padded, 0, x),
            np.where(generator.random(y.shape) < 0.3, -100, y),
            token_weight,
        ),
    }[kind]


KINDS = ("ignored labels", "Keras mask", "sample weights", "token weights", "all at once")


def numpy_loss(model, data, mask_zero):
    """Token-exact mean loss in float64."""
    x, y = data[:2]
    logits = keras.ops.convert_to_numpy(model(x)).astype(np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    each = -np.take_along_axis(log_p, np.where(y == -100, 0, y)[..., None], -1)[..., 0]
    keep = y != -100
    if mask_zero:
        keep &= x != 0
    weight = data[2] if len(data) == 3 else np.ones(len(x))
    weight = weight if weight.ndim == 2 else weight[:, None]
    return (each * keep * weight).sum() / keep.sum()


@pytest.mark.core
@pytest.mark.parametrize("kind", KINDS)
def test_four_micro_batches_of_two_equal_a_batch_of_eight(tmp_path, kind):
    mask_zero = kind in ("Keras mask", "all at once")
    data = token_data(20, kind)  # 8 + 8 + 4: the last group is short
    runs = []
    for batch, accumulation in ((8, 1), (2, 4)):
        model = token_model(mask_zero)
        expected = numpy_loss(model, tuple(part[:8] for part in data), mask_zero)
        trainer = fit(
            model,
            arguments(
                tmp_path,
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=accumulation,
                num_train_epochs=1,
                learning_rate=0.05,
            ),
            data,
            loss=CROSS_ENTROPY,
        )
        losses = train_logs(trainer)
        assert losses[0] == pytest.approx(expected, rel=1e-6)
        assert trainer.state.global_step == 3
        runs.append((losses, train_logs(trainer, "grad_norm"), weights(model)))
    for losses, norms, values in runs[1:]:
        np.testing.assert_allclose(losses, runs[0][0], rtol=1e-6)
        np.testing.assert_allclose(norms, runs[0][1], rtol=2e-6)
        for a, b in zip(values, runs[0][2], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_eval_loss_does_not_depend_on_the_batch_size(tmp_path, kind):
    mask_zero = kind in ("Keras mask", "all at once")
    data, model = token_data(11, kind), token_model(mask_zero)
    expected = numpy_loss(model, data, mask_zero)
    for size in (1, 3, 8):
        trainer = Trainer(
            model,
            arguments(tmp_path, per_device_eval_batch_size=size),
            eval_dataset=data,
            loss=CROSS_ENTROPY,
        )
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6), size


def test_regularizers_and_add_loss_count_once(tmp_path):
    x, y = make_data(8)
    runs = []
    for batch, accumulation in ((8, 1), (2, 4)):
        model = linear_model(kernel_regularizer=keras.regularizers.L2(0.3), use_bias=False)
        w = weights(model)[0]
        expected = np.mean((x @ w - y) ** 2) + 0.3 * np.sum(w**2)
        trainer = fit(
            model,
            arguments(
                tmp_path,
                per_device_train_batch_size=batch,
                max_steps=2,
                gradient_accumulation_steps=accumulation,
            ),
            (x, y),
        )
        assert train_logs(trainer)[0] == pytest.approx(expected, rel=1e-6)
        runs.append((train_logs(trainer), weights(model)))
    np.testing.assert_allclose(runs[1][0], runs[0][0], rtol=1e-6)
    np.testing.assert_allclose(runs[1][1][0], runs[0][1][0], rtol=1e-6)


def test_several_outputs_accumulate(tmp_path):
    x, y = make_data(8)
    runs = []
    for batch, accumulation in ((8, 1), (2, 4)):
        inputs = keras.Input((3,))
        model = keras.Model(
            inputs, {"a": keras.layers.Dense(1)(inputs), "b": keras.layers.Dense(1)(inputs)}
        )
        with_weights(model)
        trainer = fit(
            model,
            arguments(
                tmp_path,
                per_device_train_batch_size=batch,
                max_steps=2,
                gradient_accumulation_steps=accumulation,
            ),
            (x, {"a": y, "b": 2 * y}),
            loss={"a": "mse", "b": "mae"},
        )
        logs = [e for e in trainer.state.log_history if "loss" in e]
        assert [e["a_loss"] + e["b_loss"] for e in logs] == pytest.approx([e["loss"] for e in logs])
        runs.append((train_logs(trainer), weights(model)))
    np.testing.assert_allclose(runs[1][0], runs[0][0], rtol=1e-6)
    for a, b in zip(runs[0][1], runs[1][1], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


def test_num_items_in_batch_is_the_count_of_the_whole_update(tmp_path):
    data = token_data(8, "ignored labels")
    results = []

    def loss(outputs, labels, num_items_in_batch):
        keep = keras.ops.cast(keras.ops.not_equal(labels, -100), "float32")
        each = keras.losses.sparse_categorical_crossentropy(
            keras.ops.maximum(labels, 0), outputs, from_logits=True
        )
        items = keras.ops.cast(num_items_in_batch, "float32")
        return keras.ops.sum(each * keep) / items, {"items": items}

    for batch, accumulation in ((8, 1), (2, 4), (3, 3)):
        model = token_model()
        expected = numpy_loss(model, data, False)
        trainer = fit(
            model,
            arguments(
                tmp_path,
                per_device_train_batch_size=batch,
                max_steps=1,
                gradient_accumulation_steps=accumulation,
            ),
            data,
            loss=None,
            compute_loss_func=loss,
        )
        (entry,) = (e for e in trainer.state.log_history if "loss" in e)
        assert entry["loss"] == pytest.approx(expected, rel=1e-6)
        assert entry["items"] == (data[1] != -100).sum()
        results.append(weights(model))
    for values in results[1:]:
        for a, b in zip(values, results[0], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_batches_of_different_lengths_in_one_group(tmp_path):
    """A collator that pads each batch gives micro-batches of different shapes."""
    x, y = token_data(8, "ignored labels")
    lengths = (y != -100).sum(1)
    samples = [(x[i, :n], y[i, :n]) for i, n in enumerate(lengths)]

    def pad(batch):
        longest = max(len(a) for a, _ in batch)

        def fill(row, value):
            return np.pad(row, (0, longest - len(row)), constant_values=value)

        return (
            np.stack([fill(a, 1) for a, _ in batch]),
            np.stack([fill(b, -100) for _, b in batch]),
        )

    def model():
        inputs = keras.Input((None,), dtype="int32")
        hidden = keras.layers.Embedding(9, 4)(inputs)
        hidden = keras.layers.Dense(7, activation="tanh")(hidden)
        return with_weights(keras.Model(inputs, keras.layers.Dense(CLASSES)(hidden)), 3, scale=1.0)

    runs = []
    for batch, accumulation in ((8, 1), (2, 4), (1, 8)):
        trainer = fit(
            model(),
            arguments(
                tmp_path,
                per_device_train_batch_size=batch,
                max_steps=2,
                gradient_accumulation_steps=accumulation,
            ),
            samples,
            loss=CROSS_ENTROPY,
            data_collator=pad,
        )
        runs.append(train_logs(trainer))
    np.testing.assert_allclose(runs[1], runs[0], rtol=1e-6)
    np.testing.assert_allclose(runs[2], runs[0], rtol=1e-6)


@pytest.mark.core
def test_batch_norm_statistics_move_once_per_micro_batch(tmp_path):
    x, y = make_data(8)
    model = batch_norm_model()
    kernel, bias = weights(model)[:2]
    fit(
        model,
        arguments(
            tmp_path, per_device_train_batch_size=2, max_steps=1, gradient_accumulation_steps=4
        ),
        (x, y),
    )
    mean, variance = np.zeros(4), np.ones(4)
    for rows in x.reshape(4, 2, 3):
        hidden = rows @ kernel + bias
        mean = 0.7 * mean + 0.3 * hidden.mean(0)
        variance = 0.7 * variance + 0.3 * hidden.var(0)
    values = {v.path.split("/")[-1]: keras.ops.convert_to_numpy(v.value) for v in model.variables}
    np.testing.assert_allclose(values["moving_mean"], mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(values["moving_variance"], variance, rtol=1e-5, atol=1e-6)


def test_dropout_differs_between_micro_batches(tmp_path):
    """Equal samples in all micro-batches: equal masks would give the loss of one of them."""
    x = np.ones((4, 64), np.float32)

    def run(batch, accumulation):
        inputs = keras.Input((64,))
        dropped = keras.layers.Dropout(0.5, seed=1)(inputs)
        layer = keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")
        model = keras.Model(inputs, layer(dropped))
        trainer = fit(
            model,
            arguments(
                tmp_path,
                per_device_train_batch_size=batch,
                max_steps=1,
                gradient_accumulation_steps=accumulation,
            ),
            (x, np.zeros((4, 1), np.float32)),
        )
        return train_logs(trainer)[0]

    assert run(1, 4) != pytest.approx(run(1, 1), rel=1e-3)
