"""The `Optimizer` base: everything Keras' optimizers can do, on every backend."""

import contextlib

import keras
import numpy as np
import pytest
from keras import ops

import optim
from optim.core.checks import check_gradient
from optim.kernels import backend as kernels


def small_model(**layer):
    keras.utils.set_random_seed(1)
    return keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(3, activation="tanh", name="first", **layer),
            keras.layers.Dense(1, name="second", **layer),
        ]
    )


def batch(rng, n=8):
    return rng.standard_normal((n, 4)).astype("float32"), np.ones((n, 1), "float32")


@pytest.mark.parametrize("kernel", [None, "reference"])
def test_fit_with_a_schedule_follows_float64(tools, jit_compile, kernel):
    schedule = optim.LinearWithWarmup(0.1, num_warmup_steps=2, num_training_steps=6)
    start = np.array([1.0, -2.0, 0.5], "float32")
    model = tools.linear_model(optim.AdamW(schedule, kernel=kernel), start, jit_compile)
    x = np.array([[1.0, 2.0, -1.0], [0.5, -1.0, 3.0], [2.0, 0.25, 1.0]], "float32")
    model.fit(x, np.zeros((3, 1), "float32"), batch_size=1, epochs=2, shuffle=False, verbose=0)

    def rate(s):
        return 0.1 * (s / 2 if s < 2 else (6 - s) / 4)

    gradients = [row[:, None] for row in x] * 2
    expected = tools.reference_adamw(start[:, None], gradients, rate)
    result = tools.to_numpy(model.trainable_variables[0])
    assert tools.relative_to_movement(result, expected, start[:, None]) < 5e-6
    assert int(model.optimizer.iterations) == 6


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_keras_file_continues_identically(tools, rng, tmp_path, dtype):
    x, y = batch(rng)
    model = small_model(dtype=dtype)
    schedule = optim.CosineWithWarmup(0.05, 2, 20, num_cycles=0.7)
    model.compile(optim.AdamW(schedule, weight_decay=0.1, name="mine"), loss="mse")
    model.fit(x, y, epochs=3, verbose=0, batch_size=4, shuffle=False)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")

    assert type(loaded.optimizer) is optim.AdamW
    assert loaded.optimizer.get_config() == model.optimizer.get_config()
    assert int(loaded.optimizer.iterations) == 6
    for ours, theirs in zip(loaded.optimizer.variables, model.optimizer.variables, strict=True):
        np.testing.assert_array_equal(tools.to_numpy(ours), tools.to_numpy(theirs))
    for each in (model, loaded):
        each.fit(x, y, epochs=2, verbose=0, batch_size=4, shuffle=False)
    for ours, theirs in zip(loaded.variables, model.variables, strict=True):
        np.testing.assert_array_equal(tools.to_numpy(ours), tools.to_numpy(theirs))


def test_state_has_keras_names_and_is_float32(rng):
    model = small_model(dtype="bfloat16")
    optimizer = optim.AdamW(name="mine")
    optimizer.build(model.trainable_variables)
    kernel = model.trainable_variables[0]
    assert [v.path for v in optimizer.variables][:5] == [
        "mine/iteration",
        "mine/learning_rate",
        "mine/sequential_first_kernel_momentum".replace("sequential", model.name),
        "mine/sequential_first_kernel_velocity".replace("sequential", model.name),
        "mine/sequential_first_kernel_residual".replace("sequential", model.name),
    ]
    stock = keras.optimizers.AdamW(name="mine")
    stock.build(model.trainable_variables)
    assert {v.path for v in stock.variables} < {v.path for v in optimizer.variables}
    for slot in optimizer.slots_of(kernel).values():
        assert slot.dtype == "float32"
        assert slot.shape == kernel.shape
    built = len(optimizer.variables)
    optimizer.build(model.trainable_variables)
    assert len(optimizer.variables) == built


def test_exclude_from_weight_decay(tools):
    names = ["kernel", "bias", "scale"]
    variables = [keras.Variable(np.ones(2, "float32"), name=name) for name in names]
    optimizer = optim.AdamW(0.1, weight_decay=0.5)
    optimizer.exclude_from_weight_decay(var_names=["bias"], var_list=[variables[2]])
    tools.run(optimizer, variables, [[np.zeros(2, "float32")] * 3])
    values = [tools.to_numpy(v)[0] for v in variables]
    np.testing.assert_allclose(values, [0.95, 1.0, 1.0], rtol=1e-6)


