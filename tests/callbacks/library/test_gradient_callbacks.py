"""The gradient noise scale and histograms, against NumPy; neither changes the training."""

import json

import keras
import numpy as np
import pytest
from helpers import (
    arguments,
    batch_norm_model,
    linear_model,
    make_data,
    same,
    train_logs,
    weights,
    with_weights,
)

from kbtrain import ConfigurationError, GradientNoiseScale, HistogramCallback, Trainer


def data():
    """Data with a signal: the targets are far from what the model gives."""
    x, y = make_data(16)
    return x, y + 3


def run(tmp_path, callbacks, model=None, **changes):
    settings = {"per_device_train_batch_size": 4, "max_steps": 3}
    trainer = Trainer(
        model or linear_model(),
        arguments(tmp_path, **(settings | changes)),
        train_dataset=data(),
        loss="mse",
        callbacks=callbacks,
    )
    trainer.fit()
    return trainer


def gradient(kernel, bias, x, y):
    """Of the mean squared error of a linear model."""
    error = x @ kernel + bias - y
    return np.concatenate([(2 * x.T @ error / len(x)).ravel(), 2 * error.mean(0)])


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_noise_scale_is_that_of_numpy(tmp_path, accumulation):
    trainer = run(
        tmp_path,
        [GradientNoiseScale(smoothing=0.5)],
        learning_rate=0.0,
        weight_decay=0.0,
        gradient_accumulation_steps=accumulation,
        max_steps=2,
    )
    x, y = (a.astype(np.float64) for a in data())
    kernel, bias = weights(linear_model())
    size = 4 if accumulation == 2 else 2  # micro-batches, or halves of one
    signal = noise = 0.0
    expected = []
    for update in range(2):
        first = 4 * accumulation * update
        parts = [slice(first + i * size, first + (i + 1) * size) for i in range(2)]
        small = [gradient(kernel, bias, x[rows], y[rows]) for rows in parts]
        both = slice(first, first + 2 * size)
        big = np.sum(gradient(kernel, bias, x[both], y[both]) ** 2)
        mean = np.mean([np.sum(g**2) for g in small])
        signal = 0.5 * signal + 0.5 * (2 * size * big - size * mean) / size
        noise = 0.5 * noise + 0.5 * (mean - big) / (1 / size - 1 / (2 * size))
        if signal > 0 < noise:
            expected.append(noise / signal)
    assert expected
    assert train_logs(trainer, "gradient_noise_scale") == pytest.approx(expected, rel=1e-4)


@pytest.mark.core
def test_the_training_is_that_without_them(tmp_path):
    plain = run(tmp_path / "a", [], batch_norm_model(dropout=0.3))
    callbacks = [GradientNoiseScale(), HistogramCallback(1, gradients=True)]
    trainer = run(tmp_path / "b", callbacks, batch_norm_model(dropout=0.3))
    assert same(weights(trainer.model), weights(plain.model))
    assert not trainer.callback_handler.need_every_step()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_training_draws_the_same_random_numbers(tmp_path, accumulation):
    def model():
        model = keras.Sequential(
            [
                keras.Input((3,)),
                keras.layers.Dense(8),
                keras.layers.Dropout(0.4),  # without a seed: it draws from the global generator
                keras.layers.Dense(1),
            ]
        )
        return with_weights(model)

    settings = {"gradient_accumulation_steps": accumulation, "max_steps": 4}
    plain = run(tmp_path / "a", [], model(), **settings)
    callbacks = [GradientNoiseScale(), HistogramCallback(1, gradients=True)]
    trainer = run(tmp_path / "b", callbacks, model(), **settings)
    assert same(weights(trainer.model), weights(plain.model))


def test_histograms_are_those_of_numpy_and_reach_tensorboard_and_report(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    callback = HistogramCallback(2, gradients=True, pattern="kernel")
    settings = {"report_to": ["tensorboard"], "save_strategy": "epoch", "run_name": "r"}
    trainer = run(
        tmp_path, [callback], learning_rate=0.0, weight_decay=0.0, max_steps=4, **settings
    )
    x, y = (a.astype(np.float64) for a in data())
    kernel, bias = weights(trainer.model)
    own = {name.partition("/")[0]: value for name, value in callback.newest.items()}
    assert sorted(own) == ["gradients", "weights"]
    counts, edges = np.histogram(kernel.astype(np.float64), 30)
    assert np.array_equal(own["weights"][0], counts)
    np.testing.assert_allclose(own["weights"][1], edges)
    expected = gradient(kernel, bias, x[8:12], y[8:12])[:3]  # of the third update
    np.testing.assert_allclose(
        own["gradients"][1][[0, -1]], [expected.min(), expected.max()], rtol=1e-4
    )
    found = {}
    for path in (tmp_path / "runs" / "r").iterdir():
        left = path.read_bytes()
        while left:
            size = int.from_bytes(left[:8], "little")
            event = Event.FromString(left[12 : 12 + size])
            for value in event.summary.value:
                if value.HasField("histo"):
                    found.setdefault(value.tag.partition("/")[0], []).append(
                        (event.step, sum(value.histo.bucket))
                    )
            left = left[16 + size :]
    assert found == {"weights": [(1, 3), (3, 3)], "gradients": [(1, 3), (3, 3)]}
    record = json.loads((tmp_path / "run.json").read_text())
    (section,) = (s for s in record["sections"] if s["title"] == "Weights and gradients")
    assert section["html"].count("<svg") == 2


def test_mistakes_are_said(tmp_path):
    for make in (
        lambda: GradientNoiseScale(0),
        lambda: GradientNoiseScale(smoothing=1),
        lambda: HistogramCallback(pattern="("),
    ):
        with pytest.raises(ConfigurationError, match="GradientNoiseScale: |HistogramCallback: "):
            make()
    with pytest.raises(ConfigurationError, match="'nothing' is in no path"):
        run(tmp_path, [HistogramCallback(pattern="nothing")])

    class OwnStep(keras.Sequential):
        def train_step(self, *args, **kwargs):
            return super().train_step(*args, **kwargs)

    model = OwnStep([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    with pytest.raises(ConfigurationError, match="a train_step of its own"):
        Trainer(
            model,
            arguments(tmp_path, learning_rate=None),
            train_dataset=make_data(8),
            callbacks=[GradientNoiseScale()],
        ).fit()
