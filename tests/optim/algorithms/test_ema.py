"""The wrapper `EMA` around optimizers of this package and of Keras."""

import keras
import numpy as np
import pytest
from keras import ops

import optim

INNER = {
    "ours": lambda **kw: optim.AdamW(0.1, **kw),
    "stock": lambda **kw: keras.optimizers.SGD(0.1, momentum=0.9, **kw),
}


def average(values, decay, warmup):
    mean = values[0].astype("float64")
    for t, value in enumerate(values[1:], start=2):
        kept = min(decay, (1 + t) / (10 + t)) if warmup else decay
        mean = kept * mean + (1 - kept) * value
    return mean


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("warmup", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_averages_and_leaves_the_training_alone(tools, rng, inner, warmup, dtype):
    start = rng.standard_normal(6).astype("float32")
    alone, wrapped = (keras.Variable(start, dtype=dtype) for _ in range(2))
    plain, optimizer = INNER[inner](), optim.EMA(INNER[inner](), decay=0.6, warmup=warmup)
    values = []
    for _ in range(12):
        gradient = ops.cast(rng.standard_normal(6).astype("float32"), dtype)
        plain.apply([gradient], [alone])
        optimizer.apply([gradient], [wrapped])
        values.append(tools.to_numpy(wrapped))
    np.testing.assert_array_equal(tools.to_numpy(wrapped), tools.to_numpy(alone))
    expected = average(values, 0.6, warmup)
    optimizer.swap_in_evaluation_weights()
    tolerance = 1e-6 if dtype == "float32" else 2.0**-8
    np.testing.assert_allclose(tools.to_numpy(wrapped), expected, rtol=tolerance)
    optimizer.swap_back()
    np.testing.assert_array_equal(tools.to_numpy(wrapped), values[-1])
    assert int(optimizer.iterations) == 12
    assert float(optimizer.learning_rate) == pytest.approx(0.1)


@pytest.mark.parametrize("inner", INNER)
def test_accumulation_counts_updates(tools, inner):
    variable = keras.Variable(np.zeros(2, "float32"))
    optimizer = optim.EMA(INNER[inner](gradient_accumulation_steps=2), decay=0.5, warmup=False)
    values = []
    for i in range(6):
        optimizer.apply([ops.ones(2)], [variable])
        if i % 2:
            values.append(tools.to_numpy(variable))
    optimizer.finalize_variable_values([variable])
    np.testing.assert_allclose(
        tools.to_numpy(variable), average(values, 0.5, False), rtol=1e-5, atol=1e-7
    )


def test_inside_loss_scale(tools, jit_compile):
    start = np.array([1.0, -2.0], "float32")
    ema = optim.EMA(optim.AdamW(0.1), decay=0.5, warmup=False)
    optimizer = keras.optimizers.LossScaleOptimizer(ema, initial_scale=8.0)
    model = tools.linear_model(optimizer, start, jit_compile)
    x = np.array([[1.0, 2.0], [np.inf, 1.0], [0.5, -1.0]], "float32")
    model.fit(x, np.zeros((3, 1), "float32"), batch_size=1, shuffle=False, verbose=0)
    rows = [x[0][:, None], x[2][:, None]]
    first, second = (tools.reference_adamw(start[:, None], rows[:n], 0.1) for n in (1, 2))
    np.testing.assert_allclose(
        tools.to_numpy(model.trainable_variables[0]), (first + second) / 2, rtol=1e-5
    )


def test_fit_save_and_load(tools, rng, tmp_path):
    x, y = rng.standard_normal((8, 4)).astype("float32"), np.ones((8, 1), "float32")
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(optim.EMA(keras.optimizers.Adam(0.1), decay=0.8), loss="mse")
    swap = optim.SwapEvaluationWeights()
    history = model.fit(
        x, y, epochs=3, batch_size=4, shuffle=False, validation_data=(x, y), callbacks=[swap],
        verbose=0,
    ).history  # fmt: skip
    assert model.evaluate(x, y, verbose=0) == pytest.approx(history["val_loss"][-1], rel=1e-5)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert type(loaded.optimizer) is optim.EMA
    assert loaded.optimizer.get_config() == model.optimizer.get_config()
    for each in (model, loaded):
        each.fit(x, y, epochs=1, verbose=0, batch_size=4, shuffle=False)
    for ours, theirs in zip(loaded.variables, model.variables, strict=True):
        np.testing.assert_array_equal(tools.to_numpy(ours), tools.to_numpy(theirs))


def test_state_and_what_is_passed_on(tools):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, name="only")], name="net")
    optimizer = optim.EMA(optim.AdamW(1.0, weight_decay=0.5, name="inner"), name="outer")
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    optimizer.build(model.trainable_variables)
    optimizer.build(model.trainable_variables)
    paths = [v.path for v in optimizer.variables]
    assert "outer/net_only_kernel_average" in paths
    assert "inner/net_only_kernel_momentum" in paths
    assert len(paths) == len(set(paths))
    inner = optimizer.inner_optimizer
    assert [inner.weight_decay_of(v) for v in model.trainable_variables] == [0.5, 0.0]
    optimizer.learning_rate = 0.25
    assert float(inner.learning_rate) == 0.25
    # There is no average yet, so nothing changes.
    before = model.get_weights()
    optimizer.swap_in_evaluation_weights()
    optimizer.swap_back()
    for a, b in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_missing_gradient(tools):
    variables = [keras.Variable(np.ones(2, "float32"), name=name) for name in "ab"]
    optimizer = optim.EMA(optim.AdamW(0.1))
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        optimizer.apply([ops.ones(2), None], variables)
    optimizer.finalize_variable_values(variables)
    np.testing.assert_array_equal(tools.to_numpy(variables[1]), 1.0)


def test_wrong_arguments():
    with pytest.raises(TypeError, match="Received: str"):
        optim.EMA("adamw")
    for inner in (
        optim.AdamW(use_ema=True),
        optim.ScheduleFreeSGD(),
        optim.EMA(optim.AdamW()),
        keras.optimizers.SGD(use_ema=True),
    ):
        with pytest.raises(ValueError, match="average of its own"):
            optim.EMA(inner)
    with pytest.raises(ValueError, match=r"LossScaleOptimizer\(EMA"):
        optim.EMA(keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD()))
    with pytest.raises(ValueError, match=r"decay.*\[0.0, 1.0\)"):
        optim.EMA(optim.AdamW(), decay=1.0)
