"""Variables in float64: rules, state, schedules and averages are float64, to 1e-12 of NumPy's."""

import logging

import keras
import numpy as np
import pytest
from keras import ops
from references import CASES, trajectory

import optim
from optim.core import fallback, precision

UPDATES = 12


@pytest.fixture(autouse=True)
def _wide():
    """float64 by default, which JAX has only where it is told so."""
    before = keras.config.floatx()
    keras.config.set_floatx("float64")
    _switch_jax(True)
    yield
    _switch_jax(False)
    keras.config.set_floatx(before)


def _switch_jax(to):
    if keras.backend.backend() == "jax":
        import jax

        jax.config.update("jax_enable_x64", to)


def given(shape=(4, 5), updates=UPDATES):
    generator = np.random.default_rng(0)
    return generator.standard_normal(shape), generator.standard_normal((updates, *shape))


def run(optimizer, variables, gradients):
    for step in gradients:
        optimizer.apply([ops.convert_to_tensor(g) for g in step], variables)


def value(variable):
    return np.array(ops.convert_to_numpy(variable))


@pytest.mark.parametrize("name", CASES)
def test_follows_float64(name):
    """All cases of a rule, each to 1e-12 of its movement."""
    for case in CASES[name]:
        start, gradients = given()
        variable = keras.Variable(start)
        optimizer = optim.get(name, learning_rate=1e-2, **case)
        run(optimizer, [variable], gradients[:, None])
        assert {slot.dtype for slot in optimizer.slots_of(variable).values()} <= {"float64"}
        expected = trajectory(name, start, gradients, 1e-2, **case)[-1]
        error = np.linalg.norm(value(variable) - expected)
        # RAdam's rho is a difference of two numbers near 2e5 for a beta_2 of 0.99999.
        tolerance = 1e-10 if case.get("beta_2", 0) > 0.9999 else 1e-12
        assert error < tolerance * np.linalg.norm(expected - start), case


NAMES = {
    "schedule_free_adamw": optim.ScheduleFreeAdamW,
    "muon": optim.Muon,
    "soap": optim.SOAP,
    "galore_adamw": optim.GaLoreAdamW,
    "apollo_adamw": optim.APOLLOAdamW,
    "adafactor": optim.Adafactor,
    "adamw_8bit": optim.AdamW8bit,
}


@pytest.mark.parametrize("name", NAMES)
def test_a_shift_below_float32_is_carried_through(name):
    """Twice the same, of which one gradient is 1e-10 larger: float32 would not see it."""
    results = []
    for more in (0.0, 1e-10):
        start, gradients = given((64, 65) if "8bit" in name else (4, 4), 3)
        gradients = gradients * (1 + more)
        variable = keras.Variable(start, name="kernel")
        optimizer = NAMES[name](1e-2, epsilon=1e-2) if "adamw" in name else NAMES[name](1e-2)
        run(optimizer, [variable], gradients[:, None])
        dtypes = {slot.dtype for slot in optimizer.slots_of(variable).values()}
        assert "float64" in dtypes
        assert "float32" not in dtypes
        results.append(value(variable))
    assert results[0].dtype == np.float64
    difference = np.abs(results[1] - results[0]).max()
    assert difference < 1e-8
    # Those whose movement depends on the size of the gradient show it.
    if name in ("schedule_free_adamw", "galore_adamw", "adamw_8bit"):
        assert difference > 0


def test_a_schedule_is_float64():
    schedule = optim.LinearWithWarmup(0.1, 3, 10)
    for step in range(10):
        expected = 0.1 * (step / 3 if step < 3 else (10 - step) / 7)
        assert float(ops.convert_to_numpy(schedule(step))) == pytest.approx(expected, rel=1e-15)
    wave = optim.CosineWithWarmup(0.1, 0, 7)
    expected = 0.1 * (1 + np.cos(np.pi * 3 / 7)) / 2
    assert float(ops.convert_to_numpy(wave(3))) == pytest.approx(expected, rel=1e-14)


