"""Schedules against NumPy float64 and the numbers of Transformers."""

import importlib.util
import math
import sys

import keras
import numpy as np
import pytest
from keras import ops

import optim
from optim.schedules.cosine import turn_remainder

pytestmark = pytest.mark.core


def values(schedule, steps):
    return [float(schedule(step)) for step in steps]


# --- the formulas, in float64: made(rate, w, T), and the share after the warm-up -----------------


def half(x):
    return 0.5 * (1 + math.cos(math.pi * x))


def shape_of(kind, u):
    return {"linear": 1 - u, "cosine": half(u), "1-sqrt": 1 - math.sqrt(u)}[kind]


def progress(s, w, total):
    return (s - w) / max(1, total - w)


def polynomial(s, w, total):
    if s > total or w == total:  # where w = T Transformers divides by 0
        return 0.01
    return 0.99 * (1 - (s - w) / (total - w)) ** 1.5 + 0.01


def restarts(s, w, total):
    phase = 3 * (s - w) % max(1, total - w)
    return 0.0 if progress(s, w, total) >= 1 else half(phase / max(1, total - w))


def wsd(s, w, total):
    end, length = total - total // 4, total // 4
    if s < end:
        return 1.0
    return 0.1 if s >= total else 0.9 * shape_of("1-sqrt", (s - end) / length) + 0.1


# Name -> (class, arguments, share after the warm-up, share during it or None for s / w).
FORMULAS = {
    "constant_with_warmup": (optim.ConstantWithWarmup, {}, lambda s, w, t: 1.0, None),
    "linear": (
        optim.LinearWithWarmup,
        {},
        lambda s, w, t: max(0.0, (t - s) / max(1, t - w)),
        None,
    ),
    "cosine": (
        optim.CosineWithWarmup,
        {},
        lambda s, w, t: half(min(1.0, progress(s, w, t))),
        None,
    ),
    "cosine of two and a half waves": (
        optim.CosineWithWarmup,
        {"num_cycles": 2.5},
        lambda s, w, t: half(5 * min(1.0, progress(s, w, t))),
        None,
    ),
    "cosine of odd waves": (
        optim.CosineWithWarmup,
        {"num_cycles": 0.123456789},
        lambda s, w, t: half(2 * 0.123456789 * min(1.0, progress(s, w, t))),
        None,
    ),
    "cosine_with_restarts": (optim.CosineWithRestarts, {"num_cycles": 3}, restarts, None),
    "polynomial": (
        optim.PolynomialWithWarmup,
        {"lr_end": 0.003, "power": 1.5},
        polynomial,
        None,
    ),
    "inverse_sqrt": (
        optim.InverseSqrtWithWarmup,
        {},
        lambda s, w, t: 1 / math.sqrt((s + (w or 10_000) - w) / (w or 10_000)),
        None,
    ),
    "inverse_sqrt with timescale": (
        optim.InverseSqrtWithWarmup,
        {"timescale": 3},
        lambda s, w, t: 1 / math.sqrt((s + 3 - w) / 3),
        None,
    ),
    "cosine_with_min_lr": (
        optim.CosineWithMinLR,
        {"min_lr": 0.03},
        lambda s, w, t: 0.9 * half(min(1.0, progress(s, w, t))) + 0.1,
        None,
    ),
    "cosine_warmup_with_min_lr": (
        optim.CosineWarmupWithMinLR,
        {"min_lr_rate": 0.1},
        lambda s, w, t: 0.9 * half(min(1.0, progress(s + 1, w, t))) + 0.1,
        lambda s, w: (s + 1) / w,
    ),
    "cosine_warmup_with_min_lr from a share": (
        optim.CosineWarmupWithMinLR,
        {"min_lr_rate": 0.1, "warmup_lr_rate": 0.25},
        lambda s, w, t: 0.9 * half(min(1.0, progress(s + 1, w, t))) + 0.1,
        lambda s, w: 0.25 + 0.75 * s / max(1, w - 1),
    ),
}
RATE = 0.3


def make(name, w, total):
    factory, arguments = FORMULAS[name][:2]
    finite = "num_training_steps" in factory.__init__.__code__.co_varnames
    counts = {"num_training_steps": total} if finite else {}
    return factory(RATE, num_warmup_steps=w, **counts, **arguments)


def expected(name, steps, w, total):
    share, warmup = FORMULAS[name][2:]
    warmup = warmup or (lambda s, w: s / w)
    return [RATE * (warmup(s, w) if s < w else share(s, w, total)) for s in steps]


