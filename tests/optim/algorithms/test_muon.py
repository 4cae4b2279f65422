"""Muon against NumPy float64: the iteration, the rule, and who gets it."""

import math

import keras
import numpy as np
import pytest
from keras import ops

import optim
from optim.algorithms.muon import orthogonalized


def newton_schulz(matrix, steps=5):
    a, b, c = 3.4445, -4.7750, 2.0315
    x = np.asarray(matrix, "float64")
    if turned := x.shape[0] > x.shape[1]:
        x = x.T
    x = x / np.linalg.norm(x)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if turned else x


def reference(start, gradients, rate, sides, momentum=0.95, nesterov=True, steps=5, match=False,
              weight_decay=0.0):  # fmt: skip
    p = np.asarray(start, "float64")
    mean = np.zeros_like(p)
    rows, columns = sides
    scale = 0.2 * math.sqrt(max(rows, columns)) if match else math.sqrt(max(1, columns / rows))
    for gradient in gradients:
        g = np.asarray(gradient, "float64")
        mean = momentum * mean + (1 - momentum) * g
        u = (1 - momentum) * g + momentum * mean if nesterov else mean
        o = newton_schulz(u.reshape(sides), steps).reshape(p.shape)
        p = p - rate * weight_decay * p - rate * scale * o
    return p


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (5, 5)])
@pytest.mark.parametrize("scale", [1.0, 1e-7, 1e-22])
def test_iteration(tools, rng, shape, scale):
    matrix = rng.standard_normal(shape)
    result = tools.to_numpy(orthogonalized(ops.convert_to_tensor(
        (matrix * scale).astype("float32")), 5))  # fmt: skip
    np.testing.assert_allclose(result, newton_schulz(matrix), atol=3e-5)
    singular = np.linalg.svd(result, compute_uv=False)
    assert np.all((singular > 0.3) & (singular < 1.3))


def test_many_iterations_of_a_matrix_with_small_singular_values(tools, rng):
    left, _, right = np.linalg.svd(rng.standard_normal((6, 20)), full_matrices=False)
    matrix = ((left * np.logspace(0, -4, 6)) @ right).astype("float32")
    result = tools.to_numpy(orthogonalized(ops.convert_to_tensor(matrix), 10))
    np.testing.assert_allclose(result, newton_schulz(matrix, 10), atol=1e-3)


def test_iteration_in_bfloat16_and_of_nothing(tools, rng):
    matrix = rng.standard_normal((6, 8)).astype("float32")
    low = tools.to_numpy(orthogonalized(ops.convert_to_tensor(matrix), 5, "bfloat16"))
    np.testing.assert_allclose(low, newton_schulz(matrix), atol=0.15)
    zero = orthogonalized(ops.zeros((3, 4)), 5)
    np.testing.assert_array_equal(tools.to_numpy(zero), 0.0)


