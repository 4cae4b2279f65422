"""Names of variables, and matching them again: by name, by renumbered name, or not at all."""

import contextlib

import keras
import ml_dtypes
import numpy as np
import pytest

from kbtrain.checkpoint import (
    capture,
    name_optimizer_variables,
    name_variables,
    plan_restore,
    read_arrays,
    restore,
    write_arrays,
)
from kbtrain.errors import CheckpointMismatchError

# keras.ops.convert_to_numpy on torch and TensorFlow tensors, with the NumPy of today.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def network(units=(4, 4, 2), **kwargs):
    """A network with seed states and moving statistics, under names that Keras makes up."""
    layers = [keras.layers.Input((8,))]
    for size in units:
        layers += [keras.layers.Dense(size), keras.layers.BatchNormalization()]
    return keras.Sequential([*layers, keras.layers.Dropout(0.1, seed=7)], **kwargs)


class Block(keras.layers.Layer):
    def __init__(self):
        super().__init__()
        self.first, self.second = keras.layers.Dense(4), keras.layers.Dense(4, use_bias=False)
        self.dropout = keras.layers.Dropout(0.1, seed=3)

    def build(self, shape):
        self.first.build(shape)
        self.second.build((shape[0], 4))
        self.scale = self.add_weight(shape=(4,))  # no name: Keras numbers it ("variable_12")

    def call(self, x):
        return self.dropout(self.second(self.first(x)) * self.scale)


class Nested(keras.Model):
    def __init__(self):
        super().__init__()
        self.blocks = [Block(), Block()]
        self.recurrent = keras.layers.Bidirectional(keras.layers.LSTM(2))
        self.inner = network((3,))

    def call(self, x):
        for block in self.blocks:
            x = block(x)
        return self.inner(keras.ops.pad(self.recurrent(x[:, None, :]), ((0, 0), (0, 4))))


def nested():
    model = Nested()
    model(np.zeros((2, 8), "float32"))
    return model


def randomise(variables, seed):
    rng = np.random.default_rng(seed)
    for variable in variables:
        if keras.backend.is_float_dtype(variable.dtype):
            variable.assign(rng.normal(size=variable.shape).astype("float32"))
        else:
            variable.assign(rng.integers(1, 1000, size=variable.shape).astype(variable.dtype))


def host(variable):
    return keras.ops.convert_to_numpy(variable.value)


def values(variables):
    return [host(variable) for variable in variables]


def assert_equal(variables, expected):
    for variable, value in zip(variables, expected, strict=True):
        np.testing.assert_array_equal(host(variable), value)


def through_a_file(path, arrays):
    write_arrays(path, arrays)
    return read_arrays(path)


def variable(path, value=(0.0,), **kwargs):
    """A variable with any path."""
    *scopes, name = path.split("/")
    with contextlib.ExitStack() as stack:
        for scope in scopes:
            stack.enter_context(keras.name_scope(scope))
        result = keras.Variable(np.asarray(value, "float32"), name=name, **kwargs)
    assert result.path == path
    return result


# ---- names


def test_keys_are_paths_in_the_model_s_order():
    model = network((2,), name="net")
    named = name_variables(model.variables)
    assert list(named) == [v.path for v in model.variables]
    assert list(named.values()) == model.variables


def test_equal_paths_are_numbered_in_order_without_hiding_real_ones():
    paths = ["a/w", "a/w", "a/w#1", "a/w", "b"]
    named = name_variables([variable(path) for path in paths])
    assert list(named) == ["a/w", "a/w#2", "a/w#1", "a/w#3", "b"]


def test_a_variable_listed_twice_counts_once():
    w = variable("a/w")
    assert name_variables([w, w]) == {"a/w": w}


def test_plain_repetitions_get_1_and_2():
    named = name_variables([variable("m/dense/kernel", [i]) for i in range(3)])
    assert list(named) == ["m/dense/kernel", "m/dense/kernel#1", "m/dense/kernel#2"]
    assert [float(value[0]) for value in capture(named).values()] == [0, 1, 2]