def test_schedule_accumulation_clipping_and_average():
    start, gradients = given()
    variable = keras.Variable(start)
    optimizer = optim.SGD(
        optim.LinearWithWarmup(0.1, 0, 7),
        gradient_accumulation_steps=2,
        global_clipnorm=0.7,
        use_ema=True,
        ema_momentum=0.3,
    )
    run(optimizer, [variable], gradients[:, None])
    expected, average = start.copy(), None
    for step in range(UPDATES // 2):
        gradient = gradients[2 * step : 2 * step + 2].mean(axis=0)
        gradient *= min(1.0, 0.7 / np.linalg.norm(gradient))
        expected = expected - 0.1 * (7 - step) / 7 * gradient
        average = expected if average is None else 0.3 * average + 0.7 * expected
    np.testing.assert_allclose(value(variable), expected, rtol=1e-12)
    optimizer.finalize_variable_values([variable])
    np.testing.assert_allclose(value(variable), average, rtol=1e-12)


def test_an_average_around_a_stock_optimizer():
    start, gradients = given()
    variable = keras.Variable(start)
    optimizer = optim.EMA(keras.optimizers.SGD(0.1), decay=0.9)
    run(optimizer, [variable], gradients[:, None])
    expected, average = start, None
    for t, gradient in enumerate(gradients, start=1):
        expected = expected - 0.1 * gradient
        share = 1 - min(0.9, (1 + t) / (10 + t))
        average = expected if average is None else average + share * (expected - average)
    optimizer.finalize_variable_values([variable])
    np.testing.assert_allclose(value(variable), average, rtol=1e-12)


def test_variables_of_two_dtypes():
    """Each in its own arithmetic; a clipped norm is of both, and the rate is Keras' float32."""
    keras.config.set_floatx("float32")
    start, gradients = given()
    wide = keras.Variable(start, dtype="float64", name="wide")
    narrow = keras.Variable(start.astype("float32"), dtype="float32", name="narrow")
    optimizer = optim.SGD(2.0**-6, momentum=0.9, global_clipnorm=1.0)
    pairs = [(g, g.astype("float32")) for g in gradients]
    run(optimizer, [wide, narrow], pairs)
    expected, momentum = start, 0.0
    for gradient in gradients:
        both = np.sqrt(
            np.sum(gradient**2) + np.sum(gradient.astype("float32").astype("float64") ** 2)
        )
        momentum = 0.9 * momentum + gradient * min(1.0, 1.0 / both)
        expected = expected - 2.0**-6 * momentum
    np.testing.assert_allclose(value(wide), expected, rtol=1e-8)
    np.testing.assert_allclose(value(narrow), expected, rtol=1e-4, atol=1e-6)
    assert value(narrow).dtype == np.float32
    assert optimizer.slots_of(wide)["momentum"].dtype == "float64"
    assert optimizer.slots_of(narrow)["momentum"].dtype == "float32"


def test_the_rules_of_keras_are_put_back():
    from keras.src.backend.common import dtypes

    before = dict(dtypes.BIT64_TO_BIT32_DTYPE)
    variable = keras.Variable(np.ones((2, 2)))
    run(optim.Muon(1e-2), [variable], np.ones((1, 1, 2, 2)))
    assert before == dtypes.BIT64_TO_BIT32_DTYPE


def test_other_rules_of_keras_are_noticed(monkeypatch, caplog):
    from keras.src.backend.common import dtypes

    monkeypatch.delattr(dtypes, "BIT64_TO_BIT32_DTYPE")
    monkeypatch.setattr(precision._narrowing, "is_broken", False)
    monkeypatch.setattr(fallback, "_reported", set())
    with caplog.at_level(logging.WARNING, "optim"):
        for _ in range(2):
            with precision.keeping_float64():
                pass
    messages = [r.getMessage() for r in caplog.records if r.name == "optim"]
    assert len(messages) == 1
    assert keras.__version__ in messages[0]
