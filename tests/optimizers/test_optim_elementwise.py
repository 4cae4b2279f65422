"""The mark `elementwise`, and that no kernel takes a rule for what it is not."""

import keras
import numpy as np
import pytest
from keras import ops

import optim
from optim.optimizer import elementwise


class Swapping(optim.Optimizer):
    """Slots that change places, one that stays, one that is the gradient, one that counts."""

    order = ("a", "b", "c", "same", "last")

    def slot_shapes(self, shape):
        return {**dict.fromkeys(self.order, shape), "count": ()}

    @elementwise
    def update(self, parameter, gradient, slots, step, learning_rate, weight_decay):
        a, b = slots["a"], slots["b"]
        new = parameter - learning_rate * (parameter * gradient + a)
        count = slots["count"] + 1.0
        moved = {"a": b, "b": slots["c"], "c": a + parameter}
        kept = {"same": slots["same"], "last": gradient, "count": count}
        return new + weight_decay * parameter, {**moved, **kept}


class Backwards(Swapping):
    order = ("last", "same", "c", "b", "a")


class Exchanging(optim.Optimizer):
    """Two slots that do nothing else than change places."""

    def slot_shapes(self, shape):
        return {"a": optim.Slot(shape, initializer=1.0), "b": shape}

    @elementwise
    def update(self, parameter, gradient, slots, step, learning_rate, weight_decay):
        return parameter - learning_rate * slots["a"], {"a": slots["b"], "b": slots["a"]}


@pytest.mark.parametrize("kernel", [None, "reference"])
@pytest.mark.parametrize("cls", [Swapping, Backwards])
@pytest.mark.parametrize("size", [5, 200_000])
def test_values_that_move_between_the_slots(tools, rng, cls, size, kernel):
    start = rng.standard_normal(size).astype("float32")
    gradients = [rng.standard_normal(size).astype("float32") for _ in range(4)]
    variable = keras.Variable(start, name="v")
    optimizer = cls(0.1, weight_decay=0.5, kernel=kernel)
    tools.run(optimizer, [variable], [[g] for g in gradients])
    p, a, b, c = start.astype("float64"), 0.0, 0.0, 0.0
    for g in gradients:
        p, a, b, c = p - 0.1 * (p * g + a) + 0.5 * p, b, c, a + p
    slots = optimizer.slots_of(variable)
    for name, expected in {"a": a, "b": b, "c": c, "last": gradients[-1], "same": 0.0}.items():
        result = tools.to_numpy(slots[name])
        np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(tools.to_numpy(variable), p, rtol=1e-4, atol=1e-5)
    assert float(slots["count"]) == 4.0


@pytest.mark.parametrize("kernel", [None, "reference"])
def test_two_slots_change_places(tools, kernel):
    variable = keras.Variable(np.zeros(3, "float32"))
    optimizer, path = Exchanging(1.0, kernel=kernel), []
    for _ in range(4):
        tools.run(optimizer, [variable], [[np.ones(3, "float32")]])
        path.append(float(tools.to_numpy(variable)[0]))
    assert path == [-1.0, -1.0, -2.0, -2.0]


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
