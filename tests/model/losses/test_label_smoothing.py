"""Label smoothing: numbers of the formula and of Transformers, ignored labels, other losses."""

import keras
import numpy as np
import pytest
from helpers import arguments
from keras import ops

from kbtrain import ConfigurationError, Trainer
from kbtrain.model.losses.keras_losses import keras_loss_pair
from kbtrain.model.losses.label_smoothing import smoothed

SPARSE = keras.losses.SparseCategoricalCrossentropy


def reference(logits, labels, factor):
    """Mean over the labels that count, in float64."""
    logits = logits.astype("float64")
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    keep = labels != -100
    chosen = np.take_along_axis(logs, np.where(keep, labels, 0)[..., None], -1)[..., 0]
    losses = (1 - factor) * -chosen + factor * -logs.mean(-1)
    return losses[keep].mean()


def value(loss, labels, outputs):
    pair = keras_loss_pair(loss, ops.convert_to_tensor(labels), ops.convert_to_tensor(outputs))
    return float(pair.sum) / float(pair.count)


LOGITS = (2 * np.sin(np.arange(24))).reshape(2, 3, 4).astype("float32")
LABELS = np.array([[0, 1, 2], [3, -100, 1]], "int32")


@pytest.mark.parametrize(("factor", "golden"), [(0.1, 2.301586), (1e-9, 2.330528)])
def test_the_numbers_of_the_reference(factor, golden):
    found = value(smoothed(SPARSE(from_logits=True), factor), LABELS, LOGITS)
    assert found == pytest.approx(golden, abs=2e-6)
    assert found == pytest.approx(reference(LOGITS, LABELS, factor), rel=1e-6)


def test_probabilities_one_hot_labels_and_ignored_classes():
    probabilities = np.exp(LOGITS) / np.exp(LOGITS).sum(-1, keepdims=True)
    expected = reference(LOGITS, LABELS, 0.2)
    loss = smoothed(keras.losses.sparse_categorical_crossentropy, 0.2)
    assert value(loss, LABELS, probabilities) == pytest.approx(expected, rel=1e-5)
    zero_ignored = np.where(LABELS == 0, -100, LABELS)
    loss = smoothed(SPARSE(from_logits=True, ignore_class=0), 0.2)
    expected = reference(LOGITS, zero_ignored, 0.2)
    assert value(loss, LABELS, LOGITS) == pytest.approx(expected, rel=1e-5)
    one_hot = np.eye(4, dtype="float32")[np.abs(LABELS[0])]
    loss = smoothed(keras.losses.CategoricalCrossentropy(from_logits=True), 0.2)
    expected = reference(LOGITS[0], LABELS[0], 0.2)
    assert value(loss, one_hot, LOGITS[0]) == pytest.approx(expected, rel=1e-5)


def test_the_trainer_trains_and_evaluates_with_it(tmp_path):
    generator = np.random.default_rng(0)
    x = generator.normal(size=(12, 3)).astype("float32")
    y = generator.integers(0, 4, 12)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4)])
    trainer = Trainer(
        model,
        arguments(tmp_path, label_smoothing_factor=0.3, max_steps=1),
        train_dataset=(x, y),
        eval_dataset=(x, y),
        loss=SPARSE(from_logits=True),
    )
    before = x @ model.layers[0].get_weights()[0] + model.layers[0].get_weights()[1]
    found = trainer.evaluate()["eval_loss"]
    assert found == pytest.approx(reference(before, y, 0.3), rel=1e-5)
    result = trainer.fit()
    assert result.training_loss == pytest.approx(reference(before[:8], y[:8], 0.3), rel=1e-5)


@pytest.mark.parametrize(
    "loss", ["mse", keras.losses.CategoricalCrossentropy(label_smoothing=0.1), None]
)
def test_a_loss_that_cannot_be_smoothed_is_refused(loss, tmp_path):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4)])
    with pytest.raises(ConfigurationError, match="label_smoothing_factor=0.1 is for the losses"):
        Trainer(model, arguments(tmp_path, label_smoothing_factor=0.1), loss=loss)
