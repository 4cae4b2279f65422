"""Floating-point operations of an update, against counts by hand, and the share of the peak."""

import importlib
import logging

import keras
import numpy as np
import pytest
from helpers import arguments, same, weights

from kbtrain import ConfigurationError, ThroughputCallback, Trainer, TrainerCallback
from kbtrain.backends.uncounted import warn_of_uncounted
from kbtrain.callbacks.library.device_peaks import peak_flops
from kbtrain.callbacks.library.throughput import count_flops
from kbtrain.utils import fallback
from kbtrain.utils.fallback import PrivateApi
from kbtrain.utils.packages import keras_private

layers = keras.layers


def trainer_of(tmp_path, model, x, y, loss="mse", callbacks=(), **changes):
    defaults = {"per_device_train_batch_size": 8, "max_steps": 1}
    args = arguments(tmp_path, **defaults | changes)
    return Trainer(model, args, train_dataset=(x, y), loss=loss, callbacks=list(callbacks))


def counted(trainer):
    """What is counted for a batch of all data, in a training that ends before its first update."""
    found = []

    class Count(TrainerCallback):
        def on_epoch_begin(self, args, state, control, **kwargs):
            found.append(count_flops(trainer, trainer.train_dataset))
            control.should_training_stop = True

    trainer.add_callback(Count())
    trainer.fit()
    return found[0]


def mlp(widths, **kwargs):
    hidden = [layers.Dense(width, activation="relu", **kwargs) for width in widths[1:]]
    return keras.Sequential([keras.Input((widths[0],)), *hidden])


def of_mlp(widths, rows):
    """Forward, and the gradients of weights and of inputs, which the first layer does not need."""
    products = [2 * rows * n * m for n, m in zip(widths[:-1], widths[1:], strict=True)]
    return 3 * sum(products) - products[0]


def data(rows, features, outputs):
    return np.ones((rows, features), np.float32), np.ones((rows, outputs), np.float32)


@pytest.mark.core
@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True}])
def test_a_multilayer_perceptron(tmp_path, changes):
    widths = (16, 32, 64, 8)
    trainer = trainer_of(tmp_path, mlp(widths), *data(8, 16, 8), **changes)
    assert counted(trainer) == of_mlp(widths, rows=8)


def test_without_private_parts_the_count_is_the_same(tmp_path, monkeypatch, caplog):
    def broken(*args):
        raise AttributeError("moved to another place")

    widths = (16, 32, 8)
    trainer = trainer_of(tmp_path, mlp(widths), *data(8, 16, 8))
    module = importlib.import_module(f"{trainer.backend.__name__}.flops")
    others = [id(part) for part in vars(keras_private).values()]  # which the module only uses
    for part in vars(module).values():
        if isinstance(part, PrivateApi) and id(part) not in others:
            monkeypatch.setattr(part, "_fast", broken)
            monkeypatch.setattr(part, "is_broken", False)
    monkeypatch.setattr(fallback, "_reported", set())
    assert counted(trainer) == of_mlp(widths, rows=8)
    assert caplog.text.count("moved to another place") == (trainer.backend.name == "torch")


