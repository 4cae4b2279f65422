"""Iterables of batches and of samples: which one it is, and data without an end."""

import itertools
import logging

import grain
import keras
import numpy as np
import pytest
from helpers import arguments, linear_model, make_data, with_weights

from kbtrain import Trainer
from kbtrain.data import as_loader, default_collate
from kbtrain.data.loader import DataLoader
from kbtrain.data.sources.base import IterableSource
from kbtrain.data.sources.interop import is_endless
from kbtrain.data.sources.stream import ModelInputs, StreamLoader
from kbtrain.errors import ConfigurationError, DataError
from kbtrain.evaluation import evaluate

X, Y = make_data(24, 3)
CUTS = (slice(0, 8), slice(8, 16), slice(16, 21))


def batches():
    for cut in CUTS:
        yield X[cut], Y[cut]


def samples():
    yield from zip(X[:21], Y[:21], strict=True)


class Subclass(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(1)

    def call(self, x):
        return self.dense(x)


def trained(tmp_path, model, data, **changes):
    args = arguments(tmp_path, max_steps=3, max_grad_norm=0.0, **changes)
    optimizers = (keras.optimizers.SGD(0.1), None)
    Trainer(model, args, train_dataset=data, loss="mse", optimizers=optimizers).fit()
    return [keras.ops.convert_to_numpy(v) for v in model.trainable_variables]


@pytest.fixture(scope="module")
def expected():
    """The weights after the three batches in float64."""
    kernel, bias = [keras.ops.convert_to_numpy(w).astype(float) for w in linear_model().weights]
    for cut in CUTS:
        error = X[cut].astype(float) @ kernel + bias - Y[cut]
        kernel = kernel - 0.2 * X[cut].T @ error / len(error)
        bias = bias - 0.2 * error.mean(axis=0)
    return kernel, bias


def built(model):
    return with_weights(model)


def subclass():
    model = Subclass()
    model(X[:2])
    return built(model)


@pytest.mark.parametrize("make", [linear_model, subclass])
@pytest.mark.parametrize("kind", ["generator", "function", "samples", "loader"])
def test_batches_and_samples_of_a_generator(tmp_path, expected, make, kind):
    """Batches come as they are; samples are put together (3 x 8, but for the third batch)."""
    data = {
        "generator": lambda: batches(),
        "function": lambda: batches,
        "samples": lambda: samples,
        "loader": lambda: as_loader(batches),
    }[kind]()
    model = make()
    for value, right in zip(trained(tmp_path, model, data), expected, strict=True):
        np.testing.assert_allclose(value, right, atol=1e-6)


def test_what_cannot_be_told_is_said(tmp_path):
    with pytest.raises(DataError, match=r"x: \(8, 3\), y: \(8, 1\).*as_loader.*data_collator="):
        trained(tmp_path, Subclass(), batches)
    # Either of the two ways out.
    trained(tmp_path, Subclass(), as_loader(batches))
    (kernel, _) = trained(tmp_path, Subclass(), samples, data_seed=1)
    assert kernel.shape == (3, 1)


def test_a_collator_says_that_items_are_samples(tmp_path):
    model = Subclass()
    args = arguments(tmp_path, max_steps=1, per_device_train_batch_size=2)
    pairs = [(X[:8], Y[:8])] * 2  # sequences of 8 steps with a target for each
    data = iter(pairs)
    trainer = Trainer(model, args, train_dataset=data, loss="mse", data_collator=default_collate)
    trainer.fit()
    assert trainer.state.train_batch_size == 2


def test_evaluation_and_prediction_take_batches_too(tmp_path):
    model = linear_model()
    trainer = Trainer(model, arguments(tmp_path), loss="mse", eval_dataset=batches)
    kernel, bias = [keras.ops.convert_to_numpy(w).astype(float) for w in model.weights]
    outputs = X[:21].astype(float) @ kernel + bias
    loss = trainer.evaluate()["eval_loss"]
    assert loss == pytest.approx(np.mean((outputs - Y[:21]) ** 2), rel=1e-5)
    np.testing.assert_allclose(trainer.predict(batches()).predictions, outputs, atol=1e-5)


def test_a_batch_of_dicts_and_positions(tmp_path):
    """Batches that are dicts; a position within the epoch."""

    def dicts():
        for cut in CUTS:
            yield {"a": X[cut].tolist(), "b": X[cut], "labels": Y[cut]}

    shapes = (("a", (None, 3)), ("b", (None, 3)))
    loader = StreamLoader(DataLoader(IterableSource(dicts), 4), ModelInputs(shapes))
    assert loader.batch_size == 4  # as long as nothing was read
    got = list(loader.epoch(0, start_batch=1))
    assert loader.batch_size is None
    assert [len(batch["a"]) for batch in got] == [8, 5]
    np.testing.assert_array_equal(got[1]["b"], X[CUTS[2]])


SCALAR, ROW, IMAGE = (None, 1), (None, 3), (None, None, None, 3)


@pytest.mark.parametrize(
    ("shapes", "x", "batched"),
    [
        ([ROW], np.zeros(3), False),
        ([ROW], np.zeros((7, 3)), True),
        ([ROW], [0.0, 1.0, 2.0], False),
        ([ROW], np.zeros((7, 4)), True),  # of a wrong size, which the model will say
        ([SCALAR], np.zeros(1), False),
        ([SCALAR], np.zeros(7), True),  # Keras adds the axis
        ([SCALAR], 0.5, False),
        ([(None,)], 3, False),
        ([(None,)], np.zeros(7), True),
        ([IMAGE], np.zeros((5, 5, 3)), False),
        ([IMAGE], np.zeros((2, 5, 5, 3)), True),
        ([ROW, SCALAR], (np.zeros((7, 3)), np.zeros(7)), True),
        ([ROW, SCALAR], (np.zeros(3), np.zeros(())), False),
        ([(4, 3)], np.zeros((4, 3)), True),
        ([(None, None)], np.zeros(7), False),
    ],
)
def test_the_model_decides(shapes, x, batched):
    inputs = ModelInputs([(f"i{n}", shape) for n, shape in enumerate(shapes)])
    loader = StreamLoader(DataLoader(IterableSource([]), 1), inputs)
    y = np.zeros(7) if batched else 0
    assert loader._is_batch((x, y)) is batched
    named = dict(zip("ab", x, strict=True)) if isinstance(x, tuple) else {"a": x}
    inputs = ModelInputs([(n, shape) for n, shape in zip("ab", shapes, strict=False)])
    loader = StreamLoader(DataLoader(IterableSource([]), 1), inputs)
    assert loader._is_batch({**named, "more": np.zeros(5), "labels": y}) is batched
    assert loader._is_batch({**named, "labels": y}) is batched


@pytest.mark.parametrize(
    "item",
    [
        (np.zeros(3), 0),
        (np.zeros(3), np.zeros(1)),
        (np.zeros(1), np.zeros(1)),
        np.zeros((28, 28)),
        {"tokens": [[1], [2, 3]], "labels": [0, 1]},
    ],
)
def test_samples_without_a_model_to_ask(item):
    loader = StreamLoader(DataLoader(IterableSource([]), 1), ModelInputs())
    assert loader._is_batch(item) is False


@pytest.mark.parametrize("make", [linear_model, subclass])
def test_a_list_of_batches_is_said(tmp_path, make):
    with pytest.raises(DataError, match=r"whole batch.*x: \(8, 3\).*as_loader"):
        trained(tmp_path, make(), list(batches()))
    trained(tmp_path, make(), as_loader(list(batches())))


def test_samples_that_may_be_batches_are_said(tmp_path, caplog):
    """A sequence with a label for each step, for a model that nobody knows."""
    with caplog.at_level(logging.WARNING, "kbtrain"):
        trained(tmp_path, Subclass(), [(X[:8], Y[:8])] * 4)
    assert caplog.text.count("is read as one sample") == 1
    caplog.clear()
    trained(tmp_path, Subclass(), [(x, 0.5) for x in X])
    assert "one sample" not in caplog.text


class TwoViews(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        first, second = model(inputs[:, 0]), model(inputs[:, 1])
        loss = keras.ops.mean(keras.ops.square(first - second))
        return (loss, first) if return_outputs else loss


@pytest.mark.parametrize("kind", ["generator", "list"])
def test_an_own_loss_may_take_anything(tmp_path, kind):
    """Two views of a sample have the axes of a batch of two for the model, which is not meant."""
    views = [np.stack([x, x + 1]) for x in X]
    data = iter(views) if kind == "generator" else views
    args = arguments(tmp_path, max_steps=1, per_device_train_batch_size=4)
    model = linear_model()
    kernel = keras.ops.convert_to_numpy(model.weights[0]).astype(float)
    result = TwoViews(model, args, train_dataset=data).fit()
    assert result.training_loss == pytest.approx(kernel.sum() ** 2, rel=1e-4)


# ------------------------------------------------------------------------------- without an end


class Endless(keras.utils.PyDataset):
    num_batches = None

    def __getitem__(self, index):
        return X[:8], Y[:8]


@pytest.mark.parametrize(
    "data",
    [itertools.cycle([(X[0], Y[0])]), Endless(), grain.MapDataset.source([(X[0], Y[0])]).repeat()],
    ids=["cycle", "PyDataset", "grain"],
)
def test_an_evaluation_of_endless_data_is_refused(tmp_path, data):
    trainer = Trainer(linear_model(), arguments(tmp_path), loss="mse", eval_dataset=data)
    with pytest.raises(ConfigurationError, match="repeats endlessly.*eval_max_steps"):
        trainer.evaluate()
    with pytest.raises(ConfigurationError, match=r"repeats endlessly.*repeat\(\)`\)\."):
        trainer.predict(data)
    trainer.args = arguments(tmp_path, eval_max_steps=2)
    assert trainer.evaluate()["eval_loss"] > 0


def test_an_evaluation_without_a_length_is_bounded(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(evaluate, "MAX_UNSIZED", 5)

    def endless():
        while True:
            yield X[:8], Y[:8]

    trainer = Trainer(linear_model(), arguments(tmp_path), loss="mse", eval_dataset=endless)
    with caplog.at_level(logging.WARNING, "kbtrain"):
        result = trainer.evaluate()
    assert trainer.evaluation_loop(as_loader(endless())).num_samples == 40
    assert result["eval_loss"] > 0
    assert "had not ended after 5 batches" in caplog.text
    assert "eval_max_steps" in caplog.text


def test_data_with_an_end_is_not_endless():
    assert not is_endless(batches())
    assert not is_endless([1])
    assert not is_endless(itertools.repeat(1, 3))
    assert is_endless(itertools.repeat(1))
