"""The mark `elementwise`, and that no kernel takes a rule for what it is not."""

import keras
import numpy as np
import pytest
from keras import ops

import optim
from optim.optimizer import elementwise


class Swapping(optim.Optimizer):
    """Slots that change places, one that stays, one that is the gradient, one that counts."""

    def slot_shapes(self, shape):
        return {"a": shape, "b": shape, "same": shape, "last": shape, "count": ()}

    @elementwise
    def update(self, parameter, gradient, slots, step, learning_rate, weight_decay):
        a, b = slots["a"], slots["b"]
        new = parameter - learning_rate * (parameter * gradient + a)
        count = slots["count"] + 1.0
        slots = {"a": b, "b": a + parameter, "same": slots["same"], "last": gradient}
        return new + weight_decay * parameter, {**slots, "count": count}


@pytest.mark.parametrize("size", [5, 200_000])
def test_values_that_move_between_the_slots(tools, rng, size):
    start = rng.standard_normal(size).astype("float32")
    gradients = [rng.standard_normal(size).astype("float32") for _ in range(3)]
    variable = keras.Variable(start, name="v")
    optimizer = Swapping(0.1, weight_decay=0.5)
    tools.run(optimizer, [variable], [[g] for g in gradients])
    p, a, b = start.astype("float64"), 0.0, 0.0
    for g in gradients:
        p, a, b = p - 0.1 * (p * g + a) + 0.5 * p, b, a + p
    slots = optimizer.slots_of(variable)
    np.testing.assert_allclose(tools.to_numpy(variable), p, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(tools.to_numpy(slots["a"]), a, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(tools.to_numpy(slots["b"]), b, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(tools.to_numpy(slots["last"]), gradients[-1])
    np.testing.assert_array_equal(tools.to_numpy(slots["same"]), 0.0)
    assert float(slots["count"]) == 3.0


def test_a_large_tensor_in_pieces_equals_the_rule(tools, rng):
    # Longer than a piece, and no multiple of one.
    start = rng.standard_normal(150_001).astype("float32")
    gradient = rng.standard_normal(150_001).astype("float32")
    results = []
    for kernel in (None, "reference"):
        variable = keras.Variable(start)
        tools.run(optim.Lion(0.01, kernel=kernel), [variable], [[gradient]])
        results.append(tools.to_numpy(variable))
    np.testing.assert_allclose(results[0], results[1], rtol=1e-6, atol=1e-7)


def test_a_rule_that_overrides_a_marked_one_is_not_marked(tools):
    class Normalised(optim.Lion):
        def update(self, parameter, gradient, slots, step, learning_rate, weight_decay):
            gradient = gradient / ops.sqrt(ops.sum(gradient * gradient))
            return parameter - learning_rate * gradient, slots

    variable = keras.Variable(np.zeros(2, "float32"))
    tools.run(Normalised(1.0), [variable], [[np.array([3.0, -4.0], "float32")]])
    np.testing.assert_allclose(tools.to_numpy(variable), [-0.6, 0.8], rtol=1e-6)
