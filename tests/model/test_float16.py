"""fp16: float16 arithmetic, a loss scale that adapts, overflow that costs an update and no more."""

import keras
import numpy as np
import pytest
from helpers import arguments, make_data, same, train_logs, weights, with_weights
from keras import layers

from kbtrain import ConfigurationError, Trainer, TrainingArguments


def model():
    inputs = keras.Input((3,))
    hidden = layers.Dense(8, activation="tanh")(inputs)
    return with_weights(keras.Model(inputs, layers.Dense(1)(hidden)), scale=0.3)


def data():
    x, y = make_data(24)
    return x, 0.1 * y  # small enough for the first scale, 2 ** 15


def trainer(folder, given=None, **changes):
    settings = {"per_device_train_batch_size": 4, "max_steps": 6, "fp16": True}
    settings |= {"lr_scheduler_type": "constant"}
    return Trainer(
        model(),
        arguments(folder, **(settings | changes)),
        train_dataset=given or data(),
        loss="mse",
    )


def test_it_trains_close_to_float32_with_a_scale_in_the_log(tmp_path):
    half, full = trainer(tmp_path / "a"), trainer(tmp_path / "b", fp16=False)
    half.fit()
    full.fit()
    layer = half.model.layers[1]
    assert (layer.compute_dtype, layer.variable_dtype) == ("float16", "float32")
    np.testing.assert_allclose(train_logs(half), train_logs(full), rtol=0.02)
    assert train_logs(half, "loss_scale") == [2.0**15] * 6


def test_an_overflow_leaves_out_the_update_and_halves_the_scale(tmp_path):
    x, y = data()
    y[8:12] = 3e4  # the third update; its gradients exceed float16 once they are scaled
    run = trainer(tmp_path, (x, y), lr_scheduler_type="linear", max_steps=4)
    run.fit()
    scales = train_logs(run, "loss_scale")
    assert scales == [2.0**15, 2.0**15, 2.0**15, 2.0**14]
    rates = train_logs(run, "learning_rate")
    assert rates[3] == rates[2], "the schedule went on without an update"
    assert run.state.global_step == 4
    assert all(np.isfinite(w).all() for w in weights(run.model))


def test_the_scale_is_part_of_a_checkpoint(tmp_path):
    x, y = data()
    y[8:12] = 3e4
    whole = trainer(tmp_path / "a", (x, y))
    whole.fit()
    settings = {"save_strategy": "steps", "save_steps": 4}
    trainer(tmp_path / "b", (x, y), max_steps=4, **settings).fit()
    resumed = trainer(tmp_path / "b", (x, y), **settings)
    resumed.fit(resume_from_checkpoint=True)
    assert same(weights(whole.model), weights(resumed.model))
    assert train_logs(whole, "loss_scale") == train_logs(resumed, "loss_scale")


def test_two_precisions_at_once_are_refused():
    with pytest.raises(ConfigurationError, match="bf16=True, fp16=True"):
        TrainingArguments(bf16=True, fp16=True)


def scaled_run(folder, optimizer, **changes):
    settings = {"per_device_train_batch_size": 4, "max_steps": 3, "logging_steps": 1} | changes
    return Trainer(
        model(),
        arguments(folder, **settings),
        train_dataset=data(),
        loss="mse",
        optimizers=(optimizer, None),
    )


def test_a_scale_under_which_the_norm_of_the_gradients_overflows_is_halved(tmp_path):
    # Each gradient is a float32 number of about 2 ** 90; the sum of their squares is none.
    sgd = keras.optimizers.SGD(0.1)
    optimizer = keras.optimizers.LossScaleOptimizer(sgd, initial_scale=2.0**90)
    run = scaled_run(tmp_path, optimizer)
    before = weights(run.model)
    run.fit()
    assert train_logs(run, "loss_scale") == [2.0**90, 2.0**89, 2.0**88]
    assert same(weights(run.model), before)


class Refusing(keras.optimizers.LossScaleOptimizer):
    def check_finite(self, grads):
        return keras.ops.convert_to_tensor(False)


def test_an_optimizer_that_looks_for_overflows_in_its_own_way_is_asked(tmp_path):
    run = scaled_run(tmp_path, Refusing(keras.optimizers.SGD(0.1), initial_scale=8.0))
    before = weights(run.model)
    run.fit()
    assert train_logs(run, "loss_scale") == [8.0, 4.0, 2.0]
    assert same(weights(run.model), before)
    assert "check_finite" not in vars(run.optimizer)
