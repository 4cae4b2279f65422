"""Large tables: what the backends do for them gives the numbers of the plain step."""

import keras
import numpy as np
import pytest
from helpers import arguments, fit, same, weights, with_weights
from keras import layers

ROWS, WIDTH = 40_000, 8  # 1.28 MB: above the sizes from which the backends treat state as large


def model():
    """Two rows of a table, and another table that is read twice."""
    pair = keras.Input((2,), dtype="int32")
    h = layers.Flatten()(layers.Embedding(ROWS, WIDTH)(pair))
    shared = layers.Embedding(ROWS, WIDTH)
    h = layers.Add()([h, layers.Flatten()(shared(pair)), layers.Flatten()(shared(pair))])
    return with_weights(keras.Model(pair, layers.Dense(1)(h)), scale=0.3)


def data(samples=24, bad=None):
    """Indices that repeat within a batch; labels, one of them perhaps not finite."""
    generator = np.random.default_rng(3)
    x = generator.integers(0, ROWS, (samples, 2)).astype("int32")
    x[::2] = x[0]
    y = generator.normal(size=(samples, 1)).astype("float32")
    if bad is not None:
        y[bad] = np.nan
    return x, y


def train(folder, samples=24, bad=None, drop=None, **changes):
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
    return fit(model(), arguments(folder, **(settings | changes)), (x, y))


def state(trainer):
    slots = trainer.optimizer.variables
    return [*weights(trainer.model), *(keras.ops.convert_to_numpy(v) for v in slots)]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_equal_to_the_plain_step(tmp_path, accumulation):
    # 22 samples: the last batch has another shape
    fast = train(tmp_path, 22, gradient_accumulation_steps=accumulation)
    plain = train(tmp_path, 22, gradient_accumulation_steps=accumulation, jit_compile=False)
    for a, b in zip(state(fast), state(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert not same(weights(fast.model), weights(model()))


def test_a_skipped_update_leaves_no_trace(tmp_path):
    skipped = train(tmp_path, bad=9, num_train_epochs=1, on_nonfinite="skip")
    other = train(tmp_path, drop=slice(8, 12), num_train_epochs=1)
    assert skipped.state.global_step == other.state.global_step + 1
    assert same(state(skipped), state(other))
