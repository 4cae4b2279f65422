"""Large tables: what the backends do for them gives the numbers of the plain step."""

import keras
import numpy as np
import pytest
from helpers import arguments, fit, same, weights, with_weights
from keras import layers

ROWS, WIDTH = 40_000, 8  # 1.28 MB: above the sizes from which the backends treat state as large


def model():
    """A table of which each sample reads four rows, in two places."""
    pair = keras.Input((2,), dtype="int32")
    table = layers.Embedding(ROWS, WIDTH)
    h = layers.Add()([table(pair), keras.ops.tanh(table(pair + 1))])
    return with_weights(keras.Model(pair, layers.Dense(1)(layers.Flatten()(h))), scale=0.3)


def data(samples=24, bad=None):
    """Indices that repeat within a batch; labels, one of them perhaps not finite."""
    generator = np.random.default_rng(3)
    x = generator.integers(0, ROWS - 1, (samples, 2)).astype("int32")
    x[::2] = x[0]
    y = generator.normal(size=(samples, 1)).astype("float32")
    if bad is not None:
        y[bad] = np.nan
    return x, y


def train(folder, samples=24, bad=None, drop=None, optimizer=None, **changes):
    settings = {
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "learning_rate": 0.05,
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
        "lr_scheduler_type": "constant",
    }
    x, y = data(samples, bad)
    if drop is not None:
        x, y = np.delete(x, drop, 0), np.delete(y, drop, 0)
    return fit(
        model(), arguments(folder, **(settings | changes)), (x, y), optimizers=(optimizer, None)
    )


def state(trainer):
    slots = trainer.optimizer.variables
    return [*weights(trainer.model), *(keras.ops.convert_to_numpy(v) for v in slots)]


OPTIMIZERS = {
    "optim": lambda: None,
    "keras": lambda: keras.optimizers.AdamW(0.05, weight_decay=0.1),
    # Norms: not a rule of elements alone
    "keras, norms": lambda: keras.optimizers.SGD(0.05, momentum=0.9, clipnorm=0.1),
}


@pytest.mark.parametrize(
    ("accumulation", "optimizer"),
    [(1, "optim"), (2, "optim"), (1, "keras"), (1, "keras, norms")],
)
def test_equal_to_the_plain_step(tmp_path, accumulation, optimizer):
    settings = {"gradient_accumulation_steps": accumulation, "num_train_epochs": 1}
    make, samples = OPTIMIZERS[optimizer], 22 if optimizer == "optim" else 24
    # With 22 samples the last batch has another shape.
    fast = train(tmp_path, samples, optimizer=make(), **settings)
    plain = train(tmp_path, samples, optimizer=make(), jit_compile=False, **settings)
    for a, b in zip(state(fast), state(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert not same(weights(fast.model), weights(model()))


def test_a_skipped_update_leaves_no_trace(tmp_path):
    skipped = train(tmp_path, bad=9, num_train_epochs=1, on_nonfinite="skip")
    other = train(tmp_path, drop=slice(8, 12), num_train_epochs=1)
    assert skipped.state.global_step == other.state.global_step + 1
    assert same(state(skipped), state(other))


def test_blocks_do_not_matter(tmp_path):
    one = train(tmp_path, steps_per_execution=1)
    three = train(tmp_path, steps_per_execution=3, logging_steps=5)
    assert same(state(one), state(three))
