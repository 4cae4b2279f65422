"""Adafactor against NumPy float64 and recorded numbers of Transformers."""

import keras
import numpy as np
import pytest

import optim
from optim.kernels import backend as kernels


def reference(start, gradients, rate=None, warmup_init=False, momentum=None, weight_decay=0.0,
              scale=None, decay=-0.8, clip=1.0, epsilon=(1e-30, 1e-3)):  # fmt: skip
    """The algorithm of the paper with the defaults of Transformers, in float64."""
    p = np.asarray(start, "float64")
    scale = (rate is None) if scale is None else scale
    rows = columns = full = mean = 0.0

    def rms(x):
        return np.sqrt(np.mean(x**2))

    for t, gradient in enumerate(gradients, start=1):
        g = np.asarray(gradient, "float64")
        rho = rate
        if rate is None:
            rho = min(1e-6 * t if warmup_init else 1e-2, 1 / np.sqrt(t))
        lr = rho * (max(epsilon[1], rms(p)) if scale else 1.0)
        beta = 1 - t**decay
        u = g**2 + epsilon[0]
        if g.ndim >= 2:
            rows = beta * rows + (1 - beta) * u.mean(-1)
            columns = beta * columns + (1 - beta) * u.mean(-2)
            normal = rows / rows.mean(-1, keepdims=True)
            update = g / np.sqrt(normal)[..., None] / np.sqrt(columns)[..., None, :]
        else:
            full = beta * full + (1 - beta) * u
            update = g / np.sqrt(full)
        update = lr * update / max(1.0, rms(update) / clip)
        if momentum is not None:
            mean = momentum * mean + (1 - momentum) * update
            update = mean
        p = p - weight_decay * lr * p - update
    return p


MODES = {
    "own rate": {},
    "own rate, warmup": {"warmup_init": True},
    "own rate, unscaled": {"scale_parameter": False},
    "own rate, momentum, decay": {"momentum": 0.9, "weight_decay": 0.1},
    "fixed": {"learning_rate": 0.01},
    "fixed, scaled": {"learning_rate": 0.1, "scale_parameter": True, "weight_decay": 0.1},
    "fixed, momentum, decay": {"learning_rate": 0.01, "momentum": 0.5, "weight_decay": 0.2},
    "fixed, others": {
        "learning_rate": 0.01,
        "clip_threshold": 0.3,
        "beta_2_decay": -0.5,
        "epsilon_1": 1e-20,
    },
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("gradient_scale", "shape"), [(1.0, (3, 5)), (1e-4, (4,)), (1e-8, (5, 2))])
def test_follows_float64(tools, rng, mode, gradient_scale, shape):
    arguments = MODES[mode]
    # With warm-up the rate is 1e-6: beside a parameter of size 1 that is mostly rounding.
    size = 1e-7 if arguments.get("warmup_init") else 0.3
    start = (rng.standard_normal(shape) * size).astype("float32")
    gradients = [(rng.standard_normal(shape) * gradient_scale).astype("float32") for _ in range(8)]
    variable = keras.Variable(start)
    tools.run(optim.Adafactor(**arguments), [variable], [[g] for g in gradients])
    expected = reference(
        start,
        gradients,
        rate=arguments.get("learning_rate"),
        warmup_init=arguments.get("warmup_init", False),
        momentum=arguments.get("momentum"),
        weight_decay=arguments.get("weight_decay", 0.0),
        scale=arguments.get("scale_parameter"),
        decay=arguments.get("beta_2_decay", -0.8),
        clip=arguments.get("clip_threshold", 1.0),
        epsilon=(arguments.get("epsilon_1", 1e-30), 1e-3),
    )
    assert tools.relative_to_movement(tools.to_numpy(variable), expected, start) < 2e-5


def test_bfloat16_follows_the_same_path(tools, rng):
    start = rng.standard_normal((6, 4)).astype("float32")
    variable = keras.Variable(start, dtype="bfloat16")
    start = tools.to_numpy(variable)
    gradients = [rng.standard_normal((6, 4)).astype("float32") for _ in range(8)]
    optimizer = optim.Adafactor(1e-3)
    tools.run(optimizer, [variable], [[g] for g in gradients])
    total = tools.to_numpy(variable) + tools.to_numpy(optimizer.slots_of(variable)["residual"])
    expected = reference(start, gradients, rate=1e-3)
    assert tools.relative_to_movement(total, expected, start) < 1e-4


def test_shapes(tools, rng):
    shapes = {(): 1, (7,): 7, (1, 5): 6, (2, 3, 4): 6 + 8}
    variables = [keras.Variable(rng.standard_normal(s).astype("float32")) for s in shapes]
    starts = [tools.to_numpy(v) for v in variables]
    gradients = [[np.asarray(rng.standard_normal(s), "float32") for s in shapes] for _ in range(3)]
    optimizer = optim.Adafactor(0.01)
    tools.run(optimizer, variables, gradients)
    for i, (variable, size) in enumerate(zip(variables, shapes.values(), strict=True)):
        expected = reference(starts[i], [g[i] for g in gradients], rate=0.01)
        np.testing.assert_allclose(tools.to_numpy(variable), expected, rtol=1e-5, atol=1e-6)
        slots = optimizer.slots_of(variable).values()
        assert sum(np.prod(s.shape, dtype=int) for s in slots) == size


