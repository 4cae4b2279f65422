"""Models in float64: every number of a run is one of NumPy's in float64, to 1e-12."""

import logging

import keras
import numpy as np
import pytest
from helpers import arguments, train_logs
from keras import layers, ops

from kbtrain import Trainer
from kbtrain.data.tree import to_numpy
from kbtrain.utils import fallback, float64
from kbtrain.utils.packages import keras_private


@pytest.fixture(autouse=True)
def _wide():
    """float64 by default, which JAX has only where it is told so."""
    floatx, policy = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    switch_jax(True)
    yield
    switch_jax(False)
    keras.config.set_floatx(floatx)
    keras.config.set_dtype_policy(policy)


def switch_jax(to):
    if keras.backend.backend() == "jax":
        import jax

        jax.config.update("jax_enable_x64", to)


def data(samples=12):
    generator = np.random.default_rng(0)
    x = generator.normal(size=(samples, 3))
    return x, x @ np.array([[1.0], [2.0], [3.0]]) + 0.1 * generator.normal(size=(samples, 1))


def linear(dtype=None):
    model = keras.Sequential([keras.Input((3,)), layers.Dense(1, use_bias=False, dtype=dtype)])
    model.layers[0].set_weights([np.full((3, 1), 0.1)])
    return model


def descent(x, y, batch, rate, steps, clip=None):
    """Weights, and the losses and norms on the way."""
    w, losses, norms = np.full((3, 1), 0.1), [], []
    for step in range(steps):
        rows = slice(step * batch % len(x), step * batch % len(x) + batch)
        error = x[rows] @ w - y[rows]
        gradient = 2 * x[rows].T @ error / len(error)
        norm = np.linalg.norm(gradient)
        losses.append(np.mean(error**2))
        norms.append(norm)
        factor = 1.0 if clip is None else min(clip / (norm + 1e-6), 1.0)
        w = w - rate * factor * gradient
    return w, losses, norms


def trainer(folder, model=None, given=None, rate=0.1, **changes):
    settings = {"per_device_train_batch_size": 4, "max_steps": 6, "max_grad_norm": 0}
    return Trainer(
        linear() if model is None else model,
        arguments(folder, **(settings | changes)),
        train_dataset=data() if given is None else given,
        eval_dataset=data(),
        loss="mse",
        optimizers=(keras.optimizers.SGD(rate), None),
    )


def weight(run):
    return ops.convert_to_numpy(run.model.trainable_variables[0])


@pytest.mark.parametrize(
    ("changes", "clip"),
    [
        ({}, None),
        ({"max_grad_norm": 0.5}, 0.5),
        ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}, None),
        ({"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}, None),
    ],
)
def test_training_is_gradient_descent_in_float64(tmp_path, changes, clip):
    run = trainer(tmp_path, **changes)
    run.fit()
    batch = run.args.per_device_train_batch_size * run.args.gradient_accumulation_steps
    expected, losses, norms = descent(*data(), batch, 0.1, 6, clip)
    np.testing.assert_allclose(weight(run), expected, rtol=1e-12)
    np.testing.assert_allclose(train_logs(run), losses, rtol=1e-12)
    np.testing.assert_allclose(train_logs(run, "grad_norm"), norms, rtol=1e-12)
    assert train_logs(run, "learning_rate") == [0.1] * 6


def test_evaluation_and_prediction_are_float64(tmp_path):
    run, (x, y) = trainer(tmp_path, per_device_eval_batch_size=5), data()
    outputs = x @ np.full((3, 1), 0.1)
    assert run.evaluate()["eval_loss"] == pytest.approx(np.mean((outputs - y) ** 2), rel=1e-14)
    predicted = run.predict(x).predictions
    assert predicted.dtype == np.float64
    np.testing.assert_allclose(predicted, outputs, rtol=1e-14)


