"""8-bit state: the code, the size, and rules that stay close to their full-precision selves."""

import keras
import numpy as np
import pytest
from keras import ops

import optim
from kbtrain.checkpoint import (
    capture,
    name_optimizer_variables,
    read_arrays,
    restore,
    write_arrays,
)
from optim.core.eight_bit import SMALLEST_QUANTIZED, quantized, restored
from optim.kernels import backend as kernels
from optim.kernels.eight_bit_codes import BLOCK, code_values, nearest, nearest_to_root, not_larger

CLASSES = {
    "adamw": (optim.AdamW8bit, optim.AdamW, {"learning_rate": 1e-2}),
    "lion": (optim.Lion8bit, optim.Lion, {"learning_rate": 1e-3}),
    "ademamix": (optim.AdEMAMix8bit, optim.AdEMAMix, {"learning_rate": 2e-3, "t_alpha": 20}),
    "rmsprop": (optim.RMSprop8bit, optim.RMSprop, {"learning_rate": 2e-3, "momentum": 0.5}),
}


@pytest.mark.parametrize("signed", [True, False])
def test_code(signed):
    values = code_values(signed)
    assert values.shape == (256,)
    assert np.all(np.diff(values) > 0)
    assert values[-1] == 1.0
    assert 0.0 in values
    assert (values.min() < 0) == signed
    # Fine near 1, and something left at a millionth.
    assert np.diff(values)[-10:].max() < 0.02
    assert np.min(np.abs(values[values != 0])) < 1e-6


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize(("size", "scale"), [(BLOCK, 1.0), (1000, 1e-12), (1280, 1e12)])
def test_nearest_code_of_each_block(tools, rng, signed, size, scale):
    x = rng.standard_normal(size) * 10.0 ** rng.uniform(-5, 0, size)
    x = (scale * (x if signed else np.abs(x))).astype("float32")
    x[3] = 0.0
    codes, scales = quantized(ops.convert_to_tensor(x), signed)
    assert tuple(codes.shape) == (-(-size // BLOCK), BLOCK)
    back = tools.to_numpy(restored(codes, scales, (size,), signed))
    assert back[3] == 0.0
    values = code_values(signed).astype("float64")
    for start in range(0, size, BLOCK):
        block = x[start : start + BLOCK].astype("float64")
        largest = np.abs(block).max()
        allowed = values if signed else values[1:]
        closest = np.abs(block[:, None] / largest - allowed).min(axis=1) * largest
        error = np.abs(back[start : start + BLOCK] - block)
        assert np.all(error <= closest * 1.0001 + 1e-6 * np.abs(block))
    if not signed:
        assert np.all(back[x > 0] > 0)


@pytest.mark.parametrize("signed", [True, False])
def test_codes_around_every_border(tools, signed):
    values = code_values(signed)
    borders = (values[:-1] + values[1:]) / 2
    if not signed:
        borders[0] = 0.0  # what is not 0 gets a code that is not 0
    near = [np.nextafter(borders, np.float32(side)) for side in (-2, 2)]
    x = np.concatenate([borders, values, *near])
    x = x[np.abs(x) >= np.finfo("float32").tiny]  # smaller ones may be 0 to a compiler
    x = x if signed else x[x > 0]
    blocks = -(-len(x) // (BLOCK - 1))
    padded = np.append(x, np.zeros(blocks * (BLOCK - 1) - len(x), "float32"))
    scaled = np.insert(padded.reshape(blocks, BLOCK - 1), 0, 1.0, axis=1)  # 1: the block's scale
    codes, _ = quantized(ops.convert_to_tensor(scaled), signed)
    expected = np.searchsorted(borders, scaled)
    np.testing.assert_array_equal(tools.to_numpy(codes), expected)


@pytest.mark.parametrize("kind", ["nearest", "above 0", "root", "not larger"])
def test_one_look_up_counts_the_borders(rng, kind):
    values = code_values(kind in ("nearest", "not larger"))
    borders, side = (values[:-1] + values[1:]) / 2, "left"
    finder = {"nearest": nearest(True), "above 0": nearest(False)}.get(kind)
    if kind in ("above 0", "root"):
        borders[0] = 0.0
    if kind == "root":
        borders, finder = (
            (borders.astype("float64") ** 2).astype("float32"),
            nearest_to_root(),
        )
    if kind == "not larger":
        borders, side, finder = values[1:-1], "right", not_larger(True)
    near = [np.nextafter(borders, np.float32(to)) for to in (-2, 2)]
    many = rng.choice([-1, 1], 100_000) * 10 ** rng.uniform(-40, 0, 100_000)
    odd = [0.0, -0.0, 1.0, -1.0, np.nan, -np.nan]
    x = np.concatenate([borders, *near, many, odd]).astype("float32")
    bits = x.view("int32")
    found = np.abs((finder[bits >> 16 & 0xFFFF] + bits) >> 16)
    np.testing.assert_array_equal(found, np.searchsorted(borders, x, side=side))


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, "float32") for name in CLASSES), ("adamw", "bfloat16")]
)
def test_tiles_of_a_large_tensor(tools, rng, monkeypatch, name, dtype):
    """What a kernel does in tiles is what the rule does, but for roundings at borders."""
    if hasattr(kernels, "run_eight_bit"):
        monkeypatch.setattr("optim.kernels.torch.eight_bit._TILE", 1024)
    cls, _, arguments = CLASSES[name]
    shapes = [(31, 257), (64, 64), (20,)]  # several tiles, the last block of one not full
    start = [rng.standard_normal(shape).astype("float32") for shape in shapes]
    gradients = [[rng.standard_normal(s).astype("float32") for s in shapes] for _ in range(2)]
    gradients[1][0][:3] = 0.0
    results = []
    for kernel in (None, "reference"):
        variables = [keras.Variable(v, dtype=dtype, name=f"v{i}") for i, v in enumerate(start)]
        optimizer = cls(**arguments, weight_decay=0.1, kernel=kernel)
        tools.run(optimizer, variables, gradients)
        slots = [optimizer.slots_of(v) for v in variables]
        results.append((variables, [{k: tools.to_numpy(x) for k, x in s.items()} for s in slots]))
    (fast, fast_slots), (slow, slow_slots) = results
    for a, b, ours, theirs, old in zip(fast, slow, fast_slots, slow_slots, start, strict=True):
        moved = np.abs(tools.to_numpy(b) - old)
        error = np.abs(tools.to_numpy(a) - tools.to_numpy(b))
        # A number next to a border may fall on its other side; a bfloat16, too.
        assert np.mean(error > 1e-3 * moved + 1e-6) < 0.01
        for key in (key.removesuffix("_codes") for key in ours if key.endswith("_codes")):
            values = code_values(key not in cls.squares)
            found, expected = (
                values[x[f"{key}_codes"].astype(int)] * x[f"{key}_scales"][:, None]
                for x in (ours, theirs)
            )
            different = np.abs(found - expected)
            assert np.all(different <= 0.035 * theirs[f"{key}_scales"][:, None])
            if name != "lion":  # its choice depends on the last bit
                assert np.mean(different > 1e-5 * np.abs(expected)) < 0.01


