"""The mark `elementwise`, and that no kernel takes a rule for what it is not."""

import keras
import numpy as np
import pytest
from keras import ops

import optim
from optim.core.optimizer import elementwise


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


def test_a_large_tensor_in_tiles_equals_the_rule(tools, rng):
    # Longer than a tile, and no multiple of one.
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


# ---- what the kernel of PyTorch joins, and what it must not --------------------------------------
#
# Each of these is a formula that is computed twice: with `keras.ops` in float32 as a rule, and with
# NumPy in float64.


def adam(xp, p, g, s, lr):
    m, v = s["a"] + 0.1 * (g - s["a"]), s["b"] + 0.01 * (g * g - s["b"])
    return p - lr * 0.1 * p - lr * m / (0.5 * xp.sqrt(v) + 1e-3), {"a": m, "b": v}


def no_mean(xp, p, g, s, lr):
    v = s["b"] + 0.01 * (g * g - s["b"])
    return p - lr * g / (xp.sqrt(v) + 1e-3), {"a": g, "b": v}


def old_numerator(xp, p, g, s, lr):
    v = s["b"] + 0.01 * (g * g - s["b"])
    return p - lr * s["a"] / (xp.sqrt(v) + 1e-3), {"a": s["a"] + g, "b": v}


def of_something_else(xp, p, g, s, lr):
    x = g + s["a"]
    m, v = s["a"] + 0.1 * (g - s["a"]), s["b"] + 0.01 * (x * x - s["b"])
    return p + lr * m / (xp.sqrt(v) + 1e-3), {"a": m, "b": v}


def quotient_used_twice(xp, p, g, s, lr):
    v = s["b"] + 0.01 * (g * g - s["b"])
    u = g / (xp.sqrt(v) + 1e-3)
    return p - lr * u, {"a": s["a"] + u, "b": v}


def square_mean_used_twice(xp, p, g, s, lr):
    v = s["b"] + 0.01 * (g * g - s["b"])
    return p - lr * g / (xp.sqrt(v) + 1e-3), {"a": v * g, "b": v}


def old_square_mean_used_later(xp, p, g, s, lr):
    v = s["b"] + 0.01 * (g * g - s["b"])
    p = p - lr * g / (xp.sqrt(v) + 1e-3)
    return p - lr * s["b"], {"a": s["b"], "b": v}


def in_another_place(xp, p, g, s, lr):
    v = s["b"] + 0.01 * (g * g - s["b"])
    return p - lr * g / (xp.sqrt(v) + 1e-3), {"a": v, "b": s["a"] + g * g}


def mean_used_twice(xp, p, g, s, lr):
    m, v = s["a"] + 0.1 * (g - s["a"]), s["b"] + 0.01 * (g * g - s["b"])
    p = p - lr * m / (xp.sqrt(v) + 1e-3)
    return p - lr * m, {"a": m, "b": v}


def nearly_one(xp, p, g, s, lr):
    m, v = s["a"] + 0.1 * (g - s["a"]), s["b"] + 1e-5 * (g * g - s["b"])
    return p - lr * m / (xp.sqrt(v) + 1e-3), {"a": m, "b": v}


def norms(xp, p, g, s, lr):
    m = s["a"] + 0.1 * (g - s["a"])
    ratio = xp.sqrt(xp.sum(p * p)) / xp.sqrt(xp.sum(m * m))
    return p - lr * ratio * m, {"a": m, "b": s["b"] + ratio * g}


def sum_of_adam(xp, p, g, s, lr):
    m, v = s["a"] + 0.1 * (g - s["a"]), s["b"] + 0.01 * (g * g - s["b"])
    u = m / (xp.sqrt(v) + 1e-3)
    return p - lr * xp.sum(u * u) * u, {"a": m, "b": v}


def mean_over_all(xp, p, g, s, lr):
    v = s["b"] + 0.01 * (g * g - s["b"])
    rate = lr / xp.maximum(1.0, xp.sqrt(xp.mean(g * g / xp.maximum(v, 1e-6))))
    return p - rate * g / (xp.sqrt(v) + 1e-3), {"a": s["a"] + xp.abs(g), "b": v}


def sum_before_the_root(xp, p, g, s, lr):
    v = s["b"] + 50.0 * lr * (g * g - s["b"])
    rate = lr / xp.maximum(1.0, xp.sum(g * g / xp.maximum(v, 1e-6)) / 1e5)
    m = s["a"] + 300.0 * lr * (g - s["a"])
    return p - rate * m / (xp.sqrt(v) + 1e-3), {"a": m, "b": v}


def squares_by_a_root(xp, p, g, s, lr):
    v = s["b"] + 0.01 * (g * g - s["b"])
    u = g / xp.sqrt(xp.maximum(v, 1e-6))
    return p - lr / (1.0 + xp.mean(u * u)) * g, {"a": s["a"], "b": v}


def squares_by_a_root_used_again(xp, p, g, s, lr):
    v = s["b"] + 0.01 * (g * g - s["b"])
    u = g / xp.sqrt(v)
    return p - lr / (1.0 + xp.mean(u * u)) * u, {"a": s["a"] + u, "b": v}


def root_of_what_no_gradient_moved(xp, p, g, s, lr):
    v = s["b"] + (lr - lr) * (g * g - s["b"])
    rate = lr / (1.0 + xp.sum(g * v))
    m = s["a"] + 300.0 * lr * (g - s["a"])
    return p - 1e-7 * rate * m / (xp.sqrt(v) + 1e-7), {"a": m, "b": 0.0 * v}