# ---- values


def test_captured_values_stay_when_the_variables_change():
    model = network()
    randomise(model.variables, 1)
    before = values(model.variables)
    captured = capture(name_variables(model.variables))
    randomise(model.variables, 2)
    for value, expected in zip(captured.values(), before, strict=True):
        assert value.dtype == expected.dtype
        np.testing.assert_array_equal(value, expected)


def test_restored_values_stay_when_the_arrays_change():
    w = variable("w", np.zeros(2**16))
    saved = {"w": np.ones(2**16, "float32")}
    restore({"w": w}, saved)
    saved["w"][:] = 99
    assert_equal([w], [np.ones(2**16)])


@pytest.mark.core
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"])
def test_low_precision_survives_bit_for_bit(tmp_path, dtype):
    numbers = np.array([1.5, -0.0, 3.0, np.nan, -0.25], "float32")
    bits = numbers.astype(getattr(ml_dtypes, dtype, dtype))
    source = keras.Variable(numbers, dtype=dtype, trainable=False, name="w")
    target = keras.Variable(np.zeros(5, "float32"), dtype=dtype, trainable=False, name="w")
    captured = capture({"w": source})
    assert captured["w"].dtype == bits.dtype
    restore({"w": target}, through_a_file(tmp_path / "a.h5", captured))
    restored = capture({"w": target})["w"].astype("float32")
    np.testing.assert_array_equal(restored, bits.astype("float32"))
    np.testing.assert_array_equal(np.signbit(restored[1:2]), [True])


def test_scalars_stay_scalars(tmp_path):
    source, target = (keras.Variable(np.float32(x), name="s") for x in (2.5, 0))
    restore({"s": target}, through_a_file(tmp_path / "a.h5", capture({"s": source})))
    assert target.shape == ()
    assert host(target) == 2.5


@pytest.mark.parametrize("dtype", ["uint32", "int64", "int32"])
def test_seed_states_of_all_backends_fit(dtype):
    generator = keras.random.SeedGenerator(1)
    saved = np.array([987654321, 42], dtype)  # uint32 on JAX, int64 on TensorFlow, int32 on torch
    restore({"seed": generator.state}, {"seed": saved}, what="random state")
    assert_equal([generator.state], [[987654321, 42]])


def test_float32_goes_into_bfloat16_rounded_to_nearest_even():
    target = keras.Variable(np.zeros(3, "float32"), dtype="bfloat16", name="w")
    restore({"w": target}, {"w": np.array([1.00390625, 1.01171875, np.inf], "float32")})
    np.testing.assert_array_equal(host(target).astype("float32"), [1.0, 1.015625, np.inf])


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (np.array([2**40], "int64"), "int32"),
        (np.array([-1], "int32"), "uint32"),
        (np.array([2**32 - 1], "uint32"), "int32"),
        (np.array([300], "int32"), "uint8"),
        (np.array([0.5], "float32"), "int32"),
        (np.array([np.nan], "float32"), "int32"),
        (np.array([1e30], "float32"), "float16"),
        (np.array([2], "int32"), "bool"),
        (np.array([2**24 + 1], "int32"), "float32"),
        (np.array([1 + 1j], "complex64"), "float32"),
    ],
)
def test_values_that_would_change_are_refused(value, dtype):
    target = keras.Variable(np.zeros(1), dtype=dtype, trainable=False, name="w")
    with pytest.raises(CheckpointMismatchError, match=f"{value.dtype} values that {dtype} cannot"):
        restore({"w": target}, {"w": value})
    assert_equal([target], [np.zeros(1)])


# ---- matching models


@pytest.mark.parametrize("build", [network, nested])
def test_the_same_architecture_built_twice_in_one_process(build, tmp_path):
    first, second = build(), build()
    assert {v.path for v in first.variables} != {v.path for v in second.variables}
    randomise(first.variables, 1)
    randomise(second.variables, 2)
    saved = through_a_file(tmp_path / "a.h5", capture(name_variables(first.variables)))
    restore(name_variables(second.variables), saved)
    assert_equal(second.variables, values(first.variables))


