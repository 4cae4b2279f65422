"""Schedules against NumPy float64 and the numbers of the reference implementation."""

import math

import keras
import numpy as np
import pytest
from keras import ops

import optim


def values(schedule, steps):
    return [float(schedule(step)) for step in steps]


def test_golden(golden):
    data = golden("schedules")
    rate, expected = data["learning_rate"], data["schedules"]
    made = {
        "constant": optim.Constant(rate),
        "constant_with_warmup w=4": optim.ConstantWithWarmup(rate, 4),
        "linear w=2 T=10": optim.LinearWithWarmup(rate, 2, 10),
        "cosine w=2 T=10": optim.CosineWithWarmup(rate, 2, 10, clamp=False),
    }
    assert made.keys() == expected.keys()
    for name, schedule in made.items():
        np.testing.assert_allclose(
            values(schedule, range(12)), expected[name], rtol=1e-6, atol=1e-6, err_msg=name
        )


def test_cosine_stays_down_past_the_end(golden):
    expected = golden("schedules")["schedules"]["cosine w=2 T=10"][:11] + [0.0]
    schedule = optim.CosineWithWarmup(10.0, 2, 10)
    np.testing.assert_allclose(values(schedule, range(12)), expected, rtol=1e-6, atol=1e-6)
    assert float(schedule(10)) == 0.0
    assert float(schedule(10_000)) == 0.0
    # It stays at its last value, not at 0.
    quarter = optim.CosineWithWarmup(1.0, 0, 10, num_cycles=0.25)
    np.testing.assert_allclose(values(quarter, [10, 11, 50]), 0.5, rtol=1e-6)


@pytest.mark.parametrize("warmup", [0, 1, 500])
@pytest.mark.parametrize("total", [1000, 123_457])
def test_long_runs_follow_float64(warmup, total):
    steps = [0, 1, warmup, warmup + 1, total // 3, total - 1, total, total + 10]

    def expected(step, shape):
        if step < warmup:
            return 3e-4 * step / warmup
        return 3e-4 * shape(step)

    def linear(s):
        return max(0.0, (total - s) / (total - warmup))

    def cosine(s):
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (s - warmup) / (total - warmup))))

    for schedule, shape in (
        (optim.LinearWithWarmup(3e-4, warmup, total), linear),
        (optim.CosineWithWarmup(3e-4, warmup, total), cosine),
    ):
        np.testing.assert_allclose(
            values(schedule, steps), [expected(s, shape) for s in steps], rtol=2e-6, atol=1e-10
        )


def test_warmup_longer_than_the_training():
    assert values(optim.LinearWithWarmup(1.0, 8, 4), [0, 4, 7, 8, 9]) == [0.0, 0.5, 0.875, 0, 0]


@pytest.mark.parametrize(
    "schedule",
    [
        optim.Constant(0.5),
        optim.ConstantWithWarmup(0.5, 4),
        optim.LinearWithWarmup(0.5, 2, 10),
        optim.CosineWithWarmup(0.5, 2, 10, num_cycles=1.5, clamp=False),
    ],
    ids=lambda schedule: type(schedule).__name__,
)
def test_common_contract(schedule):
    # Any kind of step, always a float32 scalar.
    variable = keras.Variable(5, dtype="int", trainable=False)
    for step in (5, np.int64(5), ops.convert_to_tensor(5), variable):
        result = schedule(step)
        assert keras.utils.standardize_dtype(result.dtype) == "float32"
        assert tuple(result.shape) == ()
        assert float(result) == float(schedule(5))
    config = keras.optimizers.schedules.serialize(schedule)
    again = keras.optimizers.schedules.deserialize(config)
    assert type(again) is type(schedule)
    assert again.get_config() == schedule.get_config()
    assert values(again, range(12)) == values(schedule, range(12))


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("learning_rate", -1.0),
        ("learning_rate", "fast"),
        ("num_warmup_steps", -1),
        ("num_warmup_steps", 0.5),
        ("num_warmup_steps", None),
        ("num_training_steps", 0),
        ("num_training_steps", -1),
        ("num_training_steps", float("inf")),
        ("num_training_steps", True),
        ("num_cycles", -0.5),
    ],
)
def test_arguments_are_checked(argument, value):
    arguments = {"learning_rate": 1.0, "num_warmup_steps": 0, "num_training_steps": 10}
    with pytest.raises(ValueError, match=argument) as caught:
        optim.CosineWithWarmup(**{**arguments, argument: value})
    assert f"Received: {argument}={value!r}" in str(caught.value)
