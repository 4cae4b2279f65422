"""SOAP against NumPy float64: the rule, when it decomposes, who gets it, and what is kept."""

import keras
import numpy as np
import pytest
from helpers_contract import BACKEND, compiled, host
from keras import ops

import optim
from optim.algorithms import soap


def reference(start, gradients, rate, sides, frequency, longest=100, betas=(0.95, 0.95),
              shampoo_beta=None, epsilon=1e-8, weight_decay=0.01):  # fmt: skip
    """The authors' implementation, in float64: the first gradient only makes the bases."""
    p = np.asarray(start, "float64")
    beta = betas[1] if shampoo_beta is None else shampoo_beta
    used = [length <= longest for length in sides]
    gg = [np.zeros((length, length)) for length in sides]
    bases = [np.eye(length) for length in sides]
    m, v = np.zeros(sides), np.zeros(sides)
    for t, gradient in enumerate(gradients):
        g = np.asarray(gradient, "float64").reshape(sides)
        if t:
            left, right = bases
            m = betas[0] * m + (1 - betas[0]) * g
            v = betas[1] * v + (1 - betas[1]) * (left.T @ g @ right) ** 2
            n = (left.T @ m @ right) / (np.sqrt(v) + epsilon)
            size = rate * np.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t)
            p = p - size * (left @ n @ right.T).reshape(p.shape)
            p = p - rate * weight_decay * p
        for side, outer in enumerate((g @ g.T, g.T @ g)):
            gg[side] = beta * gg[side] + (1 - beta) * outer
            if not used[side]:
                continue
            if t == 0:
                bases[side] = np.linalg.eigh(gg[side])[1][:, ::-1]
            elif t % frequency == 0:
                q = bases[side]
                order = np.argsort(-np.diag(q.T @ gg[side] @ q))
                v = np.take(v, order, axis=side)
                bases[side] = np.linalg.qr(gg[side] @ q[:, order])[0]
    return p


# Both sides of a matrix that is not square have no unique basis at first: one of the gradient's
# products is singular. There one side is left out.
CASES = {
    "square": ((5, 5), (5, 5), {"weight_decay": 0.3}),
    "wide": ((4, 7), (4, 7), {"max_precond_dim": 5, "betas": (0.5, 0.9), "shampoo_beta": 0.8}),
    "tall": ((7, 4), (7, 4), {"max_precond_dim": 4, "epsilon": 1e-3}),
    "adam": ((4, 7), (4, 7), {"max_precond_dim": 3, "betas": (0.9, 0.99)}),
    "convolution": ((2, 2, 3, 5), (12, 5), {"max_precond_dim": 6, "weight_decay": None}),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("dtype", "size"), [("float32", 1.0), ("float32", 1e-6), ("bfloat16", 1)])
def test_follows_float64(tools, rng, name, dtype, size):
    shape, sides, arguments = CASES[name]
    if size < 1e-3 and "epsilon" not in arguments:
        arguments = {**arguments, "epsilon": 1e-12}
    variable = keras.Variable(rng.standard_normal(shape).astype("float32"), dtype=dtype)
    start = tools.to_numpy(variable)
    gradients = [(size * rng.standard_normal(shape)).astype("float32") for _ in range(9)]
    optimizer = optim.SOAP(0.02, precondition_frequency=3, **arguments)
    call, traces = compiled(optimizer, [variable])
    for gradient in gradients:
        call(BACKEND.to_device([gradient]))
    given = {k: v for k, v in arguments.items() if k != "max_precond_dim"}
    given["weight_decay"] = given.get("weight_decay", 0.01) or 0.0
    longest = arguments.get("max_precond_dim", 100)
    expected = reference(start, gradients, 0.02, sides, 3, longest, **given)
    result = tools.to_numpy(variable)
    if dtype == "bfloat16":
        result = result + tools.to_numpy(optimizer.slots_of(variable)["residual"])
    assert tools.relative_to_movement(result, expected, start) < 1e-3
    assert len(traces) == 1


def test_the_first_update_makes_the_bases_and_moves_no_matrix(tools, rng):
    start = rng.standard_normal((4, 6)).astype("float32")
    matrix, bias = keras.Variable(start, name="kernel"), keras.Variable(np.ones(6), name="bias")
    optimizer = optim.SOAP(0.1)
    gradient = rng.standard_normal((4, 6)).astype("float32")
    tools.run(optimizer, [matrix, bias], [[gradient, gradient[0]]])
    np.testing.assert_array_equal(tools.to_numpy(matrix), start)
    assert np.all(tools.to_numpy(bias) != 1.0)
    slots = optimizer.slots_of(matrix)
    left = host(slots["left_basis"])
    np.testing.assert_allclose(left.T @ left, np.eye(4), atol=1e-5)
    turned = left.T @ host(slots["left"]) @ left
    np.testing.assert_allclose(turned, np.diag(np.diag(turned)), atol=1e-5)
    assert np.all(np.diff(np.diag(turned)) < 0), "largest first"
    assert not host(slots["momentum"]).any()


