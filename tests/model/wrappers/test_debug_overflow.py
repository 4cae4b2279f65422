"""debug="underflow_overflow": the layer, the loss or the gradient that was not finite first."""

import keras
import numpy as np
import pytest
from helpers import arguments, make_data, with_weights
from keras import ops

from kbtrain import Trainer
from kbtrain.errors import NonFiniteError


class Root(keras.layers.Layer):
    """Its outputs are finite everywhere, its gradient is not at 0."""

    def call(self, x):
        return ops.sqrt(ops.abs(x))


class Large(keras.layers.Layer):
    def call(self, x):
        return ops.exp(1e3 * ops.abs(x))


def message(path, middle, loss="mse", spoil=False, bias=0.1, **changes):
    layers = [keras.Input((3,)), keras.layers.Dense(4, name="first"), *middle,
              keras.layers.Dense(1, name="last")]  # fmt: skip
    model = with_weights(keras.Sequential(layers))
    first = model.get_layer("first")
    first.kernel.assign(first.kernel * (bias != 0))
    first.bias.assign(bias * np.ones(4))
    x, y = make_data(16)
    if spoil:
        x[9, 2] = np.nan
    args = arguments(path, per_device_train_batch_size=4, debug="underflow_overflow", **changes)
    trainer = Trainer(model, args, train_dataset=(x, y), loss=loss)
    with pytest.raises(NonFiniteError) as caught:
        trainer.fit()
    return str(caught.value)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_first_layer_is_named(tmp_path, accumulation):
    text = message(
        tmp_path,
        [Large(name="huge")],
        gradient_accumulation_steps=accumulation,
        gradient_checkpointing=accumulation == 2,
    )
    assert "Update 1 was not finite" in text
    assert "In micro-batch 0: the first output that is not finite is that of" in text
    assert "huge (Large)" in text
    assert "Largest outputs of the layers before it: " in text
    assert "first (Dense)" in text


def test_the_data_itself(tmp_path):
    text = message(tmp_path, [], spoil=True, gradient_accumulation_steps=2)
    assert "Update 2 was not finite" in text
    assert (
        "In micro-batch 0: the data itself is not finite (array 0, first at position (1, 2))"
        in text
    )


def test_a_loss(tmp_path):
    def endless(y, outputs):
        return outputs / ops.sum(0.0 * outputs)

    text = message(tmp_path, [], loss=endless)
    assert "all layers' outputs are finite but the loss is not" in text


def test_gradients(tmp_path):
    text = message(tmp_path, [Root(name="root")], bias=0.0)
    assert "outputs and loss are finite, but not the gradients of" in text
    assert "first/bias" in text
    assert "last/" not in text
