"""Keras' own optimizers, schedules, loss scaling and mixed precision."""

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
)


@pytest.mark.parametrize("name", ["SGD", "Adam", "RMSprop", "Lion", "Adafactor", "Nadam", "Ftrl"])
def test_an_update_of_a_keras_optimizer_is_its_own_apply(tmp_path, name):
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