@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_the_number_of_threads_changes_no_code(tools, rng, monkeypatch, name):
    cls, _, arguments = CLASSES[name]
    start = rng.standard_normal((66, 65)).astype("float32")  # the last block is not full
    gradients = [[rng.standard_normal(start.shape).astype("float32")] for _ in range(2)]
    results = []
    for threads in (1, 2):
        if hasattr(kernels, "run_eight_bit"):  # it looks up in another way
            monkeypatch.setattr("torch.get_num_threads", lambda threads=threads: threads)
        variable = keras.Variable(start, name="v")
        optimizer = cls(**arguments)
        tools.run(optimizer, [variable], gradients)
        slots = optimizer.slots_of(variable)
        results.append([tools.to_numpy(x) for x in (variable, *slots.values())])
    for one, two in zip(*results, strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("kernel", [None, "reference"])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf])
def test_what_is_not_finite_is_seen(tools, name, kernel, value):
    """In its own block, and nothing breaks on the way."""
    cls, _, arguments = CLASSES[name]
    variable = keras.Variable(np.ones(SMALLEST_QUANTIZED, "float32"), name="v")
    gradient = np.ones(SMALLEST_QUANTIZED, "float32")
    gradient[5] = value
    tools.run(cls(**arguments, kernel=kernel), [variable], [[gradient]] * 3)
    finite = np.isfinite(tools.to_numpy(variable))
    assert not finite[5]
    assert finite[BLOCK:].all()


@pytest.mark.parametrize("scale", [1e-20, 1e-30, 0.0])
def test_gradients_whose_squares_vanish(tools, scale):
    variable = keras.Variable(np.ones(SMALLEST_QUANTIZED, "float32"), name="v")
    gradient = np.full(SMALLEST_QUANTIZED, scale, "float32")
    tools.run(optim.AdamW8bit(1e-2, weight_decay=0.0), [variable], [[gradient]] * 4)
    result = tools.to_numpy(variable)
    assert np.isfinite(result).all()
    assert np.abs(result - 1.0).max() < 0.05


