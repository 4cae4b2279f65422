"""GaLore against NumPy float64: the rule, when it decomposes, who gets it, and what is kept."""

import keras
import numpy as np
import pytest
from helpers_contract import BACKEND, compiled, host, snapshot
from keras import ops

import optim
from kbtrain import Trainer, TrainingArguments
from kbtrain.checkpoint import (
    capture,
    name_optimizer_variables,
    read_arrays,
    restore,
    write_arrays,
)
from optim.algorithms import galore
from optim.kernels import backend as kernels


def principal(matrix, rank, old):
    u, _, vh = np.linalg.svd(matrix, full_matrices=False)
    vectors = (u if matrix.shape[0] < matrix.shape[1] else vh.T)[:, :rank]
    return vectors if old is None else vectors * np.where(np.sum(vectors * old, 0) < 0, -1, 1)


def reference(start, gradients, rate, sides, rank, gap, scale=0.25, beta_1=0.9, beta_2=0.999,
              epsilon=1e-8, weight_decay=0.01):  # fmt: skip
    p = np.asarray(start, "float64")
    wide = sides[0] < sides[1]
    m = v = 0.0
    projection = None
    for t, gradient in enumerate(gradients, start=1):
        g = np.asarray(gradient, "float64").reshape(sides)
        if (t - 1) % gap == 0:
            projection = principal(g, rank, projection)
        r = projection.T @ g if wide else g @ projection
        m = beta_1 * m + (1 - beta_1) * r
        v = beta_2 * v + (1 - beta_2) * r**2
        n = m / (1 - beta_1**t) / (np.sqrt(v / (1 - beta_2**t)) + epsilon)
        lifted = projection @ n if wide else n @ projection.T
        p = p - rate * weight_decay * p - rate * scale * lifted.reshape(p.shape)
    return p


CASES = {
    "wide": ((4, 7), (4, 7), {"rank": 2}),
    "tall": ((7, 4), (7, 4), {"rank": 3, "weight_decay": 0.3, "scale": 1.0}),
    "square": ((5, 5), (5, 5), {"rank": 1, "beta_1": 0.5, "beta_2": 0.9, "epsilon": 1e-3}),
    "convolution": ((2, 2, 3, 8), (12, 8), {"rank": 2, "weight_decay": 0.1}),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("dtype", "size"), [("float32", 1.0), ("float32", 1e-6), ("bfloat16", 1)])
def test_follows_float64(tools, rng, name, dtype, size):
    shape, sides, arguments = CASES[name]
    if size < 1 and "epsilon" in arguments:
        arguments = {**arguments, "epsilon": 1e-8}
    variable = keras.Variable(rng.standard_normal(shape).astype("float32"), dtype=dtype)
    start = tools.to_numpy(variable)
    gradients = [(size * rng.standard_normal(shape)).astype("float32") for _ in range(8)]
    optimizer = optim.GaLoreAdamW(0.02, update_proj_gap=3, **arguments)
    call, _ = compiled(optimizer, [variable])
    for gradient in gradients:
        call(BACKEND.to_device([gradient]))
    expected = reference(start, gradients, 0.02, sides, gap=3, **arguments)
    result = tools.to_numpy(variable)
    if dtype == "bfloat16":
        result = result + tools.to_numpy(optimizer.slots_of(variable)["residual"])
    assert tools.relative_to_movement(result, expected, start) < 1e-4


def test_follows_float64_through_xla(tools, rng):
    """Where the backend has it; PyTorch records the update."""
    variable = keras.Variable(np.ones((4, 6), "float32"), name="kernel")
    optimizer = optim.GaLoreAdamW(0.02, rank=2, update_proj_gap=2)
    optimizer.build([variable])

    def step(gradient):
        optimizer.apply([gradient], [variable])
        return optimizer.iterations + 0

    jit_compile = "auto" if keras.backend.backend() == "torch" else True
    call = BACKEND.compile_step(step, [variable, *optimizer.variables], jit_compile)
    gradients = [rng.standard_normal((4, 6)).astype("float32") for _ in range(5)]
    for gradient in gradients:
        call(BACKEND.to_device(gradient))
    expected = reference(np.ones((4, 6)), gradients, 0.02, (4, 6), 2, 2)
    assert tools.relative_to_movement(tools.to_numpy(variable), expected, np.ones((4, 6))) < 1e-4


