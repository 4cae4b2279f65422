"""The contract: every optimizer of the registry, on every backend.

What is compiled is compiled once per optimizer and shared by the tests that look at it.
"""

import functools

import keras
import numpy as np
import pytest
from helpers_contract import (
    BACKEND,
    NAMES,
    SPECIAL,
    compiled,
    decays,
    fill,
    host,
    make,
    minimise,
    optional_arguments,
    parameters,
    small_model,
    snapshot,
    special,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from keras import ops

import optim
from kbtrain.checkpoint import (
    capture,
    name_optimizer_variables,
    name_variables,
    read_arrays,
    restore,
    write_arrays,
)

every_optimizer = pytest.mark.parametrize("name", NAMES)
SHAPES = {"matrix": (3, 4), "vector": (5,), "scalar": (), "block": (2, 3, 2), "nothing": (0,)}


def test_the_suite_finds_the_optimizers():
    assert {"adam", "adamw", "sgd", "lion"} <= set(NAMES)
    assert set(SPECIAL) <= set(NAMES), "an entry for an optimizer that is not there"


# ---- one compiled update, checked in many ways ------------------------------------------------


def given_gradients(seed, shapes):
    generator = np.random.default_rng(seed)
    return [np.asarray(generator.standard_normal(shape), "float32") for shape in shapes]


def variables_of(dtypes):
    values = given_gradients(0, SHAPES.values())
    return [
        keras.Variable(value, dtype=dtype, name=f"{name}_{dtype}")
        for dtype in dtypes
        for name, value in zip(SHAPES, values, strict=True)
    ]


@functools.cache
def updated(name, kernel=None):
    """Three compiled updates of variables of all shapes, in float32 and bfloat16."""
    variables = variables_of(["float32", "bfloat16"])
    before = snapshot(variables)
    optimizer = make(name, 1e-2, kernel=kernel)
    call, traces = compiled(optimizer, variables)
    slots = [(v.path, tuple(v.shape), v.dtype) for v in optimizer.variables]
    counts = []
    for seed in (1, 2, 3):
        gradients = 2 * given_gradients(seed, SHAPES.values())  # the same for both dtypes
        counts.append(int(host(call(BACKEND.to_device(gradients)))))
    return optimizer, variables, before, slots, (len(traces), counts)


@every_optimizer
def test_shapes_and_dtypes_stay(name):
    optimizer, variables, before, slots, _ = updated(name)
    assert [(v.path, tuple(v.shape), v.dtype) for v in optimizer.variables] == slots
    for variable in variables:
        assert str(keras.utils.standardize_dtype(variable.dtype)) in variable.path
        assert host(variable).shape == before[variable.path].shape
        assert np.isfinite(host(variable)).all()
    assert all(np.isfinite(host(v)).all() for v in optimizer.variables)


@every_optimizer
def test_every_variable_moves(name):
    _, variables, before, _, _ = updated(name)
    for variable in variables:
        if before[variable.path].size:
            assert np.any(host(variable) != before[variable.path]), variable.path


@every_optimizer
def test_the_second_call_does_not_recompile(name):
    optimizer, _, _, _, (traces, counts) = updated(name)
    assert traces == 1
    assert counts == [1, 2, 3]
    assert int(optimizer.iterations) == 3


@every_optimizer
def test_bfloat16_follows_float32(name):
    # Half a unit of bfloat16's last place, whatever the size of the movement.
    optimizer, variables, _, _, _ = updated(name)
    half = len(variables) // 2
    names = ["vector"] if special(name).by_name else ["matrix", "vector"]
    for full, low in zip(variables[:half], variables[half:], strict=True):
        if any(each in full.path for each in names):
            np.testing.assert_allclose(host(low), host(full), rtol=2**-7, atol=2e-2)
        assert "residual" in optimizer.slots_of(low)


@every_optimizer
def test_reference_kernel_gives_the_same(name):
    _, fast, before, _, _ = updated(name)
    _, slow, _, _, _ = updated(name, "reference")
    for a, b in zip(fast, slow, strict=True):
        movement = np.abs(host(b) - before[b.path]).max(initial=0.0)
        # A bfloat16 may fall on either side of a boundary.
        rounding = 2**-7 * np.abs(host(b)) if "bfloat16" in b.path else 1e-7
        assert (np.abs(host(a) - host(b)) <= special(name).kernel_tolerance * movement + rounding
                ).all(), a.path  # fmt: skip


@every_optimizer
def test_converges(name):
    before, after, optimizer = minimise(name)
    assert (after < [0.05, 0.3] * before).all(), f"{before} -> {after}"
    assert int(optimizer.iterations) == 300


# ---- saving --------------------------------------------------------------------------------------


def compiled_model(name):
    model = small_model()
    optimizer = make(name, 1e-2, name="mine")
    model.compile(optimizer, loss="mse")
    optimizer.build(model.trainable_variables)
    return model, optimizer


def assert_same(optimizer, expected):
    found = snapshot(optimizer.variables)
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_array_equal(found[path], value, err_msg=path)


@every_optimizer
def test_state_in_keras_files(name, tmp_path):
    model, optimizer = compiled_model(name)
    expected = fill(optimizer.variables)
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")

    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert type(loaded.optimizer) is type(optimizer)
    assert loaded.optimizer.get_config() == optimizer.get_config()
    assert_same(loaded.optimizer, expected)

    other, fresh = compiled_model(name)
    other.load_weights(tmp_path / "model.weights.h5")
    assert_same(fresh, expected)


@every_optimizer
def test_state_in_checkpoints_of_the_trainer(name, tmp_path):
    model, optimizer = compiled_model(name)
    expected = fill(optimizer.variables)
    named = name_optimizer_variables(optimizer.variables, model.variables)
    assert len(named) == len(optimizer.variables)
    write_arrays(tmp_path / "optimizer.h5", capture(named))

    other, fresh = compiled_model(name)
    arrays = read_arrays(tmp_path / "optimizer.h5")
    restore(name_optimizer_variables(fresh.variables, other.variables), arrays, what="optimizer")
    assert_same(fresh, expected)
    assert name_variables(model.variables).keys() == name_variables(other.variables).keys()


@every_optimizer
def test_config(name):
    optimizer = make(name, 0.5, global_clipnorm=2.0, name="mine")
    config = keras.optimizers.serialize(optimizer)
    again = keras.optimizers.deserialize(config)
    assert type(again) is type(optimizer)
    assert again.get_config() == optimizer.get_config()
    assert again.name == "mine"
    missing = parameters(name).keys() - optimizer.get_config().keys()
    assert not missing, f"{missing} would be lost in a .keras file"


# ---- hyperparameters -----------------------------------------------------------------------------


@every_optimizer
def test_wrong_hyperparameters_are_named(name):
    defaults = parameters(name)
    assert defaults
    for argument, default in defaults.items():
        wrong = ["yes"] if isinstance(default, bool) else ["0.1", float("nan"), float("inf"), True]
        if argument.startswith("beta"):
            wrong.append(2.0)
        if not isinstance(default, bool) and argument not in special(name).negative:
            wrong.append(-1.0)
        for value in wrong:
            with pytest.raises(ValueError, match=f"`{argument}") as caught:
                make(name, **{argument: value})
            message = str(caught.value)
            assert "Received" in message, argument
            assert str(value) in message, argument


@every_optimizer
def test_wrong_optional_arguments_are_named(name):
    """Those whose default is None; those common to all are tested with one optimizer."""
    for argument in optional_arguments(name):
        for value in (float("nan"), -3.5, {"a": 1}, [0.5]):
            with pytest.raises((ValueError, TypeError), match=f"`{argument}") as caught:
                make(name, **{argument: value})
            assert "Received" in str(caught.value), argument


@every_optimizer
def test_an_unknown_argument_is_refused(name):
    with pytest.raises(TypeError, match="no_such_argument"):
        make(name, no_such_argument=1)


# ---- together with what Keras' optimizers can do -------------------------------------------------


def pair(dtype="float32"):
    values = np.array([[1.0, -2.0], [0.5, 3.0]], "float32")
    return [keras.Variable(values, dtype=dtype, name="a"), keras.Variable(values[0], name="b")]


GRADIENTS = [np.array([[0.4, -0.3], [0.2, 0.1]], "float32"), np.array([0.3, -0.6], "float32")]


def after_one(optimizer, gradients, variables=None):
    variables = variables or pair()
    tensors = [None if g is None else ops.convert_to_tensor(g) for g in gradients]
    optimizer.apply(tensors, variables)
    return [host(v) for v in variables]


@functools.cache
def plain(name):
    return after_one(make(name), GRADIENTS)


@pytest.mark.filterwarnings("ignore:Gradients do not exist:UserWarning")
@every_optimizer
def test_missing_gradient(name):
    optimizer, variables = make(name), pair()
    optimizer.build(variables)
    state = snapshot(optimizer.slots_of(variables[1]).values())
    result = after_one(optimizer, [GRADIENTS[0], None], variables)
    np.testing.assert_array_equal(result[1], host(pair()[1]))
    np.testing.assert_allclose(result[0], plain(name)[0], rtol=1e-6)
    assert snapshot(optimizer.slots_of(variables[1]).values()).keys() == state.keys()
    for path, value in snapshot(optimizer.slots_of(variables[1]).values()).items():
        np.testing.assert_array_equal(value, state[path])


@every_optimizer
def test_no_variables_at_all(name):
    optimizer = make(name)
    optimizer.build([])
    optimizer.apply([], [])
    assert int(optimizer.iterations) <= 1


@every_optimizer
def test_a_gradient_that_is_not_a_number_is_seen(name):
    optimizer, variables = make(name), pair()
    broken = [g.copy() for g in GRADIENTS]
    for gradient in broken:
        gradient[0] = np.nan
    after_one(optimizer, broken, variables)
    result = after_one(optimizer, GRADIENTS, variables)  # SOAP's first update moves nothing
    assert all(np.isnan(value[0]).all() for value in result)


@every_optimizer
def test_global_clipnorm(name):
    norm = np.sqrt(sum(np.sum(g.astype("float64") ** 2) for g in GRADIENTS))
    clipped = after_one(make(name, global_clipnorm=0.1), GRADIENTS)
    scaled = after_one(make(name), [(0.1 / norm * g).astype("float32") for g in GRADIENTS])
    for a, b in zip(clipped, scaled, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


@every_optimizer
def test_accumulation(name):
    optimizer, variables = make(name, gradient_accumulation_steps=2), pair()
    first = after_one(optimizer, [0.5 * g for g in GRADIENTS], variables)
    for value, start in zip(first, pair(), strict=True):
        np.testing.assert_array_equal(value, host(start))
    second = after_one(optimizer, [1.5 * g for g in GRADIENTS], variables)
    for value, expected in zip(second, plain(name), strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert int(optimizer.iterations) == 1


@every_optimizer
def test_loss_scale(name):
    variables = pair()
    scaled = keras.optimizers.LossScaleOptimizer(make(name), initial_scale=64.0)
    call, _ = compiled(scaled, variables)
    call(BACKEND.to_device([64.0 * g for g in GRADIENTS]))
    for value, expected in zip(variables, plain(name), strict=True):
        np.testing.assert_allclose(host(value), expected, rtol=1e-5)
    before = snapshot(variables)
    call(BACKEND.to_device([np.full((2, 2), np.inf, "float32"), GRADIENTS[1]]))
    for path, value in snapshot(variables).items():
        np.testing.assert_array_equal(value, before[path])


@every_optimizer
def test_frozen_layer(name):
    model = small_model()
    model.get_layer("table").trainable = False
    variables = model.trainable_variables
    optimizer = make(name)
    gradients = [np.ones(v.shape, "float32") for v in variables]
    before = host(model.get_layer("table").embeddings)
    after_one(optimizer, gradients, variables)
    np.testing.assert_array_equal(host(model.get_layer("table").embeddings), before)
    assert not any("embeddings" in v.path for v in optimizer.variables)


@every_optimizer
def test_gradient_of_an_embedding(name):
    """Sparse on TensorFlow. Rows that are used twice count twice."""
    model = small_model()
    variables = model.trainable_variables
    optimizer = make(name)
    optimizer.build(variables)

    def step(tokens):
        _, _, gradients, _ = BACKEND.value_and_grad(
            lambda: (ops.sum(model(tokens) ** 2), ()), variables
        )
        BACKEND.apply_optimizer(optimizer, gradients, ops.ones(()), variables)
        dense_gradient = optim.kernels.backend.dense_gradient
        return [dense_gradient(g, v) for g, v in zip(gradients, variables, strict=True)]

    call = BACKEND.compile_step(step, [*variables, *optimizer.variables])
    dense = [host(g) for g in call(BACKEND.to_device(np.array([[1, 1, 3]], "int32")))]
    other = small_model()
    after_one(make(name), [g.astype("float32") for g in dense], other.trainable_variables)
    for a, b in zip(variables, other.trainable_variables, strict=True):
        np.testing.assert_allclose(host(a), host(b), rtol=1e-5, atol=1e-6)


@every_optimizer
def test_decay_leaves_out_what_is_excluded(name):
    if not decays(name):
        assert "weight_decay" not in parameters(name)
        return
    optimizer, variables = make(name, weight_decay=0.5), pair()
    optimizer.exclude_from_weight_decay(var_names=["b"])
    result = after_one(optimizer, GRADIENTS, variables)
    without = after_one(make(name, weight_decay=0.0), GRADIENTS)
    np.testing.assert_allclose(result[1], without[1], rtol=1e-6)


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    name=st.sampled_from(NAMES),
    shape=npst.array_shapes(min_dims=0, max_dims=4, min_side=1, max_side=3),
)
def test_any_shape(name, shape):
    value, gradient = np.ones(shape, "float32"), np.full(shape, 0.5, "float32")
    variable = keras.Variable(value, name="v")
    optimizer = make(name)
    after_one(optimizer, [gradient], [variable])
    assert tuple(variable.shape) == shape
    assert np.isfinite(host(variable)).all()
    assert (host(variable) < 1.0).all()