def test_random_rounding_is_right_in_the_mean(tools, rng):
    x = rng.standard_normal(BLOCK).astype("float32")
    x[:4] = [0.0, -7.0, 1e-9, 7.0]
    steps = 64
    back = []
    for step in range(1, steps + 1):
        at = ops.convert_to_tensor(float(step), "float32")
        codes, scales = quantized(ops.convert_to_tensor(x), True, at)
        back.append(tools.to_numpy(restored(codes, scales, (BLOCK,), True)))
    back = np.array(back, "float64")
    again, _ = quantized(ops.convert_to_tensor(x), True, at)
    np.testing.assert_array_equal(tools.to_numpy(again), tools.to_numpy(codes))
    values = 7.0 * code_values(True).astype("float64")
    place = np.clip(np.searchsorted(values, x.astype("float64"), side="right"), 1, 255)
    below, above = values[place - 1], values[place]
    inside = np.clip(x, values[0], None)
    assert np.all((np.abs(back - below) < 1e-6) | (np.abs(back - above) < 1e-6))
    # Five standard deviations of a mean of numbers that are one or the other.
    assert np.all(np.abs(back.mean(0) - inside) <= 2.5 * (above - below) / steps**0.5 + 1e-6)
    assert np.all(back[:, 0] == 0.0)


def test_lion_follows_movements_below_the_gaps(tools):
    """One code in ten of its momentum moves per update, if it is rounded to the nearest."""
    gradients = np.linspace(0.15, 1.0, SMALLEST_QUANTIZED).astype("float32")
    variable = keras.Variable(np.zeros(SMALLEST_QUANTIZED, "float32"), name="v")
    optimizer = optim.Lion8bit(1e-3)
    tools.run(optimizer, [variable], [[gradients]] * 150)
    slots = optimizer.slots_of(variable)
    found = restored(slots["momentum_codes"], slots["momentum_scales"], (SMALLEST_QUANTIZED,), True)
    expected = gradients * (1 - 0.99**150)
    mean = (tools.to_numpy(found) / expected).reshape(-1, 256).mean(axis=1)
    np.testing.assert_allclose(mean, 1.0, atol=0.01)


def test_zeros_and_one_outlier(tools):
    zero = ops.zeros((2, BLOCK))
    codes, scales = quantized(zero, True)
    np.testing.assert_array_equal(tools.to_numpy(restored(codes, scales, (2, BLOCK), True)), 0.0)
    # An outlier costs its own block only.
    x = np.full(2 * BLOCK, 0.01, "float32")
    x[0] = 1e6
    codes, scales = quantized(ops.convert_to_tensor(x), True)
    back = tools.to_numpy(restored(codes, scales, x.shape, True))
    assert back[0] == 1e6
    np.testing.assert_allclose(back[BLOCK:], 0.01, rtol=1e-6)


def bytes_of_state(optimizer, variable):
    return sum(
        int(np.prod(slot.shape, dtype=int)) * (1 if slot.dtype == "uint8" else 4)
        for slot in optimizer.slots_of(variable).values()
    )


@pytest.mark.parametrize(
    ("name", "limit"), [("adamw", 2.2), ("lion", 1.1), ("ademamix", 3.2), ("rmsprop", 2.2)]
)
def test_bytes_of_state_per_parameter(name, limit):
    cls, _, arguments = CLASSES[name]
    variable = keras.Variable(np.zeros((100, 200), "float32"), name="kernel")
    optimizer = cls(**arguments)
    optimizer.build([variable])
    assert bytes_of_state(optimizer, variable) / 20000 <= limit
    dtypes = {slot.dtype for slot in optimizer.slots_of(variable).values()}
    assert dtypes == {"uint8", "float32"}
    # Nothing of the full-precision twin is among the variables.
    own = 2 + len(optimizer.slots_of(variable))
    assert len(optimizer.variables) == own


def test_who_keeps_float32():
    variables = [
        keras.Variable(np.zeros((64, 64), "float32"), name="kernel"),
        keras.Variable(np.zeros(SMALLEST_QUANTIZED - 1, "float32"), name="bias"),
        keras.Variable(np.zeros((100, 64), "float32"), name="embeddings"),
        keras.Variable(np.float32(0), name="scalar"),
    ]
    optimizer = optim.AdamW8bit()
    optimizer.build(variables)
    full = [type(optimizer.rule_of(v)) is optim.AdamW for v in variables]
    assert full == [False, True, True, True]
    other = optim.AdamW8bit(keep="kernel")
    other.build(variables)
    assert [type(other.rule_of(v)) is optim.AdamW for v in variables] == [True, True, False, True]
    with pytest.raises(ValueError, match=r"keep.*regular expression"):
        optim.Lion8bit(keep="(")


