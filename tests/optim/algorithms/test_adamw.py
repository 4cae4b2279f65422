"""AdamW against NumPy float64 and the numbers PyTorch gave."""

import keras
import numpy as np
import pytest
from keras import ops

import optim

pytestmark = pytest.mark.core

KERNELS = [None, "reference"]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e-7])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_follows_float64(tools, rng, kernel, scale, weight_decay):
    start = rng.standard_normal((7, 11)).astype("float32") * 0.01
    gradients = [(rng.standard_normal((7, 11)) * scale).astype("float32") for _ in range(30)]
    variable = keras.Variable(start)
    optimizer = optim.AdamW(1e-3, weight_decay=weight_decay, kernel=kernel)
    tools.run(optimizer, [variable], [[g] for g in gradients])
    expected = tools.reference_adamw(start, gradients, 1e-3, weight_decay=weight_decay)
    assert tools.relative_to_movement(tools.to_numpy(variable), expected, start) < 2e-6


@pytest.mark.parametrize("kernel", KERNELS)
def test_other_hyperparameters(tools, rng, kernel):
    betas = {"beta_1": 0.0, "beta_2": 0.5, "epsilon": 1e-3, "weight_decay": 0.5}
    start = rng.standard_normal(50).astype("float32")
    gradients = [rng.standard_normal(50).astype("float32") for _ in range(10)]
    variable = keras.Variable(start)
    tools.run(optim.AdamW(0.1, kernel=kernel, **betas), [variable], [[g] for g in gradients])
    expected = tools.reference_adamw(start, gradients, 0.1, **betas)
    assert tools.relative_to_movement(tools.to_numpy(variable), expected, start) < 2e-6


@pytest.mark.parametrize("kernel", KERNELS)
def test_beta_2_zero(tools, rng, kernel):
    start = rng.standard_normal(20).astype("float32")
    gradients = [rng.standard_normal(20).astype("float32") for _ in range(5)]
    variable = keras.Variable(start)
    tools.run(optim.AdamW(0.1, beta_2=0.0, kernel=kernel), [variable], [[g] for g in gradients])
    expected = tools.reference_adamw(start, gradients, 0.1, beta_2=0.0)
    assert tools.relative_to_movement(tools.to_numpy(variable), expected, start) < 2e-6


def test_rule_keeps_its_precision_over_many_steps(tools, rng):
    # `beta_2 * v` drifts by 6e-6 here, because 0.999 has no exact float32.
    start = rng.standard_normal(200).astype("float32") * 0.01
    gradients = [rng.standard_normal(200).astype("float32") for _ in range(400)]
    variable = keras.Variable(start)
    tools.run(optim.AdamW(1e-3, kernel="reference"), [variable], [[g] for g in gradients])
    expected = tools.reference_adamw(start, gradients, 1e-3)
    assert tools.relative_to_movement(tools.to_numpy(variable), expected, start) < 1.5e-6


@pytest.mark.parametrize("kernel", KERNELS)
def test_golden_trace_of_pytorch(tools, golden, kernel):
    trace = golden("adamw")
    target = np.array(trace["target"])
    variable = keras.Variable(np.array(trace["start"], "float32"))
    optimizer = optim.AdamW(
        trace["learning_rate"], weight_decay=trace["weight_decay"], kernel=kernel
    )
    for step in range(1, 101):
        gradient = 2 * (tools.to_numpy(variable) - target) / 3
        tools.run(optimizer, [variable], [[gradient.astype("float32")]])
        if str(step) in trace["steps"]:
            np.testing.assert_allclose(
                tools.to_numpy(variable), trace["steps"][str(step)], atol=3e-6
            )
    assert int(optimizer.iterations) == 100


def test_is_not_keras_epsilon(tools):
    # At gradients as small as epsilon the two placements of epsilon are far apart.
    start, gradients = np.zeros(3), [np.full(3, 1e-8, "float32")]
    ours, theirs = (keras.Variable(start.astype("float32")) for _ in range(2))
    tools.run(optim.AdamW(1.0, weight_decay=0.0), [ours], [gradients])
    stock = keras.optimizers.AdamW(1.0, epsilon=1e-8, weight_decay=0.0)
    tools.run(stock, [theirs], [gradients])
    np.testing.assert_allclose(tools.to_numpy(ours), -0.5, rtol=1e-5)
    np.testing.assert_allclose(tools.to_numpy(theirs), -0.0307, rtol=1e-2)