def test_more_than_ten_layers_of_a_kind(tmp_path):
    first, second = network((4,) * 12), network((4,) * 12)
    randomise(first.variables, 1)
    saved = through_a_file(tmp_path / "a.h5", capture(name_variables(first.variables)))
    restore(name_variables(second.variables), saved)
    assert_equal(second.variables, values(first.variables))


@pytest.mark.core
def test_user_chosen_names_match_by_name_whatever_the_order():
    def build(order):
        inputs = keras.Input((3,))
        layers = {name: keras.layers.Dense(3, name=name) for name in ("head_1", "head_2")}
        x = inputs
        for name in order:
            x = layers[name](x)
        return keras.Model(inputs, x, name="net")

    first, second = build(["head_1", "head_2"]), build(["head_2", "head_1"])
    randomise(first.variables, 1)
    restore(name_variables(second.variables), capture(name_variables(first.variables)))
    for name in ("head_1", "head_2"):
        assert_equal(second.get_layer(name).variables, values(first.get_layer(name).variables))


def test_equal_layer_names_in_a_subclassed_model(tmp_path):
    class Twins(keras.Model):
        def __init__(self):
            super().__init__()
            self.left = keras.layers.Dense(2, name="dense")
            self.right = keras.layers.Dense(2, name="dense")

        def call(self, x):
            return self.left(x) + self.right(x)

    models = [Twins(), Twins()]
    for seed, model in enumerate(models):
        model(np.zeros((1, 2), "float32"))
        randomise(model.variables, seed)
    named = name_variables(models[0].variables)
    assert len(named) == 4
    assert sum(key.endswith("#1") for key in named) == 2
    restore(name_variables(models[1].variables), through_a_file(tmp_path / "a.h5", capture(named)))
    assert_equal(models[1].variables, values(models[0].variables))


def test_a_part_built_elsewhere_shifts_all_numbers_but_not_the_match():
    first = network()
    for _ in range(3):
        keras.layers.Dense(1)
        keras.random.SeedGenerator(1)
    second = network()
    randomise(first.variables, 1)
    plan = plan_restore(name_variables(second.variables), capture(name_variables(first.variables)))
    assert list(plan.names.values()) == [v.path for v in first.variables]
    plan.apply()
    assert_equal(second.variables, values(first.variables))


# ---- what does not fit


def refused(model, saved, what="model"):
    before = values(model.variables)
    with pytest.raises(CheckpointMismatchError) as caught:
        restore(name_variables(model.variables), saved, what=what)
    assert_equal(model.variables, before)
    return str(caught.value)


@pytest.mark.parametrize("fresh_names", [False, True])
def test_a_layer_more_or_less_is_named(fresh_names):
    small = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4)], name="net")
    if fresh_names:
        keras.layers.Dense(1)
    layers = [keras.layers.Dense(4) for _ in range(2)]
    large = keras.Sequential([keras.Input((4,)), *layers], name="net")
    extra = layers[1].name
    message = refused(large, capture(name_variables(small.variables)))
    assert "In the model but not in the checkpoint (2):" in message
    assert f"net/{extra}/kernel" in message
    assert "In the checkpoint but not in the model" not in message
    message = refused(small, capture(name_variables(large.variables)), what="teacher")
    assert "In the checkpoint but not in the teacher (2):" in message
    assert f"net/{extra}/bias" in message


def test_other_shapes_are_named_with_both_shapes():
    message = refused(network((5, 4, 2)), capture(name_variables(network((4, 4, 2)).variables)))
    assert "(8, 4) saved, (8, 5) expected" in message
    assert "saved as sequential" in message


def test_long_lists_are_cut_with_a_count():
    message = refused(network((2,) * 8), {})
    assert "(49)" in message
    assert "... and 39 more" in message