@pytest.mark.parametrize("name", CLASSES)
def test_small_tensors_are_updated_by_the_full_rule(tools, rng, name):
    cls, full, arguments = CLASSES[name]
    ours, theirs = (keras.Variable(np.ones(20, "float32"), name="v") for _ in range(2))
    gradients = [[rng.standard_normal(20).astype("float32")] for _ in range(3)]
    tools.run(cls(weight_decay=0.1, **arguments), [ours], gradients)
    tools.run(full(weight_decay=0.1, **arguments), [theirs], gradients)
    np.testing.assert_array_equal(tools.to_numpy(ours), tools.to_numpy(theirs))


@pytest.mark.parametrize(
    ("name", "scale", "dtype"),
    [*((name, 1.0, "float32") for name in CLASSES), ("adamw", 1e-6, "bfloat16")],
)
def test_stays_close_to_full_precision(tools, rng, name, scale, dtype):
    # Gradients of very different sizes in one block, with a trend and noise.
    cls, full, arguments = CLASSES[name]
    shape = (16, 300)
    trend = rng.standard_normal(shape) * 10.0 ** rng.uniform(-2, 0, shape)
    gradients = [
        [(scale * (trend + 0.3 * np.abs(trend) * rng.standard_normal(shape))).astype("float32")]
        for _ in range(8)
    ]
    ours, theirs = (keras.Variable(np.ones(shape, "float32"), dtype=d, name="v")
                    for d in (dtype, "float32"))  # fmt: skip
    optimizer = cls(**arguments)
    tools.run(optimizer, [ours], gradients)
    tools.run(full(**arguments), [theirs], gradients)
    result = tools.to_numpy(ours)
    if dtype == "bfloat16":
        result = result + tools.to_numpy(optimizer.slots_of(ours)["residual"])
    moved = tools.to_numpy(theirs) - 1.0
    error = np.abs(result - 1.0 - moved)
    assert np.mean(error) < 0.05 * np.mean(np.abs(moved))
    # No weight jumps.
    assert np.max(np.abs(result - 1.0)) < 1.2 * np.max(np.abs(moved))


@pytest.mark.parametrize("name", ["adamw", "rmsprop"])
def test_keras_file_continues_identically(tools, rng, tmp_path, name):
    cls, _, arguments = CLASSES[name]
    x, y = rng.standard_normal((8, 64)).astype("float32"), np.ones((8, 1), "float32")
    model = keras.Sequential(
        [keras.Input((64,)), keras.layers.Dense(64, name="large"), keras.layers.Dense(1)]
    )
    model.compile(cls(**arguments, keep="nothing"), loss="mse")
    model.fit(x, y, epochs=1, verbose=0, batch_size=4, shuffle=False)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert type(loaded.optimizer) is cls
    assert loaded.optimizer.get_config() == model.optimizer.get_config()
    assert any(v.dtype == "uint8" for v in loaded.optimizer.variables)
    for each in (model, loaded):
        each.fit(x, y, epochs=1, verbose=0, batch_size=4, shuffle=False)
    for ours, theirs in zip(loaded.variables, model.variables, strict=True):
        np.testing.assert_array_equal(tools.to_numpy(ours), tools.to_numpy(theirs))


def test_state_in_a_checkpoint(tools, rng, tmp_path):
    def trained(steps):
        model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(64, name="large")])
        model.set_weights([np.ones((64, 64), "float32"), np.zeros(64, "float32")])
        optimizer = optim.AdamW8bit(0.01, name="mine")
        optimizer.build(model.trainable_variables)
        tools.run(optimizer, model.trainable_variables, steps)
        return model, optimizer

    steps = [[rng.standard_normal(s).astype("float32") for s in ((64, 64), (64,))]] * 2
    model, optimizer = trained(steps)
    named = name_optimizer_variables(optimizer.variables, model.variables)
    write_arrays(tmp_path / "optimizer.h5", capture(named))
    saved = read_arrays(tmp_path / "optimizer.h5")
    codes = [name for name in saved if name.startswith("momentum_codes/")]
    assert len(codes) == 1
    assert saved[codes[0]].dtype == np.uint8

    other, fresh = trained(steps[:0])
    restore(name_optimizer_variables(fresh.variables, other.variables), saved, what="optimizer")
    for ours, theirs in zip(fresh.variables, optimizer.variables, strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(tools.to_numpy(ours), tools.to_numpy(theirs))