def test_state_is_small_and_named():
    variables = [keras.Variable(np.ones(s, "float32"), name="w") for s in ((9, 20), (20, 9))]
    optimizer = optim.GaLoreAdamW(rank=3)
    optimizer.build(variables)
    wide, tall = ({n: tuple(s.shape) for n, s in optimizer.slots_of(v).items()} for v in variables)
    assert wide == {"projection": (9, 3), "momentum": (3, 20), "velocity": (3, 20)}
    assert tall == {"projection": (9, 3), "momentum": (20, 3), "velocity": (20, 3)}


def counting(calls):
    """`galore.principal` that counts its executions; those of JAX happen in compiled code."""
    real = galore.principal

    def counted(matrix, current):
        if keras.backend.backend() == "jax":
            import jax

            jax.debug.callback(lambda: calls.append(1), ordered=True)
        else:
            calls.append(1)
        return real(matrix, current)

    return counted


def test_decomposes_only_when_a_refresh_is_due(tools, rng, monkeypatch):
    calls = []
    monkeypatch.setattr(galore, "principal", counting(calls))
    variable = keras.Variable(np.ones((3, 4), "float32"), name="kernel")
    optimizer = optim.GaLoreAdamW(0.1, rank=1, update_proj_gap=3)
    counts, projections = [], []
    for _ in range(7):
        tools.run(optimizer, [variable], [[rng.standard_normal((3, 4)).astype("float32")]])
        projections.append(tools.to_numpy(optimizer.slots_of(variable)["projection"]))
        counts.append(len(calls))
    assert counts == [1, 1, 1, 2, 2, 2, 3]
    changed = [bool(np.any(a != b)) for a, b in zip(projections, projections[1:], strict=False)]
    assert changed == [False, False, True, False, False, True]


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4)])
@pytest.mark.parametrize("size", [1.0, 1e-25, 1e25])
def test_singular_vectors(tools, rng, shape, size):
    matrix = rng.standard_normal(shape)
    given = ops.convert_to_tensor((matrix * size).astype("float32"))
    old = rng.standard_normal((min(shape), 2)).astype("float32")
    found = tools.to_numpy(galore.principal(given, ops.convert_to_tensor(old)))
    np.testing.assert_allclose(found, principal(matrix, 2, old), atol=1e-4)


def test_gradients_of_nothing_and_of_nan(tools):
    variable = keras.Variable(np.ones((3, 4), "float32"), name="kernel")
    optimizer = optim.GaLoreAdamW(0.1, rank=2, weight_decay=0.0)
    tools.run(optimizer, [variable], [[np.zeros((3, 4), "float32")]] * 2)
    np.testing.assert_array_equal(tools.to_numpy(variable), 1.0)
    for bad in (np.nan, np.inf):
        variable = keras.Variable(np.ones((3, 4), "float32"), name="kernel")
        optimizer = optim.GaLoreAdamW(0.1, rank=2)
        tools.run(optimizer, [variable], [[np.full((3, 4), bad, "float32")]])
        assert np.isnan(tools.to_numpy(variable)).any(), "nothing masks it"


def test_who_gets_which_rule(tools, rng):
    shapes = {
        "tokens/embeddings": (9, 8),
        "hidden/kernel": (6, 8),
        "head/kernel": (8, 5),
        "attention/bias": (4, 4),
        "narrow/kernel": (9, 2),
        "norm/gamma": (8,),
        "scalar": (),
        "empty": (0,),
    }
    variables = [
        keras.Variable(np.ones(s, "float32"), name=n.replace("/", "_")) for n, s in shapes.items()
    ]

    def projected(**arguments):
        optimizer = optim.GaLoreAdamW(0.1, rank=2, beta_2=0.9, weight_decay=0.3, **arguments)
        optimizer.build(variables)
        return optimizer, {v.path for v in variables if optimizer.rule_of(v) is optimizer}

    assert projected()[1] == {"hidden_kernel", "head_kernel"}
    assert projected(target_modules="embed")[1] == {"tokens_embeddings"}
    assert projected(target_modules=["^head", "hidden", "scalar"])[1] == {
        "hidden_kernel",
        "head_kernel",
    }
    optimizer, none = projected(target_modules=[])
    assert not none
    gradients = [
        [np.asarray(rng.standard_normal(s), "float32") for s in shapes.values()] for _ in range(3)
    ]
    tools.run(optimizer, variables, gradients)
    others = [keras.Variable(np.ones(s, "float32")) for s in shapes.values()]
    tools.run(optim.AdamW(0.1, beta_2=0.9, weight_decay=0.3), others, gradients)
    for ours, theirs in zip(variables, others, strict=True):
        np.testing.assert_array_equal(tools.to_numpy(ours), tools.to_numpy(theirs))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "rank"),
        ({"rank": 2.0}, "rank"),
        ({"update_proj_gap": True}, "update_proj_gap"),
        ({"scale": float("inf")}, "scale"),
        ({"target_modules": "("}, "target_modules.*regular expression"),
        ({"target_modules": [3]}, "target_modules.*regular expression"),
        ({"target_modules": 3}, "target_modules.*regular expression"),
        ({"beta_1": 1.0}, "beta_1"),
    ],
)
def test_hyperparameters_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        optim.GaLoreAdamW(**arguments)


