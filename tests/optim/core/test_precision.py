"""Low-precision variables follow their float32 trajectory."""

import keras
import numpy as np
import pytest
from keras import ops

import optim
from optim.core import precision

LOW = ["bfloat16", "float16"]
SIGNIFICAND_BITS = {"bfloat16": 8, "float16": 11}


def numpy_rounded(x, dtype):
    """Nearest value with that many significant bits, ties to even, in float64."""
    if dtype == "float16":
        return x.astype("float16").astype("float32")
    mantissa, exponent = np.frexp(x.astype("float64"))
    scale = 2.0 ** SIGNIFICAND_BITS[dtype]
    return np.ldexp(np.rint(mantissa * scale) / scale, exponent).astype("float32")


@pytest.mark.parametrize("dtype", LOW)
def test_rounding(tools, rng, dtype):
    values = rng.standard_normal(4000) * 10.0 ** rng.uniform(-7, 4, 4000)
    ties = np.array([1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-11, 1 + 3 * 2.0**-11, 0.0, -0.0])
    x = np.concatenate([values, ties, -ties]).astype("float32")
    result = tools.to_numpy(precision.rounded(ops.convert_to_tensor(x), dtype))
    np.testing.assert_array_equal(result, numpy_rounded(x, dtype))
    # The values are exact in the low format: the backend's own cast has nothing left to round.
    there_and_back = ops.cast(ops.cast(ops.convert_to_tensor(result), dtype), "float32")
    np.testing.assert_array_equal(tools.to_numpy(there_and_back), result)


@pytest.mark.parametrize("dtype", LOW)
def test_rounding_outside_the_range(tools, dtype):
    x = np.array([3.4e38, -3.4e38, np.inf, -np.inf, np.nan], "float32")
    result = tools.to_numpy(precision.rounded(ops.convert_to_tensor(x), dtype))
    np.testing.assert_array_equal(result, [np.inf, -np.inf, np.inf, -np.inf, np.nan])
    _, residual = precision.split(ops.convert_to_tensor(x), dtype)
    np.testing.assert_array_equal(tools.to_numpy(residual), 0.0)


@pytest.mark.parametrize("dtype", LOW)
def test_split_and_join_are_exact(tools, rng, dtype):
    x = (rng.standard_normal(1000) * 10.0 ** rng.uniform(-5, 3, 1000)).astype("float32")
    value, residual = precision.split(ops.convert_to_tensor(x), dtype)
    assert keras.utils.standardize_dtype(value.dtype) == dtype
    np.testing.assert_array_equal(tools.to_numpy(precision.join(value, residual, dtype)), x)


@pytest.mark.parametrize("kernel", [None, "reference"])
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("shape", [(6, 5), ()])
def test_low_precision_follows_the_float64_trajectory(tools, rng, dtype, kernel, shape):
    variable = keras.Variable(np.asarray(rng.standard_normal(shape), "float32"), dtype=dtype)
    start = tools.to_numpy(variable)
    gradients = [(rng.standard_normal(shape) + 1.0).astype("float32") for _ in range(100)]
    # Without decay: PyTorch's fused kernel multiplies by `1 - 1e-6`, which float32 has to 3%.
    optimizer = optim.AdamW(1e-4, weight_decay=0.0, kernel=kernel)
    tools.run(optimizer, [variable], [[np.asarray(g, "float32")] for g in gradients])
    expected = tools.reference_adamw(start, gradients, 1e-4, weight_decay=0.0)
    result = tools.to_numpy(variable)
    half_ulp = np.abs(expected) * 2.0 ** -SIGNIFICAND_BITS[dtype]
    assert np.all(np.abs(result - expected) <= half_ulp * 1.001)
    # Together they are the float32 trajectory, every digit of it.
    exact = result + tools.to_numpy(optimizer.slots_of(variable)["residual"])
    assert tools.relative_to_movement(exact, expected, start) < 1e-4
    assert keras.utils.standardize_dtype(variable.dtype) == dtype


def test_moves_where_a_single_step_is_lost(tools):
    ours, theirs = (keras.Variable(np.ones(4, "float32"), dtype="bfloat16") for _ in range(2))
    gradients = [[np.ones(4, "float32")]] * 200
    tools.run(optim.AdamW(1e-4), [ours], gradients)
    stock = keras.optimizers.AdamW(1e-4)
    tools.run(stock, [theirs], [[g.astype("float32") for g in gradients[0]]] * 200)
    expected = tools.reference_adamw(np.ones(4), [g[0] for g in gradients], 1e-4)
    np.testing.assert_allclose(tools.to_numpy(ours), expected, rtol=2.0**-8)
    np.testing.assert_array_equal(tools.to_numpy(theirs), 1.0)


@pytest.mark.parametrize("dtype", LOW)
def test_compiled_step_keeps_the_residual(tools, jit_compile, dtype):
    # A compiler that drops the pair of casts float32 -> low -> float32 would make it zero.
    optimizer = optim.AdamW(1e-4, weight_decay=0.0)
    start = np.array([1.0, -2.0, 0.5, 3.0], "float32")
    model = tools.linear_model(optimizer, start, jit_compile=jit_compile, dtype=dtype)
    x = np.tile(np.array([[0.5, 1.0, -2.0, 0.25]], "float32"), (4, 1))
    model.fit(x, np.zeros((4, 1), "float32"), batch_size=4, epochs=20, verbose=0)
    variable = model.trainable_variables[0]
    expected = tools.reference_adamw(start[:, None], [x[:1].T] * 20, 1e-4, weight_decay=0.0)
    exact = tools.to_numpy(variable) + tools.to_numpy(optimizer.slots_of(variable)["residual"])
    assert (
        tools.relative_to_movement(exact, expected, start[:, None]) < 2e-3
    )  # float32 itself; without residual it is 1


@pytest.mark.parametrize("kernel", [None, "reference"])
def test_assignment_from_outside_wins(tools, kernel):
    variable = keras.Variable(np.full(3, 100.0, "float32"), dtype="bfloat16")
    optimizer = optim.AdamW(1e-2, kernel=kernel)
    tools.run(optimizer, [variable], [[np.ones(3, "float32")]] * 10)
    assert np.all(np.abs(tools.to_numpy(optimizer.slots_of(variable)["residual"])) > 0.05)
    # The old residual is a hundred times the new value.
    variable.assign(np.full(3, 0.001, "float32"))
    before = tools.to_numpy(variable)
    optimizer.learning_rate = 0.0
    tools.run(optimizer, [variable], [[np.ones(3, "float32")]])
    np.testing.assert_array_equal(tools.to_numpy(variable), before)
    np.testing.assert_array_equal(tools.to_numpy(optimizer.slots_of(variable)["residual"]), 0.0)


def test_float32_variables_have_no_residual():
    variable = keras.Variable(np.ones(3, "float32"))
    optimizer = optim.AdamW()
    optimizer.build([variable])
    assert set(optimizer.slots_of(variable)) == {"momentum", "velocity"}