def test_bases_stay_orthonormal(tools, rng):
    variable = keras.Variable(np.zeros((4, 6), "float32"), name="kernel")
    optimizer = optim.SOAP(0.1, precondition_frequency=2)
    gradients = [[rng.standard_normal((4, 6)).astype("float32")] for _ in range(8)]
    tools.run(optimizer, [variable], gradients)
    for name, length in (("left_basis", 4), ("right_basis", 6)):
        basis = host(optimizer.slots_of(variable)[name])
        np.testing.assert_allclose(basis.T @ basis, np.eye(length), atol=1e-5)


def counting(function, calls):
    """A function that counts its executions; those of JAX happen in compiled code."""

    def counted(matrix, current):
        if keras.backend.backend() == "jax":
            import jax

            jax.debug.callback(lambda: calls.append(function.__name__), ordered=True)
        else:
            calls.append(function.__name__)
        return function(matrix, current)

    return counted


def test_decomposes_only_when_it_is_due(rng, monkeypatch):
    calls = []
    for function in (soap.eigenvectors, soap.turned_towards):
        monkeypatch.setattr(soap, function.__name__, counting(function, calls))
    variable = keras.Variable(np.ones((3, 3), "float32"), name="kernel")
    optimizer = optim.SOAP(0.1, precondition_frequency=3, max_precond_dim=3)
    seen = []
    for _ in range(8):
        optimizer.apply([ops.convert_to_tensor(rng.standard_normal((3, 3)), "float32")], [variable])
        host(variable)
        seen.append(list(calls))
        calls.clear()
    first, power = ["eigenvectors"] * 2, ["turned_towards"] * 2
    assert seen == [first, [], [], power, [], [], power, []]


def test_who_gets_what():
    shapes = {"kernel": (3, 4), "column": (5, 1), "vector": (4,), "scalar": (), "bias": (2, 3)}
    variables = {name: keras.Variable(np.ones(s, "float32"), name=name) for name, s in
                 shapes.items()}  # fmt: skip
    optimizer = optim.SOAP(max_precond_dim=3)
    optimizer.build(list(variables.values()))
    own = {name for name, v in variables.items() if optimizer.rule_of(v) is optimizer}
    assert own == {"kernel"}
    shapes = {n: tuple(s.shape) for n, s in optimizer.slots_of(variables["kernel"]).items()}
    assert shapes == {
        "momentum": (3, 4),
        "velocity": (3, 4),
        "left": (3, 3),
        "left_basis": (3, 3),
    }


def test_a_gradient_that_is_not_finite_ends_no_program(tools):
    variable = keras.Variable(np.ones((3, 3), "float32"), name="kernel")
    optimizer = optim.SOAP(0.1, precondition_frequency=1)
    bad = np.full((3, 3), np.nan, "float32")
    tools.run(optimizer, [variable], [[bad], [bad], [np.ones((3, 3), "float32")]])
    assert np.isnan(tools.to_numpy(variable)).all()


@pytest.mark.parametrize("betas", [0.9, (0.9,), (0.9, 0.99, 0.999), "ab", (0.9, 1.0)])
def test_wrong_betas(betas):
    with pytest.raises(ValueError, match="`betas`"):
        optim.SOAP(betas=betas)


@pytest.mark.parametrize("argument", ["precondition_frequency", "max_precond_dim"])
@pytest.mark.parametrize("value", [0, 1.5, "3", True])
def test_wrong_integers(argument, value):
    with pytest.raises(ValueError, match=f"`{argument}` must be an integer"):
        optim.SOAP(**{argument: value})


def test_wrong_shampoo_beta():
    with pytest.raises(ValueError, match="`shampoo_beta`"):
        optim.SOAP(shampoo_beta=1.0)


def test_rounding_has_no_say_where_a_gradient_has_not_full_rank(tools):
    """The last bits of a gradient of rank 1 choose no direction: its null space is left alone."""
    generator = np.random.default_rng(0)
    left, right = generator.normal(size=(5, 4)), generator.normal(size=3)
    exact = left[:, :, None] * right
    start = generator.normal(size=(4, 3)).astype("float32")
    results = []
    for noise in (0.0, 1e-7):
        gradients = exact * (1 + noise * generator.choice([-1.0, 1.0], exact.shape))
        variable = keras.Variable(start, name="kernel")
        optimizer = optim.SOAP(0.1, weight_decay=0.0)
        tools.run(optimizer, [variable], gradients.astype("float32")[:, None])
        results.append(tools.to_numpy(variable))
    np.testing.assert_allclose(results[0], results[1], atol=2e-5)
    # What has moved lies along the gradient's one direction on the right.
    moved = results[0] - start
    along = np.outer(moved @ right, right) / (right @ right)
    np.testing.assert_allclose(moved, along, atol=2e-5)
    assert np.abs(moved).max() > 0.1