@pytest.mark.parametrize("name", FORMULAS)
def test_every_step_follows_the_formula(name):
    for w, total in ((0, 9), (1, 9), (4, 21), (9, 9), (12, 9), (0, 1)):
        steps = range(32)
        result = ops.convert_to_numpy(make(name, w, total)(np.arange(32)))
        np.testing.assert_allclose(
            result, expected(name, steps, w, total), rtol=1e-6, atol=1e-8, err_msg=f"{w} {total}"
        )


@pytest.mark.parametrize("name", FORMULAS)
def test_long_runs_are_exact_to_rounding(name):
    w, total = 12_345, 10_000_019
    ends = [0, w, total // 6, total // 3, total // 2, total - w, total]
    steps = sorted({max(0, end + d) for end in ends for d in (-20, -3, -1, 0, 1, 2, 17)})
    result = ops.convert_to_numpy(make(name, w, total)(np.array(steps)))
    # The waves that are not counted in whole numbers lose the digits of their phase.
    loose = {"rtol": 2e-5} if name == "cosine of odd waves" else {"rtol": 1e-6, "atol": 1e-15}
    np.testing.assert_allclose(result, expected(name, steps, w, total), **loose)


@pytest.mark.parametrize("cycles", [3, 7, 100])
@pytest.mark.parametrize("length", [21, 100, 999_983])
def test_restarts_come_at_the_right_update(cycles, length):
    schedule = optim.CosineWithRestarts(1.0, 5, length + 5, num_cycles=cycles)
    begins = [-(-k * length // cycles) for k in range(cycles)]
    # Updates that are a multiple of the cycle in whole numbers start at the full rate.
    exact = [b for k, b in enumerate(begins) if k * length % cycles == 0]
    assert exact
    result = ops.convert_to_numpy(schedule(np.resize(exact, 100) + 5))
    np.testing.assert_array_equal(result, np.ones(100, "float32"))
    before = np.resize(begins[1:], 100)
    np.testing.assert_allclose(
        ops.convert_to_numpy(schedule(before + 4)),
        [half((cycles * (b - 1) % length) / length) for b in before],
        rtol=1e-6,
        atol=1e-15,
    )


def test_remainders_of_products_that_do_not_fit(rng):
    for turns, period in ((9_999_990, 9_999_991), (7, 268_435_455), (123_456, 99_991), (5, 1)):
        done = np.append(rng.integers(0, 2**24, 30), [0, 1])
        result = ops.convert_to_numpy(turn_remainder(done.astype("float32"), turns, period))
        assert result.tolist() == [int(d) * turns % period for d in done]


@pytest.mark.parametrize("decay_type", ["linear", "cosine", "1-sqrt"])
@pytest.mark.parametrize("warmup_type", ["linear", "cosine", "1-sqrt"])
@pytest.mark.parametrize("scale", [1, 500_000])
def test_warmup_stable_decay(warmup_type, decay_type, scale):
    w, stable, decay, lowest = 4 * scale, 3 * scale, 5 * scale, 0.1

    def share(s):
        if s < w:
            u = s / w
            rise = {"linear": u, "cosine": 1 - half(u), "1-sqrt": 1 - math.sqrt(1 - u)}
            height = rise[warmup_type]
        elif s < w + stable:
            return 1.0
        elif s < w + stable + decay:
            height = shape_of(decay_type, (s - w - stable) / decay)
        else:
            return lowest
        return lowest + (1 - lowest) * height

    ends = (0, w, w + stable, w + stable + decay)
    steps = np.resize(sorted({max(0, end + d) for end in ends for d in range(-2, 3)}), 20)
    common = {"warmup_type": warmup_type, "decay_type": decay_type, "min_lr_ratio": lowest}
    by_total = optim.WarmupStableDecay(
        RATE, w, decay, num_training_steps=w + stable + decay, **common
    )
    by_part = optim.WarmupStableDecay(RATE, w, decay, num_stable_steps=stable, **common)
    for schedule in (by_total, by_part):
        result = ops.convert_to_numpy(schedule(steps))
        np.testing.assert_allclose(result, [RATE * share(s) for s in steps], rtol=1e-6, atol=1e-12)


def test_warmup_stable_decay_without_some_parts():
    none = optim.WarmupStableDecay(1.0, 0, 0, num_stable_steps=2, min_lr_ratio=0.5)
    assert values(none, range(4)) == [1.0, 1.0, 0.5, 0.5]
    late = optim.WarmupStableDecay(1.0, 0, 2, num_training_steps=4, decay_type="linear")
    assert values(late, range(6)) == [1.0, 1.0, 1.0, 0.5, 0.0, 0.0]


def test_rates_are_those_of_the_golden_files(golden):
    data = golden("schedules")
    rate, expected = data["learning_rate"], data["schedules"]
    made = {
        "constant": optim.Constant(rate),
        "constant_with_warmup w=4": optim.ConstantWithWarmup(rate, 4),
        "linear w=2 T=10": optim.LinearWithWarmup(rate, 2, 10),
        "cosine w=2 T=10": optim.CosineWithWarmup(rate, 2, 10, clamp=False),
        "cosine_with_restarts w=2 T=10 num_cycles=2": optim.CosineWithRestarts(rate, 2, 10, 2),
        "polynomial w=2 T=10 power=2 lr_end=1e-7": optim.PolynomialWithWarmup(rate, 2, 10, power=2),
        "inverse_sqrt w=2": optim.InverseSqrtWithWarmup(rate, 2),
        "inverse_sqrt w=0": optim.InverseSqrtWithWarmup(rate, 0),
        "cosine_with_min_lr w=2 T=10 min_lr=1.0": optim.CosineWithMinLR(
            rate, 2, 10, min_lr=1.0, clamp=False
        ),
        "cosine_warmup_with_min_lr w=2 T=10 min_lr=1.0": optim.CosineWarmupWithMinLR(
            rate, 2, 10, min_lr=1.0, clamp=False
        ),
        "wsd w=2 T=10 decay=4 (default: linear/cosine)": optim.WarmupStableDecay(
            rate, 2, num_decay_steps=4, num_training_steps=10
        ),
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


def test_unclamped_waves_go_on_exactly():
    schedule = optim.CosineWithWarmup(1.0, 0, 1000, num_cycles=3.5, clamp=False)
    steps = np.array([999, 1000, 1001, 2000, 123_456, 5_000_000, 5_000_143])
    result = ops.convert_to_numpy(schedule(steps))
    np.testing.assert_allclose(
        result, [half(7 * s % 2000 / 1000) for s in steps], rtol=1e-6, atol=1e-15
    )


def test_warmup_longer_than_the_training():
    assert values(optim.LinearWithWarmup(1.0, 8, 4), [0, 4, 7, 8, 9]) == [0.0, 0.5, 0.875, 0, 0]


SCHEDULES = [
    optim.Constant(0.5),
    optim.ConstantWithWarmup(0.5, 4),
    optim.LinearWithWarmup(0.5, 2, 10),
    optim.CosineWithWarmup(0.5, 2, 10, num_cycles=1.5, clamp=False),
    optim.CosineWithRestarts(0.5, 2, 10, num_cycles=2),
    optim.PolynomialWithWarmup(0.5, 2, 10, lr_end=0.1, power=3),
    optim.InverseSqrtWithWarmup(0.5, 2, timescale=7),
    optim.CosineWithMinLR(0.5, 2, 10, min_lr=0.1, clamp=False),
    optim.CosineWarmupWithMinLR(0.5, 2, 10, min_lr_rate=0.1, warmup_lr_rate=0.5),
    optim.WarmupStableDecay(0.5, 2, 4, 10, warmup_type="1-sqrt", decay_type="linear"),
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: type(schedule).__name__)
def test_schedules_take_any_step_and_serialize(schedule):
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


def test_the_contract_leaves_no_schedule_out():
    classes = {
        item
        for item in vars(optim).values()
        if isinstance(item, type) and issubclass(item, optim.Schedule)
    }
    assert {type(schedule) for schedule in SCHEDULES} == classes - {optim.Schedule}


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: type(schedule).__name__)
def test_in_a_compiled_model(schedule, tools, jit_compile):
    # The gradient is 1, so plain descent moves by the sum of the learning rates.
    class Descent(optim.Optimizer):
        def slot_shapes(self, shape):
            return {}

        def update(self, parameter, gradient, slots, step, learning_rate, weight_decay):
            return parameter - learning_rate * gradient, {}

    model = tools.linear_model(Descent(schedule), [0.0], jit_compile=jit_compile)
    model.fit(np.ones((6, 1)), np.zeros((6, 1)), batch_size=1, verbose=0)
    moved = -float(tools.to_numpy(model.trainable_variables[0])[0, 0])
    np.testing.assert_allclose(moved, sum(values(schedule, range(6))), rtol=1e-6)


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
        ("clamp", "False"),
    ],
)
def test_arguments_are_checked(argument, value):
    arguments = {"learning_rate": 1.0, "num_warmup_steps": 0, "num_training_steps": 10}
    with pytest.raises(ValueError, match=argument) as caught:
        optim.CosineWithWarmup(**{**arguments, argument: value})
    assert f"Received: {argument}={value!r}" in str(caught.value)


@pytest.mark.parametrize(
    ("factory", "arguments", "message"),
    [
        (optim.CosineWithRestarts, {"num_cycles": 0}, "num_cycles"),
        (optim.CosineWithRestarts, {"num_cycles": 1.5}, "num_cycles"),
        (optim.PolynomialWithWarmup, {"lr_end": 1.0}, "lr_end"),
        (optim.PolynomialWithWarmup, {"power": -1}, "power"),
        (optim.CosineWithMinLR, {}, "Exactly one of"),
        (optim.CosineWithMinLR, {"min_lr": 0.1, "min_lr_rate": 0.1}, "Exactly one of"),
        (optim.CosineWithMinLR, {"min_lr": 1.5}, "min_lr=1.5, learning_rate=1.0"),
        (optim.CosineWithMinLR, {"min_lr_rate": 1.5}, "min_lr_rate"),
        (optim.CosineWarmupWithMinLR, {"min_lr": 0, "warmup_lr_rate": 2.0}, "warmup_lr_rate"),
        (optim.WarmupStableDecay, {"num_decay_steps": 9}, "num_decay_steps=9"),
        (optim.WarmupStableDecay, {"num_decay_steps": 2, "decay_type": "sqrt"}, "1-sqrt"),
        (optim.WarmupStableDecay, {"num_decay_steps": 2, "min_lr_ratio": 2}, "min_lr_ratio"),
    ],
)
def test_own_arguments_are_checked(factory, arguments, message):
    with pytest.raises(ValueError, match=message):
        factory(learning_rate=1.0, num_warmup_steps=2, num_training_steps=10, **arguments)


def test_lengths_that_are_missing():
    with pytest.raises(ValueError, match="`num_training_steps` or `num_stable_steps`"):
        optim.WarmupStableDecay(1.0, 2, 4)
    with pytest.raises(ValueError, match="timescale"):
        optim.InverseSqrtWithWarmup(1.0, 2, timescale=0)


class TestPlot:
    @pytest.fixture(autouse=True)
    def axes(self, monkeypatch):
        """Matplotlib is an extra: the picture is checked through what is drawn on the axes."""

        class Axes:
            def plot(self, x, y, label):
                self.x, self.y, self.label = x, y, label

            def set_xlabel(self, text):
                self.xlabel = text

            def set_ylabel(self, text):
                self.ylabel = text

        return Axes()

    def test_by_name(self, axes):
        assert optim.plot_schedule("linear", 10, num_warmup_steps=2, axes=axes) is axes
        assert list(axes.x) == list(range(11))
        assert axes.y == values(optim.LinearWithWarmup(1.0, 2, 10), range(11))
        assert (axes.xlabel, axes.ylabel) == ("updates", "learning rate")

    def test_a_long_one_is_thinned_out(self, axes):
        optim.plot_schedule(optim.Constant(0.5), 1_000_000, axes=axes)
        assert len(axes.x) == len(axes.y) == 400
        assert (axes.x[0], axes.x[-1]) == (0, 1_000_000)

    def test_metrics(self, axes):
        kwargs = {"factor": 0.5, "patience": 0}
        optim.plot_schedule(
            "reduce_lr_on_plateau",
            scheduler_specific_kwargs=kwargs,
            metrics=[2.0, 2.0, 1.0],
            axes=axes,
        )
        assert axes.y == [1.0, 1.0, 0.5, 0.5]
        assert axes.xlabel == "evaluations"
        with pytest.raises(ValueError, match="metrics=None"):
            optim.plot_schedule("greedy", axes=axes)

    def test_without_matplotlib(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        with pytest.raises(ImportError, match="pip install matplotlib"):
            optim.plot_schedule("constant", 10)

    def test_with_matplotlib(self):
        # In every test environment; a plain install of the package has none.
        assert importlib.util.find_spec("matplotlib")
        import matplotlib

        matplotlib.use("Agg")
        axes = optim.plot_schedule("cosine", 10, learning_rate=0.5)
        assert axes.lines[0].get_ydata()[0] == 0.5
        matplotlib.pyplot.close(axes.figure)
