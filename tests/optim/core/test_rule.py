"""Rules, slots, learning rates and decays that differ by variable; slots of any kind."""

import keras
import numpy as np
import pytest
from keras import ops

import optim


class Descent(optim.Optimizer):
    """Gradient descent that counts its updates in integers and remembers where it began."""

    def slot_shapes(self, shape):
        return {
            "count": optim.Slot((), dtype="int32", initializer=3),
            "start": optim.Slot(shape, initializer="parameter"),
            "zeros": shape,
        }

    def update(self, parameter, gradient, slots, step, learning_rate, weight_decay):
        slots = {**slots, "count": slots["count"] + 1}
        parameter = parameter - learning_rate * (gradient + weight_decay * parameter)
        return parameter, slots


class Mixed(optim.Optimizer):
    """`Descent` for vectors, AdamW for matrices; `slow` in a name is a tenth of the rate."""

    def __init__(self, learning_rate, **common):
        super().__init__(learning_rate, **common)
        self.descent = Descent(weight_decay=0.5)
        self.adamw = optim.AdamW(weight_decay=0.25)

    def rule_for(self, variable):
        return self.adamw if len(variable.shape) == 2 else self.descent

    def learning_rate_multiplier_of(self, variable):
        return 0.1 if "slow" in variable.name else 1.0


def variables(dtype="float32"):
    shapes = {"vector": (2,), "slow_vector": (3,), "matrix": (2, 2), "slow_matrix": (1, 2)}
    return [keras.Variable(np.ones(s, "float32"), dtype=dtype, name=n) for n, s in shapes.items()]


@pytest.mark.parametrize("kernel", [None, "reference"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_variable_gets_its_rule_rate_and_decay(tools, rng, kernel, dtype):
    trained = variables(dtype)
    optimizer = Mixed(0.01, kernel=kernel)
    optimizer.exclude_from_weight_decay(var_list=[trained[1]])
    gradients = [
        [rng.standard_normal(tuple(v.shape)).astype("float32") for v in trained] for _ in range(4)
    ]
    tools.run(optimizer, trained, gradients)
    for i, (variable, rate) in enumerate(zip(trained, (0.01, 0.001, 0.01, 0.001), strict=True)):
        own = [g[i] for g in gradients]
        expected = np.ones(tuple(variable.shape))
        if i > 1:
            expected = tools.reference_adamw(expected, own, rate, weight_decay=0.25)
        else:
            for gradient in own:
                decay = 0.5 if i == 0 else 0.0
                expected = expected - rate * (gradient + decay * expected)
        tolerance = 1e-6 if dtype == "float32" else 2.0**-8
        np.testing.assert_allclose(tools.to_numpy(variable), expected, rtol=tolerance)


def test_slots_have_the_dtype_and_the_first_value_asked_for(tools):
    trained = [keras.Variable(np.array([1.0, -2.5], "float32"), dtype="bfloat16")]
    optimizer = Descent(1.0)
    optimizer.build(trained)
    slots = optimizer.slots_of(trained[0])
    assert {n: s.dtype for n, s in slots.items()} == {
        "count": "int32",
        "start": "float32",
        "zeros": "float32",
        "residual": "float32",
    }
    tools.run(optimizer, trained, [[np.ones(2, "float32")]] * 2)
    assert int(slots["count"]) == 5
    np.testing.assert_array_equal(tools.to_numpy(slots["start"]), [1.0, -2.5])
    np.testing.assert_array_equal(tools.to_numpy(trained[0]), [-1.0, -4.5])


def test_each_variable_gets_its_rule_decay_and_rate(tools):
    trained = variables()
    optimizer = Mixed(0.01)
    optimizer.build(trained)
    assert [optimizer.update_rule_of(v) for v in trained] == [
        (optimizer.descent, 0.5, 1.0),
        (optimizer.descent, 0.5, 0.1),
        (optimizer.adamw, 0.25, 1.0),
        (optimizer.adamw, 0.25, 0.1),
    ]
    assert optimizer.rule_of(trained[2]) is optimizer.adamw


def test_a_rule_may_delegate_again(tools):
    class Outer(optim.Optimizer):
        def __init__(self, learning_rate):
            super().__init__(learning_rate)
            self.inner = Mixed(1.0)

        def rule_for(self, variable):
            return self.inner

    trained = [keras.Variable(np.ones((2, 2), "float32"))]
    optimizer = Outer(0.1)
    tools.run(optimizer, trained, [[np.ones((2, 2), "float32")]])
    assert optimizer.rule_of(trained[0]) is optimizer.inner.adamw
    np.testing.assert_allclose(tools.to_numpy(trained[0]), 1 - 0.1 * 1.25, rtol=1e-6)


def test_mixed_rules_work_in_fit(tools, jit_compile):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name="slow")])
    model.set_weights([np.ones((3, 2), "float32"), np.ones(2, "float32")])
    optimizer = Mixed(0.1)
    model.compile(optimizer, loss=lambda y, p: ops.sum(p), jit_compile=jit_compile)
    model.fit(np.ones((2, 3)), np.ones((2, 2)), batch_size=2, epochs=2, verbose=0)
    kernel, bias = (tools.to_numpy(v) for v in model.trainable_variables)
    expected = tools.reference_adamw(
        np.ones((3, 2)), [np.full((3, 2), 2.0)] * 2, 0.1, weight_decay=0.25
    )
    np.testing.assert_allclose(kernel, expected, rtol=1e-5)
    assert int(optimizer.slots_of(model.trainable_variables[1])["count"]) == 5
    np.testing.assert_allclose(bias, (1 - 0.1 * 2.5) - 0.1 * (2 + 0.5 * 0.75), rtol=1e-5)