def test_weights_and_added_losses(tmp_path):
    x, y = data()
    weights = np.random.default_rng(1).uniform(0.5, 1.5, size=12)
    model = keras.Sequential(
        [
            keras.Input((3,)),
            layers.Dense(1, use_bias=False, kernel_regularizer=keras.regularizers.L2(2**-7)),
        ]
    )
    model.layers[0].set_weights([np.full((3, 1), 0.1)])
    run = trainer(tmp_path, model, (x, y, weights), per_device_train_batch_size=12, max_steps=1)
    run.fit()
    w = np.full((3, 1), 0.1)
    error = x @ w - y
    gradient = 2 * x.T @ (weights[:, None] * error) / 12 + 2 * 2**-7 * w
    np.testing.assert_allclose(weight(run), w - 0.1 * gradient, rtol=1e-12)


def test_a_checkpoint_keeps_every_digit(tmp_path):
    whole = trainer(tmp_path / "a")
    whole.fit()
    settings = {"save_strategy": "steps", "save_steps": 3}
    trainer(tmp_path / "b", max_steps=3, **settings).fit()
    resumed = trainer(tmp_path / "b", **settings)
    resumed.fit(resume_from_checkpoint=True)
    assert weight(resumed).dtype == np.float64
    assert weight(resumed).tobytes() == weight(whole).tobytes()


def test_a_layer_in_float64_among_others(tmp_path):
    """What float32 cuts off stays in the layers that have it; the others train as ever."""
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")
    inputs = keras.Input((3,))
    narrow = layers.Dense(2, use_bias=False, name="narrow")
    wide = layers.Dense(1, use_bias=False, dtype="float64", name="wide")
    model = keras.Model(inputs, wide(narrow(inputs)))
    first, second = np.full((3, 2), 0.25, "float32"), np.array([[1.0 + 1e-10], [2.0]])
    narrow.set_weights([first])
    wide.set_weights([second])
    x, y = (a.astype("float32") for a in data(4))
    run = trainer(
        tmp_path,
        model,
        (x, y),
        rate=2.0**-10,
        max_steps=1,
        max_grad_norm=1.0,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
    )
    run.fit()
    dtypes = [ops.convert_to_numpy(v).dtype for v in model.trainable_variables]
    assert dtypes == [np.float32, np.float64]
    hidden = x.astype("float64") @ first
    error = hidden @ second - y
    gradients = [2 * x.T @ (error @ second.T) / 4, 2 * hidden.T @ error / 4]
    norm = np.sqrt(sum((g**2).sum() for g in gradients))
    expected = [
        w - 2.0**-10 * g / (norm + 1e-6) for w, g in zip([first, second], gradients, strict=True)
    ]
    np.testing.assert_allclose(narrow.get_weights()[0], expected[0], rtol=1e-6)
    # Labels, and so the error, are float32 in this model's loss.
    np.testing.assert_allclose(wide.get_weights()[0], expected[1], rtol=1e-9)
    assert train_logs(run, "grad_norm")[0] == pytest.approx(norm, rel=1e-6)


def test_data_in_float64_stays_so_only_where_keras_computes_in_it():
    value = np.array([1 / 3])
    assert to_numpy(value).dtype == np.float64
    keras.config.set_floatx("float32")
    assert to_numpy(value).dtype == np.float32


def test_other_models_find_the_rules_of_keras_as_they_are():
    from keras.src.backend.common import dtypes

    before = dict(dtypes.BIT64_TO_BIT32_DTYPE)
    with float64.kept(linear()):
        assert keras.backend.result_type("float64", "float32") == "float64"
    keras.config.set_dtype_policy("float32")
    with float64.kept(linear()):
        assert before == dtypes.BIT64_TO_BIT32_DTYPE
    assert before == dtypes.BIT64_TO_BIT32_DTYPE


def test_other_rules_of_keras_are_noticed(monkeypatch, caplog):
    from keras.src.backend.common import dtypes

    monkeypatch.delattr(dtypes, "BIT64_TO_BIT32_DTYPE")
    monkeypatch.setattr(keras_private.narrowing_table, "is_broken", False)
    monkeypatch.setattr(fallback, "_reported", set())
    with caplog.at_level(logging.WARNING, "kbtrain"):
        for _ in range(2):
            with float64.kept(linear()):
                pass
    messages = [r.getMessage() for r in caplog.records if r.name == "kbtrain"]
    assert len(messages) == 1
    assert keras.__version__ in messages[0]
    monkeypatch.setattr(keras_private.narrowing_table, "is_broken", False)