@pytest.mark.parametrize(
    ("argument", "factor"),
    [({"clipvalue": 0.5}, None), ({"clipnorm": 1.0}, 1 / 5), ({"global_clipnorm": 1.0}, 1 / 13)],
)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_clipping(tools, argument, factor, dtype):
    # A large epsilon, so that the size of the gradient matters.
    gradients = [np.array([3.0, 4.0], dtype), np.array([12.0], dtype)]
    variables = [keras.Variable(np.zeros(g.shape, "float32")) for g in gradients]
    common = {"epsilon": 1.0, "weight_decay": 0.0}
    tools.run(optim.AdamW(1.0, **common, **argument), variables, [gradients])
    clipped = [np.minimum(g, 0.5) if factor is None else g * factor for g in gradients]
    if "clipnorm" in argument:
        clipped[1] = np.array([1.0])
    for variable, gradient in zip(variables, clipped, strict=True):
        gradient = np.asarray(gradient, "float64")
        np.testing.assert_allclose(tools.to_numpy(variable), -gradient / (gradient + 1), rtol=1e-3)


def test_global_clipnorm_of_large_float16_gradients(tools):
    # Their squares overflow float16, so the norm has to be taken in float32.
    gradient = np.array([300.0, 400.0], "float16")
    variable = keras.Variable(np.zeros(2, "float32"))
    optimizer = optim.AdamW(1.0, epsilon=1.0, weight_decay=0.0, global_clipnorm=1.0)
    tools.run(optimizer, [variable], [[gradient]])
    np.testing.assert_allclose(tools.to_numpy(variable), [-0.6 / 1.6, -0.8 / 1.8], rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradient_accumulation_counts_updates(tools, rng, dtype):
    start = np.array([1.0, 2.0, -1.0], "float32")
    gradients = [np.array(g, "float32") for g in rng.integers(-8, 8, (6, 3))]
    schedule = optim.LinearWithWarmup(0.1, 0, 3)
    optimizer = optim.AdamW(schedule, gradient_accumulation_steps=2)
    variable = keras.Variable(start, dtype=dtype)
    values = []
    for gradient in gradients:
        optimizer.apply([ops.cast(ops.convert_to_tensor(gradient), dtype)], [variable])
        values.append(tools.to_numpy(variable))
    np.testing.assert_array_equal(values[0], start)
    np.testing.assert_array_equal(values[2], values[1])
    means = [(gradients[i] + gradients[i + 1]) / 2 for i in (0, 2, 4)]
    expected = tools.reference_adamw(start, means, lambda s: 0.1 * (3 - s) / 3)
    tolerance = 1e-5 if dtype == "float32" else 2.0**-8
    np.testing.assert_allclose(values[-1], expected, rtol=tolerance)
    assert int(optimizer.iterations) == 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_moving_average(tools, rng, dtype):
    variable = keras.Variable(np.array([1.0, -2.0], "float32"), dtype=dtype)
    optimizer = optim.AdamW(0.01, use_ema=True, ema_momentum=0.9)
    expected = None
    for _ in range(30):
        tools.run(optimizer, [variable], [[rng.standard_normal(2).astype("float32")]])
        value = tools.to_numpy(variable).astype("float64")
        expected = value if expected is None else 0.9 * expected + 0.1 * value
    optimizer.finalize_variable_values([variable])
    tolerance = 1e-6 if dtype == "float32" else 2.0**-8
    np.testing.assert_allclose(tools.to_numpy(variable), expected, rtol=tolerance)


def test_moving_average_overwrites_at_its_frequency(tools):
    variable = keras.Variable(np.zeros(1, "float32"))
    optimizer = optim.AdamW(
        1.0, weight_decay=0.0, use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=2
    )
    # Updates of -1 each: the variable -1, -2; the average -1, -1.5, which is then put in.
    tools.run(optimizer, [variable], [[np.ones(1, "float32")]] * 2)
    np.testing.assert_allclose(tools.to_numpy(variable), -1.5, rtol=1e-5)


def test_moving_average_with_accumulation_counts_updates(tools):
    variable = keras.Variable(np.zeros(1, "float32"))
    optimizer = optim.AdamW(
        1.0, weight_decay=0.0, use_ema=True, ema_momentum=0.5, gradient_accumulation_steps=2
    )
    variable.assign([4.0])
    tools.run(optimizer, [variable], [[np.ones(1, "float32")]])
    optimizer.finalize_variable_values([variable])
    np.testing.assert_array_equal(tools.to_numpy(variable), 4.0)
    tools.run(optimizer, [variable], [[np.ones(1, "float32")]] * 4)
    np.testing.assert_allclose(tools.to_numpy(variable), 2.0, rtol=1e-5)
    # The variable was 3 after the first update and is 2 after the second.
    optimizer.finalize_variable_values([variable])
    np.testing.assert_allclose(tools.to_numpy(variable), 2.5, rtol=1e-5)


def test_loss_scale_optimizer(tools, jit_compile):
    start = np.array([1.0, -2.0], "float32")
    inner = optim.AdamW(0.1)
    scaled = keras.optimizers.LossScaleOptimizer(inner, initial_scale=8.0)
    model = tools.linear_model(scaled, start, jit_compile)
    x = np.array([[1.0, 2.0], [np.inf, 1.0], [0.5, -1.0]], "float32")
    model.fit(x, np.zeros((3, 1), "float32"), batch_size=1, shuffle=False, verbose=0)
    # The infinite one is left out: no update, half the scale.
    expected = tools.reference_adamw(start[:, None], [x[0][:, None], x[2][:, None]], 0.1)
    np.testing.assert_allclose(tools.to_numpy(model.trainable_variables[0]), expected, rtol=1e-5)
    assert int(inner.iterations) == 2
    assert float(scaled.dynamic_scale) == 4.0


def test_loss_scale_factor(tools):
    variable = keras.Variable(np.zeros(2, "float32"))
    optimizer = optim.AdamW(1.0, epsilon=1.0, weight_decay=0.0, loss_scale_factor=4.0)
    tools.run(optimizer, [variable], [[np.full(2, 4.0, "float32")]])
    np.testing.assert_allclose(tools.to_numpy(variable), -0.5, rtol=1e-6)


def test_missing_gradient_leaves_variable_and_state_alone(tools):
    variables = [keras.Variable(np.ones(2, "float32"), name=name) for name in "ab"]
    optimizer = optim.AdamW(0.1)
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        tools.run(optimizer, variables, [[np.ones(2, "float32"), None]])
    np.testing.assert_array_equal(tools.to_numpy(variables[1]), 1.0)
    for slot in optimizer.slots_of(variables[1]).values():
        np.testing.assert_array_equal(tools.to_numpy(slot), 0.0)
    assert np.all(tools.to_numpy(variables[0]) < 0.95)


def test_frozen_layer(tools, rng):
    model = small_model()
    model.layers[0].trainable = False
    before = [tools.to_numpy(v) for v in model.variables]
    model.compile(optim.AdamW(0.1), loss="mse")
    model.fit(*batch(rng), epochs=2, verbose=0)
    after = [tools.to_numpy(v) for v in model.variables]
    for i in (0, 1):
        np.testing.assert_array_equal(before[i], after[i])
    for i in (2, 3):
        assert np.all(before[i] != after[i])
    assert len(model.optimizer.variables) == 2 + 2 * 2


@pytest.mark.parametrize("argument", [{}, {"global_clipnorm": 1.0}])
def test_embedding_with_repeated_rows(tools, argument):
    # TensorFlow hands over an IndexedSlices that lists row 1 twice.
    start = np.arange(10, dtype="float32").reshape(5, 2)
    model = keras.Sequential([keras.Input((3,), dtype="int32"), keras.layers.Embedding(5, 2)])
    model.set_weights([start])
    optimizer = optim.AdamW(0.1, epsilon=1.0, **argument)
    model.compile(optimizer, loss=lambda y_true, y_pred: ops.sum(y_pred))
    tokens = np.array([[1, 1, 3]], "int32")
    model.fit(tokens, np.zeros((1, 3, 2), "float32"), epochs=2, verbose=0)
    gradient = np.zeros((5, 2))
    gradient[1], gradient[3] = 2.0, 1.0
    if argument:
        gradient /= np.linalg.norm(gradient)
    expected = tools.reference_adamw(start, [gradient] * 2, 0.1, epsilon=1.0)
    np.testing.assert_allclose(
        tools.to_numpy(model.trainable_variables[0]), expected, rtol=1e-5, atol=1e-6
    )


def test_rows_with_a_plain_shape_are_checked():
    class Rows:  # an IndexedSlices that was made by hand
        dense_shape = (5, 2)

        @property
        def shape(self):
            raise AttributeError("'tuple' object has no attribute 'get_shape'")

    check_gradient(Rows(), keras.Variable(np.ones((5, 2))))
    with pytest.raises(ValueError, match=r"gradient of shape \(5, 2\)"):
        check_gradient(Rows(), keras.Variable(np.ones((4, 2))))


def test_variable_overwritten_by_its_gradient(tools):
    scale = keras.Variable(np.ones(1, "float32"), name="scale")
    scale.overwrite_with_gradient = True
    weight = keras.Variable(np.ones(1, "float32"), name="weight")
    optimizer = optim.AdamW(0.5, weight_decay=0.0)
    tools.run(optimizer, [scale, weight], [[np.full(1, 7.0, "float32")] * 2])
    np.testing.assert_array_equal(tools.to_numpy(scale), 7.0)
    np.testing.assert_allclose(tools.to_numpy(weight), 0.5, rtol=1e-6)
    assert optimizer.slots_of(scale) == {}


def test_constraint_is_applied(tools):
    variable = keras.Variable(np.full(2, 0.1, "float32"))
    variable.constraint = keras.constraints.NonNeg()
    tools.run(optim.AdamW(1.0), [variable], [[np.ones(2, "float32")]])
    np.testing.assert_array_equal(tools.to_numpy(variable), 0.0)


def test_stateless_scope_changes_nothing_outside(tools):
    variable = keras.Variable(np.ones(3, "float32"))
    optimizer = optim.AdamW(0.1)
    optimizer.build([variable])
    gradient = np.array([1.0, -2.0, 3.0], "float32")
    state = [variable, *optimizer.variables]
    before = [tools.to_numpy(v) for v in state]
    given = [ops.copy(ops.convert_to_tensor(v)) for v in state]
    expected = tools.reference_adamw(before[0], [gradient], 0.1)
    # Keras refuses it on one backend; then the test is that nothing has happened.
    with contextlib.suppress(ValueError):
        new, _ = optimizer.stateless_apply(given[1:], [ops.convert_to_tensor(gradient)], given[:1])
        np.testing.assert_allclose(tools.to_numpy(new[0]), expected, rtol=1e-6)
    for variable_, tensor, value in zip(state, given, before, strict=True):
        np.testing.assert_array_equal(tools.to_numpy(variable_), value)
        np.testing.assert_array_equal(tools.to_numpy(tensor), value)


def test_overridden_rule_is_not_given_to_the_kernel_of_its_parent(tools):
    class Backwards(optim.AdamW):
        def update(self, parameter, gradient, slots, step, learning_rate, weight_decay):
            return super().update(parameter, -gradient, slots, step, learning_rate, weight_decay)

    variable = keras.Variable(np.zeros(2, "float32"))
    tools.run(Backwards(0.5), [variable], [[np.ones(2, "float32")]])
    np.testing.assert_allclose(tools.to_numpy(variable), 0.5, rtol=1e-6)


def test_rule_of_ones_own(tools, jit_compile):
    class Heavy(optim.Optimizer):
        """Gradient descent with momentum, whose slot is of another shape than the variable."""

        def slot_shapes(self, shape):
            return {"speed": shape, "steps": ()}

        def update(self, parameter, gradient, slots, step, learning_rate, weight_decay):
            speed = 0.5 * slots["speed"] + gradient
            new = {"speed": speed, "steps": slots["steps"] + 1.0}
            return parameter - learning_rate * (speed + weight_decay * parameter), new

    start = np.array([1.0, -1.0], "float32")
    model = tools.linear_model(Heavy(0.5, weight_decay=0.1), start, jit_compile)
    x = np.array([[1.0, 2.0]] * 3, "float32")
    model.fit(x, np.zeros((3, 1), "float32"), batch_size=1, verbose=0)
    expected, speed = start.astype("float64"), np.zeros(2)
    for _ in range(3):
        speed = 0.5 * speed + x[0]
        expected = expected - 0.5 * (speed + 0.1 * expected)
    variable = model.trainable_variables[0]
    np.testing.assert_allclose(tools.to_numpy(variable)[:, 0], expected, rtol=1e-5)
    assert float(model.optimizer.slots_of(variable)["steps"]) == 3.0


def test_base_class_says_what_is_missing(tools):
    variable = keras.Variable(np.zeros(2, "float32"))
    with pytest.raises(NotImplementedError, match="slot_shapes"):
        optim.Optimizer(0.1).build([variable])

    class NoRule(optim.Optimizer):
        def slot_shapes(self, shape):
            return {}

    with pytest.raises(NotImplementedError, match="NoRule must define `update"):
        tools.run(NoRule(0.1), [variable], [[np.ones(2, "float32")]])


def test_unknown_variable_is_refused(tools):
    known, unknown = (keras.Variable(np.zeros(2, "float32")) for _ in range(2))
    optimizer = optim.AdamW()
    optimizer.build([known])
    with pytest.raises(ValueError, match="Unknown variable"):
        tools.run(optimizer, [unknown], [[np.ones(2, "float32")]])


def test_kernel_modules_have_the_same_names():
    names = ("no_gradient", "colocated", "outside_of_tracing", "dense_gradient", "execute")
    for name in names:
        assert callable(getattr(kernels, name))
    assert isinstance(kernels.FUSED, dict)


NAN = float("nan")


@pytest.mark.parametrize(
    ("argument", "values"),
    [
        ("learning_rate", (NAN, -1.0)),
        ("weight_decay", (NAN, -1.0, "0.1", [0.1], True)),
        ("clipnorm", (NAN, -1.0, "0.1", [0.1], float("inf"))),
        ("clipvalue", (NAN, -1.0, "0.1", [0.1])),
        ("global_clipnorm", (NAN, -1.0, "0.1", [0.1])),
        ("use_ema", ("False", None, 1)),
        ("ema_momentum", (NAN, -0.1, 1.5, "0.9", None)),
        ("ema_overwrite_frequency", (NAN, 0, -1, 1.5, "2")),
        ("loss_scale_factor", (NAN, 0.0, -1.0, "2")),
        ("gradient_accumulation_steps", (NAN, 1, -2, 2.5, "2", float("inf"))),
        ("kernel", ("fast", 1)),
    ],
)
def test_wrong_common_arguments_are_named(argument, values):
    for value in values:
        with pytest.raises(ValueError, match=f"`{argument}`") as caught:
            optim.AdamW(**{argument: value})
        assert f"Received: {argument}={value!r}" in str(caught.value)


class TestGradientsThatCannotBeRight:
    """Where a kernel walks raw memory, a gradient that is too short would be read past its end."""

    @pytest.mark.parametrize("name", ["adamw", "lion", "adafactor"])
    def test_of_another_shape(self, name):
        variables = [keras.Variable(np.ones(n, "float32"), name=f"v{n}") for n in (4, 3)]
        optimizer = optim.get(name, learning_rate=0.1)
        for shape in [(2,), (3, 1), (), (5,)]:
            gradients = [ops.ones((4,)), ops.ones(shape)]
            with pytest.raises(ValueError, match=r"'v3' must have the shape .*\(3,\)") as caught:
                optimizer.apply(gradients, variables)
            assert f"Received: a gradient of shape {shape}" in str(caught.value)
        assert all(np.all(ops.convert_to_numpy(v) == 1.0) for v in variables)

    @pytest.mark.parametrize("count", [1, 3])
    def test_of_another_number(self, count):
        variables = [keras.Variable(np.ones(3, "float32")) for _ in range(2)]
        gradients = [ops.ones((3,)) for _ in range(count)]
        with pytest.raises(ValueError, match=f"Received: {count} gradients, 2 variables"):
            optim.AdamW().apply(gradients, variables)

    def test_variables_may_be_listed_by_a_generator(self):
        variable = keras.Variable(np.ones(3, "float32"))
        optim.SGD(0.5).apply([ops.ones((3,))], (v for v in [variable]))
        np.testing.assert_array_equal(ops.convert_to_numpy(variable), 0.5)

    def test_for_one_variable(self):
        variable = keras.Variable(np.ones(3, "float32"))
        optimizer = optim.AdamW()
        optimizer.build([variable])
        with pytest.raises(ValueError, match="must have the shape"):
            optimizer.update_step(ops.ones(()), variable, 0.1)


@pytest.mark.parametrize("name", ["sgd", "adamw", "muon", "adafactor"])
def test_accumulation_is_one_larger_batch_for_averages_too(tools, name):
    """An average that overwrites the weights every second update is not one for micro-batches."""
    generator = np.random.default_rng(0)
    start = generator.normal(size=(3, 4)).astype("float32")
    gradients = generator.normal(size=(4, 3, 3, 4)).astype("float32")
    results = []
    for steps in (None, 3):
        variable = keras.Variable(start, name="kernel")
        optimizer = optim.get(
            name,
            learning_rate=optim.LinearWithWarmup(0.1, 1, 9),
            use_ema=True,
            ema_momentum=0.5,
            ema_overwrite_frequency=2,
            gradient_accumulation_steps=steps,
        )
        calls = gradients.mean(axis=1) if steps is None else gradients.reshape(12, 3, 4)
        tools.run(optimizer, [variable], calls[:, None])
        results.append(tools.to_numpy(variable))
    np.testing.assert_allclose(results[0], results[1], rtol=1e-5, atol=1e-6)
    assert np.abs(results[0] - start).max() > 0.01


def test_gradients_may_be_arrays():
    variable = keras.Variable([1.0, 2.0])
    optim.SGD(0.5).apply([np.array([2.0, 4.0])], [variable])
    np.testing.assert_array_equal(ops.convert_to_numpy(variable), [0.0, 0.0])
