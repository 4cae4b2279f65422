"""The learning-rate range test: its numbers, its suggestion, and that it leaves no trace."""

import logging
import random

import keras
import numpy as np
import pytest
from helpers import Recorder, arguments, batch_norm_model, linear_model, make_data, same, weights

from kbtrain import ConfigurationError, Trainer
from kbtrain.trainer.lr_finder import analyse


def expected_losses(x, y, low, high, steps, batch):
    """SGD on the mean squared error of a linear model, in NumPy."""
    kernel, bias = (w.astype(np.float64) for w in weights(linear_model()))
    losses = []
    for step in range(steps):
        rows = slice(step * batch % len(x), step * batch % len(x) + batch)
        error = x[rows] @ kernel + bias - y[rows]
        losses.append(float(np.mean(error**2)))
        rate = low * (high / low) ** (step / (steps - 1))
        kernel = kernel - rate * 2 * x[rows].T @ error / batch
        bias = bias - rate * 2 * error.mean(0)
    return losses


def test_losses_and_suggestion_are_those_of_numpy(tmp_path):
    x, y = make_data(32)
    trainer = Trainer(
        linear_model(),
        arguments(tmp_path, per_device_train_batch_size=8, max_grad_norm=0.0),
        train_dataset=(x, y),
        loss="mse",
        optimizers=(keras.optimizers.SGD(0.1), None),
    )
    low, high, steps = 1e-3, 0.3, 20
    result = trainer.find_learning_rate(low, high, steps, smoothing=0.5)
    expected = expected_losses(x.astype(np.float64), y.astype(np.float64), low, high, steps, 8)
    assert result.losses == pytest.approx(expected, rel=1e-4)
    assert result.learning_rates == pytest.approx(np.geomspace(low, high, steps))
    # The suggestion again: the moving average corrected for its start, and differences by hand.
    smooth = [
        sum(0.5 ** (i - j) * expected[j] for j in range(i + 1))
        / sum(0.5 ** (i - j) for j in range(i + 1))
        for i in range(steps)
    ]
    assert result.smoothed == pytest.approx(smooth, rel=1e-4)
    inner = [smooth[i + 1] - smooth[i - 1] for i in range(1, steps - 1)]
    slopes = [2 * (smooth[1] - smooth[0]), *inner, 2 * (smooth[-1] - smooth[-2])]
    lowest = int(np.argmin(smooth))
    steepest = int(np.argmin(slopes[: lowest + 1]))
    assert result.suggestion == pytest.approx(np.geomspace(low, high, steps)[steepest])
    assert result.at_minimum == pytest.approx(np.geomspace(low, high, steps)[lowest])
    assert not result.diverged
    page = result._repr_html_()
    assert f"{result.suggestion:.3g}" in page
    assert "<polyline" in page


@pytest.mark.core
def test_a_run_after_the_test_is_that_without_it(tmp_path):
    def make():
        recorder = Recorder()
        trainer = Trainer(
            batch_norm_model(dropout=0.3),
            arguments(tmp_path, max_steps=3, train_sampling_strategy="random", jit_compile=False),
            train_dataset=make_data(20),
            loss="mse",
            callbacks=[recorder],
        )
        return trainer, recorder

    plain, events = make()
    plain.fit()
    tested, more = make()
    before = weights(tested.model)
    result = tested.find_learning_rate(1e-4, 1e3, 12)
    assert len(result.losses) > 5
    assert same(before, weights(tested.model))
    assert tested.optimizer is None
    assert tested.state.global_step == 0
    tested.fit()
    assert same(weights(tested.model), weights(plain.model))
    assert more.events == events.events


def test_the_optimizer_of_a_compiled_model_is_copied(tmp_path):
    model = linear_model()
    model.compile(keras.optimizers.Adam(0.01), "mse")
    args = arguments(tmp_path, learning_rate=None, max_steps=1)
    trainer = Trainer(model, args, train_dataset=make_data(16))
    trainer.fit()
    state, values = [v.numpy() for v in model.optimizer.variables], weights(model)
    trainer.find_learning_rate(1e-4, 0.1, 6)
    assert same(values, weights(model))
    assert same(state, [v.numpy() for v in model.optimizer.variables])
    assert trainer.optimizer is model.optimizer
    assert trainer.state.global_step == 1


