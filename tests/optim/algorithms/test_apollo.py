"""APOLLO against NumPy float64: the rule, its random numbers, who gets it, and what is kept."""

import zlib

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
from optim.algorithms.apollo import random_normal


def hashed(x):
    x = np.asarray(x, "uint32")
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def normal(shape, seed, key, number):
    base = hashed([seed])
    for integer in (key, number):
        base = hashed(base + np.uint32(integer))
    position = 2 * np.arange(np.prod(shape), dtype="uint32").reshape(shape)
    first, second = (
        ((hashed(hashed(position + np.uint32(i)) ^ base) >> np.uint32(9)) + 0.5) / 2**23
        for i in (0, 1)
    )
    return np.sqrt(-2 * np.log(first)) * np.cos(2 * np.pi * second)


def reference(start, gradients, rate, sides, rank, gap, path, scale=1.0, scale_type="channel",
              norm_growth_limit=1.01, seed=0, beta_1=0.9, beta_2=0.999, epsilon=1e-8,
              weight_decay=0.01):  # fmt: skip
    p = np.asarray(start, "float64")
    wide = sides[0] < sides[1]
    m = v = last = 0.0
    for t, gradient in enumerate(gradients, start=1):
        g = np.asarray(gradient, "float64").reshape(sides)
        g = g if wide else g.T
        key = zlib.crc32(path.encode()) // 2
        projection = normal((min(sides), rank), seed, key, (t - 1) // gap) / np.sqrt(rank)
        r = projection.T @ g
        m = beta_1 * m + (1 - beta_1) * r
        v = beta_2 * v + (1 - beta_2) * r**2
        n = m / (np.sqrt(v) + epsilon * np.sqrt(1 - beta_2**t))
        axis = 0 if scale_type == "channel" else None
        u = g * np.linalg.norm(n, axis=axis) / (np.linalg.norm(r, axis=axis) + 1e-8)
        norm = np.linalg.norm(u)
        if norm_growth_limit and last:
            limiter = max(norm / (last + 1e-8), norm_growth_limit) / norm_growth_limit
            u, norm = u / limiter, norm / limiter
        last = norm
        u = (u if wide else u.T).reshape(p.shape)
        size = np.sqrt(scale) * np.sqrt(1 - beta_2**t) / (1 - beta_1**t)
        p = p - rate * weight_decay * p - rate * size * u
    return p


CASES = {
    "wide": ((4, 7), (4, 7), {"rank": 2}),
    "tall": ((7, 4), (7, 4), {"rank": 3, "weight_decay": 0.3, "scale": 9.0, "seed": 2**31 - 1}),
    "square": ((5, 5), (5, 5), {"rank": 2, "beta_1": 0.5, "beta_2": 0.9, "epsilon": 1e-3}),
    "mini": ((4, 7), (4, 7), {"rank": 1, "scale": 128.0, "scale_type": "tensor"}),
    "mini tall": ((7, 4), (7, 4), {"rank": 1, "scale_type": "tensor", "seed": 3}),
    "convolution": ((2, 2, 3, 8), (12, 8), {"rank": 2, "norm_growth_limit": None}),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_follows_float64(tools, rng, name, dtype):
    shape, sides, arguments = CASES[name]
    variable = keras.Variable(
        rng.standard_normal(shape).astype("float32"), dtype=dtype, name="kernel"
    )
    start = tools.to_numpy(variable)
    gradients = [rng.standard_normal(shape).astype("float32") for _ in range(8)]
    optimizer = optim.APOLLOAdamW(0.02, update_proj_gap=3, **arguments)
    call, _ = compiled(optimizer, [variable])
    for gradient in gradients:
        call(BACKEND.to_device([gradient]))
    expected = reference(start, gradients, 0.02, sides, gap=3, path=variable.path, **arguments)
    result = tools.to_numpy(variable)
    if dtype == "bfloat16":
        result = result + tools.to_numpy(optimizer.slots_of(variable)["residual"])
    assert tools.relative_to_movement(result, expected, start) < 2e-4


def test_follows_float64_through_xla(tools, rng):
    """Where the backend has it; PyTorch records the update."""
    variable = keras.Variable(np.ones((4, 6), "float32"), name="kernel")
    optimizer = optim.APOLLOAdamW(0.02, rank=2, update_proj_gap=2)
    optimizer.build([variable])

    def step(gradient):
        optimizer.apply([gradient], [variable])
        return optimizer.iterations + 0

    jit_compile = "auto" if keras.backend.backend() == "torch" else True
    call = BACKEND.compile_step(step, [variable, *optimizer.variables], jit_compile)
    gradients = [rng.standard_normal((4, 6)).astype("float32") for _ in range(5)]
    for gradient in gradients:
        call(BACKEND.to_device(gradient))
    expected = reference(np.ones((4, 6)), gradients, 0.02, (4, 6), 2, 2, variable.path)
    assert tools.relative_to_movement(tools.to_numpy(variable), expected, np.ones((4, 6))) < 2e-4


def test_random_numbers(tools):
    def drawn(shape, seed, key, number):
        scalars = [ops.convert_to_tensor(i, "int32") for i in (key, number)]
        return tools.to_numpy(random_normal(shape, seed, *scalars))

    first = drawn((50, 400), 1, 2, 3)
    np.testing.assert_allclose(first, normal((50, 400), 1, 2, 3), atol=1e-4)
    for other in ((2, 2, 3), (1, 3, 3), (1, 2, 4), (2**31 - 1, 2**31 - 1, 2**24)):
        found = drawn((50, 400), *other)
        np.testing.assert_allclose(found, normal((50, 400), *other), atol=1e-4)
        assert abs(np.mean(found)) < 4 / np.sqrt(found.size)
        assert abs(np.mean(found**2) - 1) < 4 * np.sqrt(2 / found.size)
        assert abs(np.mean(found**4) - 3) < 4 * np.sqrt(96 / found.size)
        assert abs(np.mean(found * first)) < 4 / np.sqrt(found.size)
    for lag in (1, 2, 400):
        flat = first.ravel()
        assert abs(np.mean(flat[lag:] * flat[:-lag])) < 4 / np.sqrt(flat.size)


def test_state_is_small_and_named():
    variables = [keras.Variable(np.ones(s, "float32"), name=f"w{s[0]}") for s in ((9, 20), (20, 9))]
    optimizer = optim.APOLLOAdamW(rank=3)
    optimizer.build(variables)
    wide, tall = (optimizer.slots_of(v) for v in variables)
    shapes = {name: tuple(slot.shape) for name, slot in wide.items()}
    assert shapes == {"momentum": (3, 20), "velocity": (3, 20), "norm": (), "key": ()}
    assert tuple(tall["momentum"].shape) == tuple(tall["velocity"].shape) == (20, 3)
    assert int(ops.convert_to_numpy(wide["key"])) != int(ops.convert_to_numpy(tall["key"]))


def test_the_first_gradient_may_be_zero(tools, rng):
    """As below an output layer of zeros. What follows is not held back by a norm of nothing."""
    variable = keras.Variable(np.ones((4, 6), "float32"), name="kernel")
    gradients = [np.zeros((4, 6)), *rng.standard_normal((2, 4, 6))]
    gradients = [g.astype("float32") for g in gradients]
    optimizer = optim.APOLLOAdamW(0.1, rank=2, weight_decay=0.0)
    tools.run(optimizer, [variable], [[g] for g in gradients[:1]])
    np.testing.assert_array_equal(tools.to_numpy(variable), 1.0)
    tools.run(optimizer, [variable], [[g] for g in gradients[1:]])
    expected = reference(
        np.ones((4, 6)), gradients, 0.1, (4, 6), 2, 200, variable.path, weight_decay=0.0
    )
    assert tools.relative_to_movement(tools.to_numpy(variable), expected, np.ones((4, 6))) < 2e-4
    assert np.abs(tools.to_numpy(variable) - 1).max() > 0.01


def test_nothing_masks_a_nan(tools):
    variable = keras.Variable(np.ones((3, 4), "float32"), name="kernel")
    tools.run(optim.APOLLOAdamW(rank=2), [variable], [[np.full((3, 4), np.nan, "float32")]])
    assert np.isnan(tools.to_numpy(variable)).all()


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
        optimizer = optim.APOLLOAdamW(0.1, rank=2, beta_2=0.9, weight_decay=0.3, **arguments)
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
        ({"scale_type": "row"}, "scale_type"),
        ({"norm_growth_limit": 0.99}, "norm_growth_limit"),
        ({"seed": 2**31}, "seed"),
        ({"seed": 0.5}, "seed"),
    ],
)
def test_hyperparameters_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        optim.APOLLOAdamW(**arguments)


def test_keras_file_keeps_the_arguments(tmp_path):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(6, name="hidden")])
    optimizer = optim.APOLLOAdamW(0.1, 2, 7, 0.5, ["hidden"], "tensor", None, 5, epsilon=1e-6)
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
            optimizers=(optim.APOLLOAdamW(0.01, 2, 3, 1.0), None),
        )
        with caplog.at_level("INFO", "kbtrain"):
            trainer.fit()
        if jit_compile == "auto":
            assert "eagerly" not in caplog.text
        results.append([host(v) for v in model.trainable_variables])
    for fast, plain in zip(*results, strict=True):
        np.testing.assert_allclose(fast, plain, rtol=1e-4, atol=1e-6)


def test_resume_is_exact(tmp_path, rng):
    """In the middle between two refreshes: the projection is drawn as before."""
    gradients = [[rng.standard_normal((6, 8)).astype("float32")] for _ in range(7)]

    def start():
        variable = keras.Variable(np.ones((6, 8), "float32"), name="kernel")
        optimizer = optim.APOLLOAdamW(0.1, rank=2, update_proj_gap=3, name="mine")
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