@pytest.mark.parametrize(
    ("mode", "shapes"),
    [
        ("fixed", [(9, 7), (2, 9, 5), (3, 0)]),
        ("own rate, momentum, decay", [(5, 3, 4), (2, 50), (40,)]),
    ],
)
def test_tiles_of_matrices(tools, rng, monkeypatch, mode, shapes):
    """Several matrices at a time, some rows of one, rows longer than a tile; rows of zeros."""
    if hasattr(kernels, "run_adafactor"):
        monkeypatch.setattr("optim.kernels.torch.adafactor._TILE", 30)
        monkeypatch.setattr("torch.get_num_threads", lambda: 1)
    starts = [rng.standard_normal(s).astype("float32") for s in shapes]
    gradients = [[rng.standard_normal(s).astype("float32") for s in shapes] for _ in range(2)]
    for given in gradients:
        given[0] *= 1e6
        given[0][4] = 0.0
    variables = [keras.Variable(start) for start in starts]
    arguments = MODES[mode]
    tools.run(optim.Adafactor(**arguments), variables, gradients)
    for i, (variable, start) in enumerate(zip(variables, starts, strict=True)):
        if not start.size:
            continue
        expected = reference(
            start,
            [given[i] for given in gradients],
            rate=arguments.get("learning_rate"),
            momentum=arguments.get("momentum"),
            weight_decay=arguments.get("weight_decay", 0.0),
        )
        error = tools.relative_to_movement(tools.to_numpy(variable), expected, start)
        assert error < 2e-5, shapes[i]


# Recorded from Transformers: mean squared error to the target, from (.1, -.2, -.1).
START, TARGET = np.array([0.1, -0.2, -0.1], "float32"), np.array([0.4, 0.2, -0.5])
TRACES = [
    (
        {"learning_rate": 0.01},
        {
            1: [0.11, -0.19, -0.11],
            2: [0.119854, -0.1801087, -0.1198913],
            3: [0.1295642, -0.1703238, -0.1296762],
            10: [0.1934626, -0.1047794, -0.1952206],
            1000: [0.4, 0.2, -0.5],
        },
    ),
    (
        {"learning_rate": 0.01, "momentum": 0.9, "weight_decay": 0.01},
        {
            1: [0.10099, -0.19898, -0.10099],
            2: [0.1028785, -0.1970612, -0.1028789],
            10: [0.1406595, -0.1588894, -0.1408151],
        },
    ),
]


@pytest.mark.parametrize(("arguments", "trace"), TRACES)
def test_recorded_traces(tools, arguments, trace):
    variable = keras.Variable(START)
    optimizer = optim.Adafactor(**arguments)
    recorded = {step: values for step, values in trace.items() if step <= 10}
    for step in range(1, max(recorded) + 1):
        gradient = 2 * (tools.to_numpy(variable) - TARGET) / 3
        tools.run(optimizer, [variable], [[gradient.astype("float32")]])
        if step in recorded:
            np.testing.assert_allclose(tools.to_numpy(variable), recorded[step], atol=2e-7)


def test_the_reference_of_this_file_ends_where_the_recorded_run_does():
    # A thousand updates one by one would take too long on some backends.
    p, gradients = START.astype("float64"), []
    for _ in range(200):
        gradients.append(2 * (p - TARGET) / 3)
        p = reference(START, gradients, rate=0.01)
    np.testing.assert_allclose(p, TARGET, atol=1e-3)


def test_learning_rate_is_the_one_in_use(tools):
    variable = keras.Variable(np.ones(1, "float32"))
    optimizer = optim.Adafactor(warmup_init=True)
    assert float(optimizer.learning_rate) == pytest.approx(1e-6)
    tools.run(optimizer, [variable], [[np.ones(1, "float32")]] * 2)
    assert float(optimizer.learning_rate) == pytest.approx(3e-6)
    rates = [float(optim.RelativeStep()(s)) for s in (0, 9998, 999999)]
    np.testing.assert_allclose(rates, [0.01, 0.01, 1e-3], rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learning_rate": 0.1, "relative_step": True}, "relative_step"),
        ({"relative_step": False}, "relative_step"),
        ({"learning_rate": 0.1, "warmup_init": True}, "warmup_init"),
        ({"epsilon_1": -1.0}, r"epsilon_1.*\[0.0, inf\)"),
        ({"epsilon_2": -1.0}, r"epsilon_2.*\[0.0, inf\)"),
        ({"clip_threshold": 0.0}, "clip_threshold"),
        ({"beta_2_decay": 0.0}, r"beta_2_decay.*\[-10.0, 0.0\)"),
        ({"momentum": 1.0}, r"momentum.*\[0.0, 1.0\)"),
    ],
)
def test_hyperparameters_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        optim.Adafactor(**arguments)


@pytest.mark.parametrize(
    "arguments", [{}, {"warmup_init": True, "momentum": 0.5}, {"learning_rate": 0.5}]
)
def test_config_round_trip(arguments):
    optimizer = optim.Adafactor(**arguments)
    again = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    assert type(again) is optim.Adafactor
    assert again.get_config() == optimizer.get_config()
    assert float(again.learning_rate) == float(optimizer.learning_rate)


def test_fit_and_keras_file(tools, rng, tmp_path):
    x, y = rng.standard_normal((8, 4)).astype("float32"), np.ones((8, 1), "float32")
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.Dense(1)])
    model.compile(optim.Adafactor(momentum=0.9), loss="mse")
    model.fit(x, y, epochs=2, verbose=0, batch_size=4, shuffle=False)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    for each in (model, loaded):
        each.fit(x, y, epochs=1, verbose=0, batch_size=4, shuffle=False)
    for ours, theirs in zip(loaded.variables, model.variables, strict=True):
        np.testing.assert_array_equal(tools.to_numpy(ours), tools.to_numpy(theirs))