def test_names_that_differ_in_more_than_numbers_do_not_match():
    first, second = variable("net/encoder/w"), variable("net/decoder/w")
    with pytest.raises(CheckpointMismatchError, match=r"(?s)net/decoder/w.*net/encoder/w"):
        restore(name_variables([second]), capture(name_variables([first])))


@pytest.mark.parametrize("swap", [False, True])
def test_nothing_is_matched_by_position_alone(swap):
    paths = ["net/a_1/w", "net/b_1/w"]
    saved = {"net/a_5/w": np.float32([5]), "net/b_9/w": np.float32([9])}
    variables = [variable(path) for path in (reversed(paths) if swap else paths)]
    restore(name_variables(variables), saved)
    assert {v.path: float(host(v)[0]) for v in variables} == {"net/a_1/w": 5.0, "net/b_1/w": 9.0}


# ---- optimizers

OPTIMIZERS = {
    "Adam": lambda: keras.optimizers.Adam(amsgrad=True),
    "AdamW": lambda: keras.optimizers.AdamW(use_ema=True, gradient_accumulation_steps=2),
    "SGD": lambda: keras.optimizers.SGD(momentum=0.9),
    "SGD without slots": lambda: keras.optimizers.SGD(),
    "Adafactor": lambda: keras.optimizers.Adafactor(),
    "Lion": lambda: keras.optimizers.Lion(),
    "Muon": lambda: keras.optimizers.Muon(),
    "Nadam": lambda: keras.optimizers.Nadam(),
    "RMSprop": lambda: keras.optimizers.RMSprop(momentum=0.9, centered=True),
    "Adadelta": lambda: keras.optimizers.Adadelta(),
    "LossScale": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam()),
    "named": lambda: keras.optimizers.Adam(name="mine"),
}


def with_optimizer(make, build=network):
    model, optimizer = build(), make()
    optimizer.build(model.trainable_variables)
    return model, optimizer, name_optimizer_variables(optimizer.variables, model.variables)


def test_optimizer_keys_are_slot_and_model_path():
    for _ in range(2):
        model, optimizer, named = with_optimizer(OPTIMIZERS["AdamW"], lambda: network((2,)))
    trainable = [v.path for v in model.trainable_variables]
    slots = [f"{s}/{p}" for s in ("average", "gradient_accumulator") for p in trainable]
    slots += [f"{s}/{p}" for p in trainable for s in ("momentum", "velocity")]
    assert list(named) == ["iteration", "learning_rate", *slots]
    for key, slot in named.items():
        if "/" in key:
            assert (
                slot.path
                == f"{optimizer.name}/{key.partition('/')[2].replace('/', '_')}_"
                + (key.partition("/")[0])
            )


def test_the_inner_optimizer_of_a_loss_scale_optimizer():
    _, optimizer, named = with_optimizer(OPTIMIZERS["LossScale"], lambda: network((2,)))
    assert list(named)[:6] == [
        *("iteration", "learning_rate", "step_counter", "dynamic_scale"),
        *("iteration#1", "learning_rate#1"),
    ]
    assert named["iteration#1"] is optimizer.inner_optimizer.variables[0]
    assert sum("/" in key for key in named) == 8


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("follow", [False, True])
@pytest.mark.parametrize("build", [network, nested])
def test_an_optimizer_goes_with_its_model(make, follow, build, tmp_path):
    first, optimizer, named = with_optimizer(make, build)
    randomise(first.variables + optimizer.variables, 1)
    saved_model = through_a_file(tmp_path / "m.h5", capture(name_variables(first.variables)))
    saved = through_a_file(tmp_path / "o.h5", capture(named))
    second, other, named = with_optimizer(make, build)
    randomise(second.variables + other.variables, 2)
    plan = plan_restore(name_variables(second.variables), saved_model)
    restore(named, saved, "optimizer", plan.names if follow else None)
    assert_equal(other.variables, values(optimizer.variables))