CASES = {
    "wide": ((4, 6), (4, 6), {}),
    "tall": ((6, 4), (6, 4), {"weight_decay": 0.1}),
    "plain momentum": ((4, 6), (4, 6), {"nesterov": False, "momentum": 0.8}),
    "convolution": ((2, 2, 3, 8), (12, 8), {"weight_decay": 0.1}),
    "attention in": ((6, 2, 3), (6, 6), {}),
    "attention out": ((2, 3, 6), (6, 6), {"match_rms": True, "ns_steps": 3}),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_follows_float64(tools, rng, name, dtype):
    shape, sides, arguments = CASES[name]
    variable = keras.Variable(rng.standard_normal(shape).astype("float32"), dtype=dtype)
    start = tools.to_numpy(variable)
    gradients = [rng.standard_normal(shape).astype("float32") for _ in range(4)]
    optimizer = optim.Muon(0.02, **arguments)
    tools.run(optimizer, [variable], [[g] for g in gradients])
    expected = reference(
        start,
        gradients,
        0.02,
        sides,
        momentum=arguments.get("momentum", 0.95),
        nesterov=arguments.get("nesterov", True),
        steps=arguments.get("ns_steps", 5),
        match=arguments.get("match_rms", False),
        weight_decay=arguments.get("weight_decay", 0.0),
    )
    result = tools.to_numpy(variable)
    if dtype == "bfloat16":
        result = result + tools.to_numpy(optimizer.slots_of(variable)["residual"])
    assert tools.relative_to_movement(result, expected, start) < 1e-4


def network():
    attention = keras.layers.MultiHeadAttention(2, 4, name="multi_head_attention")
    inputs = keras.Input((5,), dtype="int32")
    x = keras.layers.Embedding(11, 8, name="tokens")(inputs)
    x = attention(x, x)
    x = keras.layers.LayerNormalization(name="norm")(x)
    x = keras.layers.Dense(6, name="hidden")(x)
    score = keras.layers.Dense(1, name="score")(x)
    return keras.Model(inputs, [keras.layers.Dense(11, name="lm_head")(x), score])


def test_who_gets_which_rule():
    model = network()
    optimizer = optim.Muon()
    optimizer.build(model.trainable_variables)
    muon = {v.path for v in model.trainable_variables if optimizer.rule_of(v) is optimizer}
    assert muon == {
        "multi_head_attention/query/kernel",
        "multi_head_attention/key/kernel",
        "multi_head_attention/value/kernel",
        "multi_head_attention/attention_output/kernel",
        "hidden/kernel",
    }
    others = [v for v in model.trainable_variables if optimizer.rule_of(v) is optimizer.adamw]
    assert len(others) + len(muon) == len(model.trainable_variables)
    assert all("velocity" in optimizer.slots_of(v) for v in others)
    other = optim.Muon(exclude="hidden|attention_output")
    other.build(model.trainable_variables)
    muon = [v.path for v in model.trainable_variables if other.rule_of(v) is other]
    assert any("lm_head" in path for path in muon)
    assert not any("hidden" in path for path in muon)


@pytest.mark.parametrize(
    ("arguments", "rate"),
    [({}, 0.0015), ({"match_rms": True}, 0.1), ({"adamw_multiplier": 0.5}, 0.05)],
)
def test_the_rest_is_adamw(tools, rng, arguments, rate):
    shapes = {"bias": (3,), "scalar": (), "embeddings": (4, 2), "thin": (5, 1)}
    variables = [keras.Variable(np.ones(s, "float32"), name=n) for n, s in shapes.items()]
    gradients = [
        [np.asarray(rng.standard_normal(s), "float32") for s in shapes.values()] for _ in range(4)
    ]
    optimizer = optim.Muon(0.1, beta_2=0.9, weight_decay=0.3, **arguments)
    tools.run(optimizer, variables, gradients)
    for i, variable in enumerate(variables):
        start = np.ones(tuple(variable.shape))
        own = [g[i] for g in gradients]
        expected = tools.reference_adamw(start, own, rate, beta_2=0.9, weight_decay=0.3)
        np.testing.assert_allclose(tools.to_numpy(variable), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"momentum": 1.0}, "momentum"),
        ({"ns_steps": 0}, "ns_steps"),
        ({"ns_steps": True}, "ns_steps"),
        ({"ns_dtype": "float16"}, "ns_dtype"),
        ({"exclude": "("}, "exclude.*regular expression"),
        ({"adamw_multiplier": -1.0}, "adamw_multiplier"),
        ({"beta_1": 1.0}, "beta_1"),
        ({"weight_decay": -1.0}, "weight_decay"),
    ],
)
def test_hyperparameters_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        optim.Muon(**arguments)


def test_fit_and_keras_file(tools, rng, tmp_path):
    x, y = rng.standard_normal((8, 4)).astype("float32"), np.ones((8, 1), "float32")
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4), keras.layers.Dense(1)])
    optimizer = optim.Muon(0.01, nesterov=False, match_rms=True, exclude="nothing", beta_2=0.9)
    model.compile(optimizer, loss="mse")
    model.fit(x, y, epochs=2, verbose=0, batch_size=4, shuffle=False)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.optimizer.get_config() == optimizer.get_config()
    for each in (model, loaded):
        each.fit(x, y, epochs=1, verbose=0, batch_size=4, shuffle=False)
    for ours, theirs in zip(loaded.variables, model.variables, strict=True):
        np.testing.assert_array_equal(tools.to_numpy(ours), tools.to_numpy(theirs))
