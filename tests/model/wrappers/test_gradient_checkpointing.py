"""gradient_checkpointing: the same numbers, random ones included, from layers run twice."""

import keras
import numpy as np
import pytest
from helpers import arguments, make_data, train_logs, weights, with_weights
from keras import ops

from kbtrain import Trainer, backends
from kbtrain.errors import ConfigurationError
from kbtrain.model.wrappers.gradient_checkpointing import recomputed


class Block(keras.layers.Layer):
    """Layers inside a layer: random, with moving statistics, with a loss of its own."""

    def __init__(self, seed):
        super().__init__()
        self.wide = keras.layers.Dense(8, activation="tanh")
        self.dropout = keras.layers.Dropout(0.4, seed=seed)
        self.norm = keras.layers.BatchNormalization(momentum=0.7)
        self.narrow = keras.layers.Dense(3)
        self.calls = 0

    def build(self, shape):
        self.wide.build(shape)
        self.norm.build((None, 8))
        self.narrow.build((None, 8))

    def call(self, x):
        self.calls += 1
        inner = self.dropout(self.norm(self.wide(x)))
        self.add_loss(0.1 * ops.mean(ops.square(inner)))
        return ops.add(x, self.narrow(inner))


def model(nested=True):
    blocks = [Block(seed) for seed in (1, 2)]
    inside = keras.Sequential([keras.Input((3,)), *blocks]) if nested else None
    layers = [keras.Input((3,)), inside, keras.layers.Dropout(0.2, seed=3), keras.layers.Dense(1)]
    return with_weights(keras.Sequential([layer for layer in layers if layer is not None]))


def fitted(path, wanted, **changes):
    keras.utils.set_random_seed(0)
    args = arguments(path, max_steps=3, per_device_train_batch_size=4,
                     gradient_checkpointing=wanted, **changes)  # fmt: skip
    trainer = Trainer(model(), args, train_dataset=make_data(24), loss="mse")
    trainer.fit()
    return trainer


@pytest.mark.parametrize(
    "changes", [{}, {"gradient_accumulation_steps": 2}, {"bf16": True}], ids=str
)
def test_weights_statistics_and_random_states_are_the_same(tmp_path, changes):
    with_it, without = (fitted(tmp_path, wanted, **changes) for wanted in (True, False))
    tolerance = 2e-2 if "bf16" in changes else 1e-5
    np.testing.assert_allclose(train_logs(with_it), train_logs(without), rtol=tolerance)
    pairs = zip(
        with_it.model.variables, weights(with_it.model), weights(without.model), strict=True
    )
    for variable, a, b in pairs:
        if a.dtype.kind == "f":
            np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, err_msg=variable.path)
        else:
            np.testing.assert_array_equal(a, b, err_msg=variable.path)
    for layer in with_it.model._flatten_layers():
        assert "call" not in vars(layer)


def test_what_a_user_chooses(tmp_path):
    the_model = model()
    first, second = the_model.layers[0].layers
    dropout, last = the_model.layers[1:]
    for options, expected in [
        ({}, {first, second, dropout, last}),
        ({"every_n_layers": 2}, {first, dropout}),
        ({"layer_names": [second.name, last.name]}, {second, last}),
    ]:
        with recomputed(the_model, backends.load(), True, options):
            assert {x for x in the_model._flatten_layers() if "call" in vars(x)} == expected
        assert not any("call" in vars(x) for x in the_model._flatten_layers())
    for options, message in [
        ({"use_reentrant": False}, "no option 'use_reentrant'"),
        ({"layer_names": ["nowhere"]}, "no layer 'nowhere'. Its layers: block"),
        ({"every_n_layers": 0}, "at least 1. Received: 0"),
    ]:
        with pytest.raises(ConfigurationError, match=message):
            fitted(tmp_path, True, gradient_checkpointing_kwargs=options)


@pytest.mark.parametrize("jit_compile", ["auto", False])
def test_dropout_without_a_seed_draws_the_same_twice(tmp_path, jit_compile):
    model = keras.Sequential(
        [keras.Input((1,)), keras.layers.Dense(1, use_bias=False), keras.layers.Dropout(0.5)]
    )
    model.layers[0].kernel.assign([[1.5]])
    x = np.abs(make_data(64, features=1)[0]) + 0.1
    args = arguments(tmp_path, max_steps=1, per_device_train_batch_size=64,
                     gradient_checkpointing=True, jit_compile=jit_compile)  # fmt: skip
    trainer = Trainer(model, args, train_dataset=(x, x),
                      compute_loss_func=lambda outputs, labels: ops.mean(outputs))  # fmt: skip
    trainer.fit()
    # The loss is linear in the one weight, so it is weight times gradient, if the masks are one.
    entry = trainer.state.log_history[0]
    assert entry["loss"] == pytest.approx(1.5 * entry["grad_norm"], rel=1e-5)
    assert entry["loss"] != pytest.approx(1.5 * float(np.mean(x)), rel=1e-3)
