"""Rules on JAX: results that wait for the readers of their old values, and are still right."""

import importlib

import numpy as np
import pytest

pytestmark = pytest.mark.cross  # needs JAX, whatever Keras runs on

SHAPE = (64, 48)


def two_read_one(p, g, s):
    """Lion's form: both results read the old momentum."""
    return p - 0.1 * (0.9 * s["m"] + 0.1 * g), {"m": 0.5 * s["m"] + 0.5 * g}


def moved(p, g, s):
    """Adan's form: the gradient becomes state, whose old value others read."""
    return p - 0.1 * (g - s["before"]), {"d": s["d"] + s["before"], "before": g}


def reused(p, g, s):
    """AdamW's form: the weight is made from the new state."""
    m = 0.9 * s["m"] + 0.1 * g
    return p - 0.1 * m, {"m": m, "unused": s["unused"]}


def scalars(p, g, s):
    """A scalar slot, which others read, and one that is a constant afterwards."""
    total = s["total"] + 1.0
    return p - g / total, {"m": s["m"] * s["total"] + p, "total": total}


def circle(p, g, s):
    """Each needs the old value of the other: one of them has to be copied."""
    return p + s["m"] * g, {"m": s["m"] - p * g}


def exchanged(p, g, s):
    """Two slots change places."""
    return p - s["a"], {"a": s["b"], "b": s["a"] + 0.0 * g}


def summed(p, g, s):
    """LAMB's form: a sum over what is needed once more."""
    m = 0.9 * s["m"] + 0.1 * g
    direction = m / (1.0 + m * m)
    return p - direction / (1.0 + (direction * direction).sum()), {"m": m}


RULES = {  # rule: its slots, and how many tensors may be kept besides
    two_read_one: (("m",), 0),
    moved: (("d", "before"), 0),
    reused: (("m", "unused"), 0),
    scalars: (("m", "total"), 0),
    circle: (("m",), 2),
    exchanged: (("a", "b"), 2),
    summed: (("m",), 2),
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_numbers_are_those_of_the_rule_and_nothing_is_copied(rule):
    jax = importlib.import_module("jax")
    order = importlib.import_module("optim.kernels.jax_order")
    generator = np.random.default_rng(1)
    names, most = RULES[rule]

    def draw(shape):
        return generator.normal(size=shape).astype("float32")

    slots = {name: draw(() if name == "total" else SHAPE) for name in names}
    value, gradient = draw(SHAPE), draw(SHAPE)

    def update(value, slots, gradient):
        (value, slots), _ = order.in_place(lambda v, g, s: rule(v, g, s), value, gradient, slots)
        return value, slots

    cpu = jax.devices("cpu")[0]
    given = jax.device_put((value, slots, gradient), cpu)
    compiled = jax.jit(update, donate_argnums=(0, 1)).lower(*given).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    assert temporary <= most * value.nbytes + 1024
    new_value, new_slots = compiled(*given)
    wide = {name: slot.astype("float64") for name, slot in slots.items()}
    expected, expected_slots = rule(value.astype("float64"), gradient.astype("float64"), wide)
    np.testing.assert_allclose(new_value, expected, rtol=1e-5, atol=1e-6)
    assert new_slots.keys() == expected_slots.keys()
    for name, slot in expected_slots.items():
        np.testing.assert_allclose(new_slots[name], slot, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("rule", "expected"), [(two_read_one, True), (reused, True), (circle, False), (summed, False)]
)
def test_says_whether_something_is_kept_in_between(rule, expected):
    jnp = importlib.import_module("jax.numpy")
    order = importlib.import_module("optim.kernels.jax_order")
    ones = jnp.ones(SHAPE)
    slots = {name: ones for name in RULES[rule][0]}
    _, one_loop = order.in_place(lambda v, g, s: rule(v, g, s), ones, ones, slots)
    assert one_loop is expected
