"""The schedule-free optimizers against NumPy float64, in the three sequences of the paper."""

import math

import keras
import numpy as np
import pytest

import optim


def reference(kind, start, gradients, rate, beta_1=0.9, beta_2=0.999, epsilon=1e-8, r=0.0,
              power=2.0, weight_decay=0.0, silent=True):  # fmt: skip
    """(y, x) after the updates: z moves, x averages, y is in between. float64."""
    y = x = z = np.asarray(start, "float64")
    v, total, largest = np.zeros_like(z), 0.0, 0.0
    for t, gradient in enumerate(gradients, start=1):
        g = np.asarray(gradient, "float64")
        lr = rate(t - 1) if callable(rate) else rate
        v = beta_2 * v + (1 - beta_2) * g**2
        u = g if kind == "sgd" else g / (np.sqrt(v / (1 - beta_2**t)) + epsilon)
        if kind == "radam":
            limit = 2 / (1 - beta_2) - 1
            rho = limit - 2 * t * beta_2**t / (1 - beta_2**t)
            if rho > 4:
                top = (rho - 4) * (rho - 2) * limit
                lr *= math.sqrt(top / ((limit - 4) * (limit - 2) * rho))
            else:
                u, lr = g, lr * (0.0 if silent else 1.0)
        u = u + weight_decay * y
        largest = max(largest, lr)
        weight = t**r * largest**power
        total += weight
        c = weight / total if total > 0 else 0.0
        z = z - lr * u
        x = (1 - c) * x + c * z
        y = (1 - beta_1) * z + beta_1 * x
    return y, x


CLASSES = {
    "adamw": optim.ScheduleFreeAdamW,
    "radam": optim.ScheduleFreeRAdam,
    "sgd": optim.ScheduleFreeSGD,
}


def evaluated(tools, optimizer, variable):
    optimizer.swap_in_evaluation_weights()
    value = tools.to_numpy(variable)
    optimizer.swap_back()
    return value


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("scale", [1.0, 1e-7])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_follows_float64(tools, rng, kind, scale, weight_decay):
    start = rng.standard_normal(40).astype("float32") * 0.01
    if kind == "sgd":
        start *= scale
    gradients = [(rng.standard_normal(40) * scale).astype("float32") for _ in range(20)]
    variable = keras.Variable(start)
    optimizer = CLASSES[kind](0.01, weight_decay=weight_decay)
    tools.run(optimizer, [variable], [[g] for g in gradients])
    y, x = reference(kind, start, gradients, 0.01, weight_decay=weight_decay)
    assert tools.relative_to_movement(tools.to_numpy(variable), y, start) < 5e-6
    assert tools.relative_to_movement(evaluated(tools, optimizer, variable), x, start) < 5e-6
    assert not np.allclose(x, y, atol=1e-3 * np.abs(x - start).max())


@pytest.mark.parametrize("kind", CLASSES)
def test_bfloat16_follows_the_same_path(tools, rng, kind):
    variable = keras.Variable(rng.standard_normal(20).astype("float32"), dtype="bfloat16")
    start = tools.to_numpy(variable)
    gradients = [rng.standard_normal(20).astype("float32") for _ in range(15)]
    optimizer = CLASSES[kind](0.05)
    tools.run(optimizer, [variable], [[g] for g in gradients])
    y, x = reference(kind, start, gradients, 0.05)
    total = tools.to_numpy(variable) + tools.to_numpy(optimizer.slots_of(variable)["residual"])
    assert tools.relative_to_movement(total, y, start) < 1e-4
    # What is evaluated is the rounded average, not an average of rounded weights.
    rounded = tools.to_numpy(keras.ops.cast(x.astype("float32"), "bfloat16"))
    off = evaluated(tools, optimizer, variable) != rounded
    assert np.mean(off) <= 0.05