def test_keras_file_keeps_the_arguments(tmp_path):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(6, name="hidden")])
    optimizer = optim.GaLoreAdamW(0.1, 2, 7, 0.5, ["hidden"], epsilon=1e-6)
    model.compile(optimizer, loss="mse")
    optimizer.build(model.trainable_variables)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras").optimizer
    assert loaded.get_config() == optimizer.get_config()
    assert loaded.get_config()["target_modules"] == ["hidden"]


def small_model():
    keras.utils.set_random_seed(3)
    layers = [keras.Input((6,)), keras.layers.Dense(5, name="a"), keras.layers.Dense(4, name="b")]
    return keras.Sequential(layers, name="small")


def test_trainer_captures_the_step(tmp_path, rng, caplog):
    data = rng.standard_normal((16, 6)).astype("float32"), np.ones((16, 4), "float32")
    results = []
    for jit_compile in ("auto", False):
        model = small_model()
        trainer = Trainer(
            model,
            TrainingArguments(
                output_dir=str(tmp_path / str(jit_compile)),
                save_strategy="no",
                disable_tqdm=True,
                use_cpu=True,
                per_device_train_batch_size=4,
                num_train_epochs=1,
                jit_compile=jit_compile,
            ),
            train_dataset=data,
            loss="mse",
            optimizers=(optim.GaLoreAdamW(0.01, 2, 3, 1.0), None),
        )
        with caplog.at_level("INFO", "kbtrain"):
            trainer.fit()
        if jit_compile == "auto":
            assert "eagerly" not in caplog.text
        results.append([host(v) for v in model.trainable_variables])
    for fast, plain in zip(*results, strict=True):
        np.testing.assert_allclose(fast, plain, rtol=1e-4, atol=1e-6)


def test_resume_is_exact(tmp_path, rng):
    """In the middle between two refreshes: the projection comes from the checkpoint."""
    gradients = [[rng.standard_normal((6, 8)).astype("float32")] for _ in range(7)]

    def start():
        variable = keras.Variable(np.ones((6, 8), "float32"), name="kernel")
        optimizer = optim.GaLoreAdamW(0.1, rank=2, update_proj_gap=3, name="mine")
        return variable, optimizer, compiled(optimizer, [variable])[0]

    variable, optimizer, call = start()
    for given in gradients[:5]:
        call(BACKEND.to_device(given))
    named = name_optimizer_variables(optimizer.variables, [variable])
    write_arrays(tmp_path / "optimizer.h5", capture(named))
    value = ops.convert_to_numpy(variable).copy()
    for given in gradients[5:]:
        call(BACKEND.to_device(given))

    again, fresh, call = start()
    again.assign(value)
    arrays = read_arrays(tmp_path / "optimizer.h5")
    restore(name_optimizer_variables(fresh.variables, [again]), arrays, what="optimizer")
    for given in gradients[5:]:
        call(BACKEND.to_device(given))
    np.testing.assert_array_equal(host(again), host(variable))
    assert snapshot(fresh.variables).keys() == snapshot(optimizer.variables).keys()
    for path, expected in snapshot(optimizer.variables).items():
        np.testing.assert_array_equal(snapshot(fresh.variables)[path], expected)


def test_refresh_chooses(tools):
    def twice(operand, current):
        return 2.0 * operand

    one, five = ops.ones((2,)), 5.0 * ops.ones((2,))
    for due, expected in ((True, 10.0), (False, 1.0)):
        found = kernels.refresh(ops.convert_to_tensor(due), twice, five, one)
        np.testing.assert_array_equal(tools.to_numpy(found), expected)
