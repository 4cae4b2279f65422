"""Rules under XLA: results that wait for the readers of their old values, and are still right."""

import importlib
import re

import numpy as np
import pytest

pytestmark = pytest.mark.cross  # needs JAX and TensorFlow, whatever Keras runs on

SHAPE = (256, 96)


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


def _sum(x):
    """The sum in the library that ``x`` is of."""
    tf = importlib.import_module("tensorflow")
    return tf.reduce_sum(x) if tf.is_tensor(x) else x.sum()


def summed(p, g, s):
    """LAMB's form: a sum over what is needed once more."""
    m = 0.9 * s["m"] + 0.1 * g
    direction = m / (1.0 + m * m)
    total = _sum(direction * direction)
    return p - direction / (1.0 + total), {"m": m}


RULES = {  # rule: its slots, and how many tensors may be kept besides
    two_read_one: (("m",), 0),
    moved: (("d", "before"), 0),
    reused: (("m", "unused"), 0),
    scalars: (("m", "total"), 0),
    circle: (("m",), 2),
    exchanged: (("a", "b"), 2),
    summed: (("m",), 2),
}


def draw(names):
    """A variable's value, its slots and its gradient."""
    generator = np.random.default_rng(1)
    shapes = {name: () if name == "total" else SHAPE for name in ("p", *names, "g")}
    drawn = {n: generator.normal(size=s).astype("float32") for n, s in shapes.items()}
    return drawn.pop("p"), drawn.pop("g"), drawn


def check(rule, given, value, slots):
    """Compare results with those of the rule in NumPy's float64."""
    old_value, gradient, old = given
    wide = {name: np.asarray(slot, "float64") for name, slot in old.items()}
    expected, expected_slots = rule(old_value.astype("float64"), gradient.astype("float64"), wide)
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)
    assert slots.keys() == expected_slots.keys()
    for name, slot in expected_slots.items():
        np.testing.assert_allclose(slots[name], slot, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_jax_makes_the_numbers_of_the_rule_and_copies_nothing(rule):
    jax = importlib.import_module("jax")
    order = importlib.import_module("optim.kernels.jax.inplace_order")
    names, most = RULES[rule]
    value, gradient, slots = draw(names)

    def update(value, slots, gradient):
        (value, slots), _ = order.in_place(lambda v, g, s: rule(v, g, s), value, gradient, slots)
        return value, slots

    cpu = jax.devices("cpu")[0]
    given = jax.device_put((value, slots, gradient), cpu)
    compiled = jax.jit(update, donate_argnums=(0, 1)).lower(*given).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    assert temporary <= most * value.nbytes + 1024
    check(rule, (value, gradient, slots), *compiled(*given))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_tensorflow_makes_the_numbers_of_the_rule_and_copies_nothing(rule):
    tf = importlib.import_module("tensorflow")
    order = importlib.import_module("optim.kernels.tensorflow.inplace_order")
    names, most = RULES[rule]
    value, gradient, slots = draw(names)
    with tf.device("CPU:0"):
        variable = tf.Variable(value)
        states = {name: tf.Variable(slot) for name, slot in slots.items()}

    @tf.function(jit_compile=True, autograph=False)
    def update(gradient):
        old = {name: state.value() for name, state in states.items()}
        new, new_slots = order.in_place(rule, variable.value(), gradient, old)
        variable.assign(new)
        for name, state in states.items():
            state.assign(new_slots[name])

    compiled = update.experimental_get_compiler_ir(tf.constant(gradient))(stage="optimized_hlo")
    copies = re.findall(r"= f32\[256,96\]\S* copy\(", compiled)
    assert len(copies) <= most
    update(tf.constant(gradient))
    check(
        rule, (value, gradient, slots), variable.numpy(), {n: s.numpy() for n, s in states.items()}
    )


@pytest.mark.parametrize(
    ("rule", "expected"), [(two_read_one, True), (reused, True), (circle, False), (summed, False)]
)
def test_says_whether_something_is_kept_in_between(rule, expected):
    jnp = importlib.import_module("jax.numpy")
    order = importlib.import_module("optim.kernels.jax.inplace_order")
    ones = jnp.ones(SHAPE)
    slots = {name: ones for name in RULES[rule][0]}
    _, one_loop = order.in_place(lambda v, g, s: rule(v, g, s), ones, ones, slots)
    assert one_loop is expected