@pytest.mark.parametrize("kind", CLASSES)
def test_warm_up_from_zero_and_other_weights(tools, rng, kind):
    schedule = optim.ConstantWithWarmup(0.1, num_warmup_steps=4)
    start = rng.standard_normal(10).astype("float32") * 0.1
    gradients = [rng.standard_normal(10).astype("float32") for _ in range(9)]
    variable = keras.Variable(start)
    name = "momentum" if kind == "sgd" else "beta_1"
    optimizer = CLASSES[kind](schedule, r=1.0, weight_lr_power=1.0, **{name: 0.7})
    tools.run(optimizer, [variable], [[g] for g in gradients])
    y, x = reference(
        kind, start, gradients, lambda s: 0.1 * min(1, s / 4), beta_1=0.7, r=1.0, power=1.0
    )
    assert tools.relative_to_movement(tools.to_numpy(variable), y, start) < 5e-6
    assert tools.relative_to_movement(evaluated(tools, optimizer, variable), x, start) < 5e-6


def test_radam_begins_as_told(tools):
    start, gradients = np.ones(3, "float32"), [np.full(3, 0.5, "float32")] * 7
    for silent in (True, False):
        variable = keras.Variable(start)
        optimizer = optim.ScheduleFreeRAdam(0.1, silent_sgd_phase=silent)
        tools.run(optimizer, [variable], [[g] for g in gradients[:4]])
        assert np.all(tools.to_numpy(variable) == 1.0) == silent
        tools.run(optimizer, [variable], [[g] for g in gradients[4:]])
        y, _ = reference("radam", start, gradients, 0.1, silent=silent)
        np.testing.assert_allclose(tools.to_numpy(variable), y, rtol=2e-6)


@pytest.mark.parametrize("kind", CLASSES)
def test_finalized_training_goes_on_from_the_average(tools, rng, kind):
    start = rng.standard_normal(10).astype("float32")
    gradients = [rng.standard_normal(10).astype("float32") for _ in range(12)]
    variable = keras.Variable(start)
    optimizer = CLASSES[kind](0.05)
    tools.run(optimizer, [variable], [[g] for g in gradients])
    _, x = reference(kind, start, gradients, 0.05)
    optimizer.finalize_variable_values([variable])
    np.testing.assert_allclose(tools.to_numpy(variable), x, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(evaluated(tools, optimizer, variable), x, rtol=1e-5, atol=1e-6)
    tools.run(optimizer, [variable], [[gradients[0]]])
    moved = np.abs(tools.to_numpy(variable) - x).max()
    assert 0 < moved < 0.2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"beta_1": 1.0}, "beta_1"),
        ({"beta_1": 0.0}, "beta_1"),
        ({"beta_2": 1.0}, "beta_2"),
        ({"epsilon": -1.0}, "epsilon"),
        ({"r": -1.0}, "`r`"),
        ({"weight_lr_power": -1.0}, "weight_lr_power"),
        ({"use_ema": True}, "use_ema"),
    ],
)
def test_hyperparameters_are_checked(arguments, message):
    for kind in ("adamw", "radam"):
        with pytest.raises(ValueError, match=message):
            CLASSES[kind](**arguments)


def test_hyperparameters_of_the_others_are_checked():
    with pytest.raises(ValueError, match=r"beta_2.*\[0.6, 1.0\)"):
        optim.ScheduleFreeRAdam(beta_2=0.5)
    with pytest.raises(ValueError, match="momentum"):
        optim.ScheduleFreeSGD(momentum=0.0)


@pytest.mark.parametrize("kind", CLASSES)
def test_keras_file_continues_and_evaluates_the_average(tools, rng, tmp_path, kind):
    x, y = rng.standard_normal((8, 4)).astype("float32"), np.ones((8, 1), "float32")
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(CLASSES[kind](0.1, r=0.5), loss="mse")
    swap = optim.SwapEvaluationWeights()
    history = model.fit(
        x, y, epochs=3, batch_size=4, shuffle=False, validation_data=(x, y), callbacks=[swap],
        verbose=0,
    ).history  # fmt: skip
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.optimizer.get_config() == model.optimizer.get_config()
    assert loaded.evaluate(x, y, verbose=0) == pytest.approx(history["val_loss"][-1], rel=1e-5)
    for each in (model, loaded):
        each.fit(x, y, epochs=1, verbose=0, batch_size=4, shuffle=False)
    for ours, theirs in zip(loaded.variables, model.variables, strict=True):
        np.testing.assert_array_equal(tools.to_numpy(ours), tools.to_numpy(theirs))