def test_a_bare_path_is_never_cut_too_short():
    model = [variable("a/b"), variable("a/b_c"), variable("a_b/c")]
    optimizer = [variable("adam/iteration")]
    optimizer += [variable(f"adam/{v.path.replace('/', '_')}_m", [i]) for i, v in enumerate(model)]
    named = name_optimizer_variables(optimizer, model)
    assert list(named) == ["iteration", "m/a/b", "m/a/b_c", "m/a_b/c"]
    assert [float(value[0]) for value in list(capture(named).values())[1:]] == [0, 1, 2]


def test_what_is_not_a_slot_keeps_its_name():
    optimizer = [variable("adam/iteration"), variable("adam/trust"), variable("loose")]
    named = name_optimizer_variables(optimizer, [variable("net/w")])
    assert list(named) == ["iteration", "trust", "loose"]


def test_another_optimizer_is_refused_with_its_slots():
    model, optimizer, named = with_optimizer(OPTIMIZERS["SGD"], lambda: network((2,)))
    saved = capture(named)
    _, other, named = with_optimizer(OPTIMIZERS["Adam"], lambda: model)
    before = values(other.variables)
    with pytest.raises(CheckpointMismatchError) as caught:
        restore(named, saved, what="optimizer")
    assert "In the optimizer but not in the checkpoint" in str(caught.value)
    assert "velocity/" in str(caught.value)
    assert_equal(other.variables, before)


def test_slots_follow_their_model_variable_not_their_own_count():
    # Muon keeps a velocity only where it falls back to Adam: for another layer in each of the two.
    def build(exclude):
        model = keras.Sequential([keras.Input((3,)), *(keras.layers.Dense(3) for _ in range(2))])
        name = model.layers[exclude].name
        optimizer = keras.optimizers.Muon(exclude_layers=[f"{name}/"])
        optimizer.build(model.trainable_variables)
        return model, name_optimizer_variables(optimizer.variables, model.variables)

    (first, saved), (second, named) = build(0), build(1)
    names = plan_restore(
        name_variables(second.variables), capture(name_variables(first.variables))
    ).names
    with pytest.raises(CheckpointMismatchError, match="velocity/"):
        plan_restore(named, capture(saved), "optimizer", names)
    (third, again) = build(0)
    names = plan_restore(
        name_variables(third.variables), capture(name_variables(first.variables))
    ).names
    plan_restore(again, capture(saved), "optimizer", names)


@pytest.mark.core
def test_model_and_optimizer_are_restored_together_or_not_at_all():
    first, _, named = with_optimizer(OPTIMIZERS["SGD"])
    randomise(first.variables, 1)
    saved_model, saved = capture(name_variables(first.variables)), capture(named)
    second, _, named = with_optimizer(OPTIMIZERS["Adam"])
    before = values(second.variables)
    plan = plan_restore(name_variables(second.variables), saved_model)
    with pytest.raises(CheckpointMismatchError):
        plan_restore(named, saved, "optimizer", plan.names)
    assert_equal(second.variables, before)
    plan.apply()
    assert_equal(second.variables, values(first.variables))


@pytest.mark.parametrize("saved_from_config", [True, False])
def test_a_sequential_from_its_configuration_has_other_paths_and_matches(saved_from_config):
    layers = [
        keras.Input((3,)),
        keras.layers.Dense(4),
        keras.layers.Dropout(0.1, seed=1),
        keras.layers.Dense(2),
    ]
    first = keras.Sequential(layers)
    config = keras.saving.serialize_keras_object(first)
    second = keras.saving.deserialize_keras_object(config)
    if saved_from_config:
        first, second = second, first
    names = [set(name_variables(model.variables)) for model in (first, second)]
    assert names[0] != names[1], "Keras names them alike by now"
    first.set_weights([np.full(w.shape, i + 1.0) for i, w in enumerate(first.get_weights())])
    restore(name_variables(second.variables), capture(name_variables(first.variables)))
    for a, b in zip(first.get_weights(), second.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