def test_a_test_that_diverges_ends_early(tmp_path):
    trainer = Trainer(
        linear_model(),
        arguments(tmp_path, max_grad_norm=0.0),
        train_dataset=make_data(32),
        loss="mse",
        optimizers=(keras.optimizers.SGD(0.1), None),
    )
    result = trainer.find_learning_rate(1e-3, 1e6, 60)
    assert result.diverged
    assert len(result.losses) < 60
    assert 1e-3 < result.suggestion < 3
    assert "diverged" in str(result)


def test_what_cannot_be_tested_is_said(tmp_path):
    trainer = Trainer(linear_model(), arguments(tmp_path), train_dataset=make_data(8), loss="mse")
    for wrong in ({"min_lr": 0.0}, {"min_lr": 2.0}, {"num_steps": 2}, {"divergence": 1}):
        with pytest.raises(ConfigurationError, match="find_learning_rate needs"):
            trainer.find_learning_rate(**wrong)


class Noisy:
    """Data that draw from the global generators."""

    def __init__(self):
        self.x, self.y = make_data(16)

    def __iter__(self):
        for x, y in zip(self.x, self.y, strict=True):
            yield x + np.float32(np.random.normal() + random.random()), y  # noqa: NPY002


@pytest.mark.parametrize("built", [True, False])
def test_augmentation_by_global_generators_is_that_without_the_test(tmp_path, built):
    def run(test):
        keras.utils.set_random_seed(3)
        model = keras.Sequential([keras.layers.Dense(4), keras.layers.Dense(1)])
        if built:
            model.build((None, 3))
        args = arguments(tmp_path, max_steps=3, per_device_train_batch_size=4)
        trainer = Trainer(model, args, train_dataset=Noisy(), loss="mse")
        if test:
            trainer.find_learning_rate(1e-4, 0.1, 6)
        trainer.fit()
        return weights(model)

    assert same(run(test=True), run(test=False))


def test_data_that_can_be_read_once_are_refused(tmp_path):
    x, y = make_data(32)
    rows = ((a, b) for a, b in zip(x, y, strict=True))
    args = arguments(tmp_path, max_steps=2, per_device_train_batch_size=4)
    trainer = Trainer(linear_model(), args, train_dataset=rows, loss="mse")
    with pytest.raises(ConfigurationError, match="can be read only once"):
        trainer.find_learning_rate(1e-4, 0.1, 6)
    trainer.fit()  # nothing of it was read
    assert trainer.state.global_step == 2


def test_data_that_end_early_have_not_diverged(tmp_path, caplog):
    class Once:
        """Data with nothing left after the first reading but one."""

        def __init__(self):
            self.readings = 0

        def __iter__(self):
            self.readings += 1
            return iter([] if self.readings > 2 else list(zip(*make_data(16), strict=True)))

    args = arguments(tmp_path, per_device_train_batch_size=4)
    trainer = Trainer(linear_model(), args, train_dataset=Once(), loss="mse")
    with caplog.at_level(logging.WARNING, "kbtrain"):
        result = trainer.find_learning_rate(1e-5, 1e-3, 12)
    assert not result.diverged
    assert f"ended after {len(result.losses)} of the 12 updates" in caplog.text


@pytest.mark.parametrize(
    ("losses", "advice"),
    [
        ([5.0, 4.0, 3.5, 2.0, 1.0, 0.5], "raise max_lr"),
        ([1.0, 2.0, 3.0, 3.0, 3.0, 3.0], "lower min_lr"),
        ([5.0, 3.0, 2.9, 2.8, 3.0, 3.0], "lower min_lr"),  # steepest at the first rate
        ([5.0, 4.9, 3.0, 2.9, 3.0, 3.0], ""),
        ([5.0, 4.9, 3.0, 2.9], ""),  # the data ended
    ],
)
def test_an_answer_at_an_edge_says_which_limit_to_change(losses, advice):
    result = analyse(losses, 1e-4, 1.0, 6, smoothing=0.0, divergence=4.0)
    assert not result.diverged
    assert advice in result.advice
    assert bool(advice) == bool(result.advice)
    assert result.advice in str(result)
