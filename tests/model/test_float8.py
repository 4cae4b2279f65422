"""float8 layers: scales and largest values are replaced in an update, as in Keras' own training."""

import keras
import numpy as np
import pytest
from helpers import arguments, same
from keras import layers

import optim
from kbtrain import Trainer
from kbtrain.errors import NonFiniteError

OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(1e-3),
    "adamw of Keras": lambda: keras.optimizers.AdamW(1e-3, weight_decay=0.1),
    "clipped": lambda: keras.optimizers.SGD(1e-3, global_clipnorm=0.5),
    "adamw": lambda: optim.AdamW(1e-3, weight_decay=0.1),
    "average": lambda: optim.EMA(optim.Lion(1e-3)),
    "loss scale": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(1e-3)),
    "loss scale around optim": lambda: keras.optimizers.LossScaleOptimizer(optim.SGD(1e-3)),
}


def float8_model():
    keras.utils.set_random_seed(0)
    hidden = layers.Dense(8, activation="relu", name="hidden")
    model = keras.Sequential([keras.Input((8,)), hidden, layers.Dense(1, name="out")])
    for layer in model.layers:  # Keras warns of the input layer otherwise
        layer.quantize("float8")
    return model


def data():
    x = 3 * np.random.default_rng(0).normal(size=(32, 8)).astype("float32")
    return x, 3 * x[:, :1]


def by_name(model):
    """Values by the last two parts of the path: models have names of their own."""
    return {
        "/".join(v.path.split("/")[-2:]): keras.ops.convert_to_numpy(v) for v in model.variables
    }


def trained(folder, optimizer, given=None, **changes):
    settings = {"per_device_train_batch_size": 8, "num_train_epochs": 2, "max_grad_norm": 0}
    settings |= {"train_sampling_strategy": "sequential"}
    model = float8_model()
    trainer = Trainer(
        model,
        arguments(folder, **(settings | changes)),
        train_dataset=data() if given is None else given,
        loss="mse",
        optimizers=(optimizer, None),
    )
    trainer.fit()
    return trainer


def trained_by_keras(optimizer, batch_size=8):
    model = float8_model()
    model.compile(loss="mse", optimizer=optimizer)
    model.fit(*data(), batch_size=batch_size, epochs=2, shuffle=False, verbose=0)
    return model


def compare(model, expected, rtol=1e-6):
    left, right = by_name(model), by_name(expected)
    assert left.keys() == right.keys()
    for name, value in left.items():
        # Sums in another order may round, which a float8 number then shows.
        exact = name.startswith("hidden/inputs")
        np.testing.assert_allclose(value, right[name], rtol=0 if exact else rtol, err_msg=name)
        if "amax" in name or "scale" in name:
            assert np.abs(value).max() > 0


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_as_keras_fit(tmp_path, name):
    trainer = trained(tmp_path, OPTIMIZERS[name]())
    compare(trainer.model, trained_by_keras(OPTIMIZERS[name]()), rtol=2e-4)
    amax = by_name(trainer.model)["hidden/inputs_amax_history"]
    assert amax.max() == np.abs(data()[0]).max()


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_accumulation_keeps_the_largest_as_keras_does(tmp_path, name):
    trainer = trained(
        tmp_path,
        OPTIMIZERS[name](),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
    )
    optimizer = OPTIMIZERS[name]()
    accumulating = type(optimizer).from_config(
        optimizer.get_config() | {"gradient_accumulation_steps": 2}
    )
    compare(trainer.model, trained_by_keras(accumulating, batch_size=4), rtol=2e-4)


def test_clipping_is_for_gradients_only(tmp_path):
    clipped = trained(tmp_path / "a", keras.optimizers.SGD(1e-3), max_grad_norm=0.5)
    expected = trained_by_keras(keras.optimizers.SGD(1e-3, global_clipnorm=0.5))
    compare(clipped.model, expected, rtol=2e-4)


def test_an_average_is_of_weights_only(tmp_path):
    """At the end of fit on TensorFlow, Keras itself cannot overwrite weights that have none."""
    optimizer = keras.optimizers.SGD(1e-3, use_ema=True, ema_momentum=0.0)
    model = trained(tmp_path, optimizer).model
    compare(model, trained_by_keras(OPTIMIZERS["sgd"]()), rtol=2e-4)


def test_a_resumed_run_continues_bit_for_bit(tmp_path):
    whole = trained(tmp_path / "a", OPTIMIZERS["adamw"]())
    settings = {"save_strategy": "steps", "save_steps": 3}
    trained(tmp_path / "b", OPTIMIZERS["adamw"](), max_steps=3, **settings)
    model = float8_model()
    resumed = Trainer(
        model,
        arguments(
            tmp_path / "b",
            per_device_train_batch_size=8,
            num_train_epochs=2,
            max_grad_norm=0,
            train_sampling_strategy="sequential",
            **settings,
        ),
        train_dataset=data(),
        loss="mse",
        optimizers=(OPTIMIZERS["adamw"](), None),
    )
    resumed.fit(resume_from_checkpoint=True)
    left, right = by_name(whole.model), by_name(model)
    assert same(list(left.values()), list(right.values()))


def test_an_update_that_is_not_finite_replaces_nothing(tmp_path):
    x, y = data()
    x[9] = np.inf
    model = float8_model()
    before = by_name(model)
    with pytest.raises(NonFiniteError):
        Trainer(
            model,
            arguments(
                tmp_path,
                per_device_train_batch_size=32,
                max_steps=1,
                train_sampling_strategy="sequential",
            ),
            train_dataset=(x, y),
            loss="mse",
            optimizers=(OPTIMIZERS["sgd"](), None),
        ).fit()
    assert same(list(before.values()), list(by_name(model).values()))