class Block(layers.Layer):
    """Attention and a perceptron, as in a GPT."""

    def __init__(self, width, heads, **kwargs):
        super().__init__(**kwargs)
        self.attention = layers.MultiHeadAttention(heads, width // heads)
        self.norms = [layers.LayerNormalization(), layers.LayerNormalization()]
        self.up, self.down = layers.Dense(4 * width, activation="gelu"), layers.Dense(width)

    def build(self, shape):
        self.attention.build(shape, shape)
        for each in (*self.norms, self.up):
            each.build(shape)
        self.down.build((*shape[:-1], 4 * shape[-1]))

    def call(self, x):
        y = self.norms[0](x)
        x = x + self.attention(y, y, use_causal_mask=True)
        return x + self.down(self.up(self.norms[1](x)))


def test_a_small_gpt(tmp_path):
    vocabulary, width, heads, length, rows, depth = 61, 32, 4, 16, 4, 1
    inputs = keras.Input((length,), dtype="int32")
    x = layers.Embedding(vocabulary, width)(inputs)
    for _ in range(depth):
        x = Block(width, heads)(x)
    model = keras.Model(inputs, layers.Dense(vocabulary)(x))
    tokens = np.zeros((rows, length), np.int32)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    trainer = trainer_of(
        tmp_path,
        model,
        tokens,
        tokens,
        loss,
        per_device_train_batch_size=rows,
        gradient_checkpointing=True,
    )
    weights_of_products = depth * 12 * width**2 + width * vocabulary
    attention = depth * 2 * length * width  # scores, and the mean of the values
    by_hand = 6 * rows * length * (weights_of_products + attention)
    assert counted(trainer) == pytest.approx(by_hand, rel=0.03)


def test_a_convolution(tmp_path):
    model = keras.Sequential(
        [
            keras.Input((12, 10, 3)),
            layers.Conv2D(8, 3, strides=2, padding="same"),
            layers.Conv2D(16, 3),
            layers.Flatten(),
            layers.Dense(2),
        ]
    )
    x, y = np.ones((4, 12, 10, 3), np.float32), np.ones((4, 2), np.float32)
    trainer = trainer_of(tmp_path, model, x, y, per_device_train_batch_size=4)
    first, second = 2 * 4 * 6 * 5 * 8 * 3 * 9, 2 * 4 * 4 * 3 * 16 * 8 * 9
    dense = 2 * 4 * 4 * 3 * 16 * 2
    assert counted(trainer) == pytest.approx(2 * first + 3 * second + 3 * dense, rel=1e-6)


def test_a_recurrent_layer_counts_each_of_its_rounds(tmp_path):
    model = keras.Sequential([keras.Input((7, 5)), layers.SimpleRNN(6), layers.Dense(1)])
    x, y = np.ones((4, 7, 5), np.float32), np.ones((4, 1), np.float32)
    trainer = trainer_of(tmp_path, model, x, y, per_device_train_batch_size=4)
    of_inputs, of_state = 2 * 4 * 7 * 5 * 6, 2 * 4 * 7 * 6 * 6
    # No gradient of the inputs, and maybe none of the state before the first round.
    by_hand = 2 * of_inputs + 3 * of_state + 3 * 2 * 4 * 6
    assert counted(trainer) == pytest.approx(by_hand, rel=0.15)


def test_frozen_layers_cost_less(tmp_path):
    widths = (16, 32, 64, 8)
    model = mlp(widths)
    model.layers[0].trainable = model.layers[1].trainable = False
    trainer = trainer_of(tmp_path, model, *data(8, 16, 8))
    forward = sum(2 * 8 * n * m for n, m in zip(widths[:-1], widths[1:], strict=True))
    assert counted(trainer) == forward + 2 * 8 * 64 * 8


def test_it_logs_the_speed_and_changes_nothing(tmp_path, monkeypatch):
    widths, x_y = (16, 32, 8), data(64, 16, 8)

    def run(callbacks):
        keras.utils.set_random_seed(1)
        changes = {"max_steps": 40, "logging_steps": 10, "gradient_accumulation_steps": 2}
        trainer = trainer_of(tmp_path, mlp(widths), *x_y, callbacks=callbacks, **changes)
        monkeypatch.setattr(trainer.backend, "device_info", lambda device=None: "gpu:0 (NVIDIA T4)")
        trainer.fit()
        return trainer

    callback = ThroughputCallback()
    trainer = run([callback])
    plain = run([])
    assert same(weights(trainer.model), weights(plain.model))
    logs = [log for log in trainer.state.log_history if "flops_per_second" in log]
    assert len(logs) >= 3
    for log in logs:
        assert log["mfu"] == pytest.approx(log["flops_per_second"] / 8.1e12, rel=1e-4)
    # At most all updates in the time of the run, at least those after the first log.
    updates = callback._all_flops / (2 * of_mlp(widths, rows=8))
    assert 30 <= updates <= 40
    assert updates == int(updates)
    assert callback._all_seconds < trainer.state.log_history[-1]["train_runtime"]
    assert callback.mfu == pytest.approx(callback.flops_per_second / 8.1e12)


def test_no_mfu_where_there_is_no_peak(tmp_path):
    callback = ThroughputCallback(flops_per_sample=100)
    trainer = trainer_of(tmp_path, mlp((3, 2)), *data(32, 3, 2), max_steps=8, callbacks=[callback])
    trainer.fit()
    logs = [log for log in trainer.state.log_history if "flops_per_second" in log]
    assert logs
    assert not any("mfu" in log for log in logs)
    assert callback.mfu is None
    assert callback._all_flops % (8 * 100) == 0
    given = ThroughputCallback(peak_flops=1e9, flops_per_sample=100)
    trainer.add_callback(given)
    trainer.fit()
    assert given.mfu == pytest.approx(given.flops_per_second / 1e9)


def test_a_step_of_the_models_own_cannot_be_counted(tmp_path, caplog):
    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(2)

        def call(self, x):
            return self.dense(x)

        def train_step(self, *args):
            return super().train_step(*args)

    model = Own()
    model.compile("sgd", "mse")
    callback = ThroughputCallback()
    with caplog.at_level(logging.WARNING, "kbtrain"):
        args = arguments(tmp_path, max_steps=2, learning_rate=None)
        Trainer(model, args, train_dataset=data(16, 3, 2), callbacks=[callback]).fit()
    assert "flops_per_sample" in caplog.text
    assert callback.flops_per_second is None


@pytest.mark.neutral
def test_kernels_that_count_nothing_are_named(caplog):
    warn_of_uncounted([])
    assert caplog.text == ""
    warn_of_uncounted(["lstm", "lstm", *"abcde"])
    assert "operations of a, b, c, d, e and others are not known" in caplog.text
    assert "flops_per_sample" in caplog.text


@pytest.mark.parametrize(
    ("device", "dtype", "tf32", "peak"),
    [
        ("cuda:0 (NVIDIA H100 80GB HBM3)", "bfloat16", False, 989.4e12),
        ("cuda:0 (NVIDIA H100 PCIe)", "bfloat16", False, 756e12),
        ("gpu:0 (NVIDIA H200)", "float32", True, 494.7e12),
        ("gpu:0 (NVIDIA A100-SXM4-80GB)", "float32", False, 19.5e12),
        ("gpu:0 (Tesla T4)", "float32", True, 8.1e12),
        ("gpu:0 (Tesla V100-SXM2-16GB)", "float16", False, 125e12),
        ("tpu:0 (TPU v5 lite)", "float32", True, 197e12),
        ("tpu:0 (TPU v5p)", "bfloat16", True, 459e12),
        ("tpu:0 (TPU v4)", "bfloat16", True, 275e12),
        ("gpu:0 (NVIDIA B200)", "float64", True, None),
        ("cpu:0", "float32", True, None),
        ("gpu:0 (NVIDIA L40)", "float32", True, None),
    ],
)
def test_the_peak_of_a_device(device, dtype, tf32, peak):
    assert peak_flops(device, dtype, tf32) == peak


@pytest.mark.parametrize("value", [0, -1.0, "a", True])
def test_numbers_must_be_positive(value):
    with pytest.raises(ConfigurationError, match="peak_flops above 0"):
        ThroughputCallback(peak_flops=value)