def mean_that_rests(xp, p, g, s, lr):
    m, v = s["a"] + (lr - lr) * (g - s["a"]), s["b"] + 0.01 * (g * g - s["b"])
    return p - lr * m / (xp.sqrt(v) + 1e-3), {"a": m, "b": v}


def old_gradient_after_a_sum(xp, p, g, s, lr):
    x = s["a"]
    v = s["b"] + 0.01 * (x * x - s["b"])
    rate = lr / (1.0 + xp.sum(v))
    return p - rate * g / (xp.sqrt(v) + 1e-3), {"a": g, "b": v}


def old_values_after_a_sum(xp, p, g, s, lr):
    m = s["a"] + 0.1 * (g - s["a"])
    total = xp.sum(m) / 100.0
    return p - lr * total * s["a"], {"a": s["b"] - m, "b": m}


def sum_of_what_is_given(xp, p, g, s, lr):
    return p - lr * xp.sum(g) * g, {"a": s["a"] + xp.sum(s["a"]) * 0.1 + g, "b": s["b"] + p}


FORMULAS = [
    adam,
    no_mean,
    old_numerator,
    of_something_else,
    quotient_used_twice,
    square_mean_used_twice,
    old_square_mean_used_later,
    in_another_place,
    mean_used_twice,
    nearly_one,
    norms,
    sum_of_adam,
    mean_over_all,
    sum_before_the_root,
    squares_by_a_root,
    squares_by_a_root_used_again,
    root_of_what_no_gradient_moved,
    mean_that_rests,
    old_gradient_after_a_sum,
    old_values_after_a_sum,
    sum_of_what_is_given,
]


class ByFormula(optim.Optimizer):
    """A rule with two slots that begin at 0.5."""

    formula = None

    def slot_shapes(self, shape):
        return {name: optim.Slot(shape, initializer=0.5) for name in "ab"}

    @elementwise
    def update(self, parameter, gradient, slots, step, learning_rate, weight_decay):
        return type(self).formula(ops, parameter, gradient, slots, learning_rate)


@pytest.mark.parametrize("formula", FORMULAS)
def test_a_formula(tools, rng, formula):
    rule = type("Formula", (ByFormula,), {"formula": staticmethod(formula)})
    sizes = (6, 70_001)  # the second one is longer than a tile
    starts = [rng.standard_normal(size).astype("float32") for size in sizes]
    gradients = [[rng.standard_normal(size).astype("float32") for size in sizes] for _ in range(3)]
    gradients = [[g if g.size < 9 else g * 1e-2 for g in given] for given in gradients]
    variables = [keras.Variable(start) for start in starts]
    optimizer = rule(1e-3)
    tools.run(optimizer, variables, gradients)
    for i, (variable, start) in enumerate(zip(variables, starts, strict=True)):
        p, slots = start.astype("float64"), {name: np.full(start.shape, 0.5) for name in "ab"}
        for given in gradients:
            p, slots = formula(np, p, given[i].astype("float64"), slots, 1e-3)
        expected = {"parameter": p, **slots}
        found = {"parameter": variable, **optimizer.slots_of(variable)}
        for name, value in expected.items():
            result = tools.to_numpy(found[name])
            scale = np.abs(value).max()
            np.testing.assert_allclose(
                result, value, rtol=1e-5, atol=2e-6 * scale, err_msg=f"{name} {i}"
            )


def test_the_gradient_is_left_as_it_is(tools, rng):
    rule = type("Formula", (ByFormula,), {"formula": staticmethod(no_mean)})
    variable = keras.Variable(np.ones(4, "float32"))
    gradient = ops.convert_to_tensor(np.array([1.0, np.inf, -2.0, 0.0], "float32"))
    rule(1e-3).apply([gradient], [variable])
    np.testing.assert_array_equal(tools.to_numpy(gradient), [1.0, np.inf, -2.0, 0.0])
    assert np.isfinite(tools.to_numpy(variable)[[0, 2, 3]]).all()


def test_a_changed_hyperparameter_counts_from_the_next_update(tools, rng):
    start, *gradients = (rng.standard_normal(7).astype("float32") for _ in range(5))
    variable, other, small = (keras.Variable(start, name=name) for name in "vws")
    lion, adafactor = optim.Lion(0.1, beta_1=0.9, beta_2=0.7), optim.Adafactor(0.1)
    in_8_bits = optim.Lion8bit(0.1, beta_1=0.9, beta_2=0.7)  # its small tensors are in 32
    p, m, q, v = start.astype("float64"), 0.0, start.astype("float64"), 0.0
    for i, g in enumerate(gradients, 1):
        if i == 3:
            lion.beta_1, adafactor.clip_threshold, in_8_bits.beta_1 = 0.1, 0.25, 0.1
        tools.run(lion, [variable], [[g]])
        tools.run(adafactor, [other], [[g]])
        tools.run(in_8_bits, [small], [[g]])
        beta_1, threshold = (0.9, 1.0) if i < 3 else (0.1, 0.25)
        p = p - 0.1 * np.sign(beta_1 * m + (1 - beta_1) * g)
        m = 0.7 * m + 0.3 * g
        v = v + i**-0.8 * (g.astype("float64") ** 2 - v)
        delta = g / np.sqrt(v)
        q = q - 0.1 * delta / max(1.0, np.sqrt(np.mean(delta**2)) / threshold)
        np.testing.assert_allclose(tools.to_numpy(variable), p, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(tools.to_numpy(small), p, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(tools.to_numpy(other), q, rtol=1e-5, atol=1e-5)