def test_kernels_agree_over_many_shapes(tools, rng):
    shapes = [(), (1,), (5,), (3, 4), (2, 3, 4), (0,)]
    starts = [np.asarray(rng.standard_normal(shape), "float32") for shape in shapes]
    gradients = [
        [np.asarray(rng.standard_normal(shape), "float32") for shape in shapes] for _ in range(5)
    ]
    results = {}
    for kernel in KERNELS:
        variables = [keras.Variable(start, name=f"v{i}") for i, start in enumerate(starts)]
        optimizer = optim.AdamW(0.01, kernel=kernel)
        optimizer.exclude_from_weight_decay(var_names=["v2", "v3"])
        tools.run(optimizer, variables, gradients)
        results[kernel] = [tools.to_numpy(v) for v in (*variables, *optimizer.variables)]
    for fast, reference in zip(results[None], results["reference"], strict=True):
        np.testing.assert_allclose(fast, reference, rtol=2e-5, atol=1e-7)


def test_gradients_and_variables_of_any_memory_layout(tools, rng):
    start = rng.standard_normal((3, 5)).astype("float32")
    straight = rng.standard_normal((5, 3)).astype("float32")
    for wide in (
        lambda: ops.transpose(ops.convert_to_tensor(straight)),
        lambda: ops.broadcast_to(ops.convert_to_tensor(straight[:3, :1]), (3, 5)),
    ):
        plain = keras.Variable(start)
        turned = keras.Variable(ops.transpose(ops.convert_to_tensor(start.T.copy())))
        optim.AdamW(0.1).apply([wide(), wide()], [plain, turned])
        expected = tools.reference_adamw(start, [tools.to_numpy(wide())], 0.1)
        np.testing.assert_allclose(tools.to_numpy(plain), expected, rtol=1e-5)
        np.testing.assert_allclose(tools.to_numpy(turned), expected, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:.*float64.*:UserWarning")
def test_wider_variable_keeps_its_digits(tools):
    variable = keras.Variable(np.array([1.0 + 1e-10]), dtype="float64")
    before = ops.convert_to_numpy(variable).copy()
    tools.run(optim.AdamW(0.25, weight_decay=0.0), [variable], [[np.array([2.0], "float32")]])
    moved = ops.convert_to_numpy(variable) - before
    np.testing.assert_allclose(moved, -0.25, rtol=1e-7)


def test_learning_rate_callable_and_assigned(tools):
    variable = keras.Variable(np.zeros(2, "float32"))
    optimizer = optim.AdamW(lambda: 0.5, weight_decay=0.0)
    tools.run(optimizer, [variable], [[np.ones(2, "float32")]])
    np.testing.assert_allclose(tools.to_numpy(variable), -0.5, rtol=1e-6)
    variable = keras.Variable(np.zeros(2, "float32"))
    optimizer = optim.AdamW(1, weight_decay=None)
    optimizer.learning_rate = 0.25
    tools.run(optimizer, [variable], [[np.ones(2, "float32")]])
    np.testing.assert_allclose(tools.to_numpy(variable), -0.25, rtol=1e-6)


@pytest.mark.parametrize(
    ("argument", "value", "limit"),
    [
        ("beta_1", 1.0, "[0.0, 1.0)"),
        ("beta_1", -0.1, "[0.0, 1.0)"),
        ("beta_2", float("nan"), "[0.0, 1.0)"),
        ("epsilon", -1e-8, "[0.0, inf)"),
        ("weight_decay", -1.0, "[0.0, inf)"),
        ("weight_decay", "0.1", "[0.0, inf)"),
        ("learning_rate", -1e-3, "[0.0, inf)"),
        ("learning_rate", float("inf"), "[0.0, inf)"),
        ("learning_rate", True, "[0.0, inf)"),
        ("kernel", "fastest", "reference"),
    ],
)
def test_hyperparameters_are_checked(argument, value, limit):
    with pytest.raises(ValueError, match=argument) as caught:
        optim.AdamW(**{argument: value})
    assert limit in str(caught.value)
    assert f"Received: {argument}={value!r}" in str(caught.value)


def test_config_round_trip():
    arguments = {
        "learning_rate": 0.5,
        "beta_1": 0.8,
        "beta_2": 0.95,
        "epsilon": 1e-6,
        "weight_decay": 0.1,
        "clipnorm": 1.0,
        "use_ema": True,
        "ema_momentum": 0.9,
        "ema_overwrite_frequency": 3,
        "gradient_accumulation_steps": 2,
        "loss_scale_factor": 4.0,
        "kernel": "reference",
        "name": "mine",
    }
    optimizer = optim.AdamW(**arguments)
    config = keras.optimizers.serialize(optimizer)
    again = keras.optimizers.deserialize(config)
    assert type(again) is optim.AdamW
    assert again.get_config() == optimizer.get_config()
    assert arguments.items() <= again.get_config().items()
