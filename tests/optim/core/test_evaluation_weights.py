"""Evaluating other weights than those in training: the base, Keras' `fit`, the callback."""

import keras
import numpy as np
import pytest
from keras import ops

import optim

X = np.linspace(-1, 1, 24, dtype="float32").reshape(8, 3)
Y = np.linspace(0, 2, 8, dtype="float32")[:, None]


@keras.saving.register_keras_serializable(package="tests")
class Ahead(optim.Optimizer):
    """Descent that evaluates one remembered movement further than it has trained."""

    def slot_shapes(self, shape):
        return {"last": shape}

    def update(self, parameter, gradient, slots, step, learning_rate, weight_decay):
        movement = -learning_rate * gradient
        return parameter + movement, {"last": movement}

    def evaluated(self, parameter, slots):
        return parameter + slots["last"], {"last": ops.zeros_like(slots["last"])}


def bits(variable):
    return tuple(np.asarray(ops.convert_to_numpy(ops.cast(variable.value, "float32"))).ravel())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_swap_and_back(tools, dtype):
    variable = keras.Variable(np.array([1.0, 2.0], "float32"), dtype=dtype)
    optimizer = Ahead(0.3)
    assert optimizer.swap_in_evaluation_weights() is False
    tools.run(optimizer, [variable], [[np.array([1.0, -1.0], "float32")]])
    trained, state = bits(variable), [bits(v) for v in optimizer.variables]
    assert optimizer.swap_in_evaluation_weights() is True
    assert optimizer.swap_in_evaluation_weights() is False
    tolerance = 1e-6 if dtype == "float32" else 2.0**-8
    np.testing.assert_allclose(tools.to_numpy(variable), [0.4, 2.6], rtol=tolerance)
    optimizer.swap_back()
    optimizer.swap_back()
    assert bits(variable) == trained
    assert [bits(v) for v in optimizer.variables] == state
    # Nothing of the swap is left among the optimizer's variables.
    assert not any(v is variable for v in optimizer.variables)


def test_finalize_is_idempotent_and_undoes_a_swap_first(tools):
    variable = keras.Variable(np.array([1.0], "float32"))
    optimizer = Ahead(0.25)
    tools.run(optimizer, [variable], [[np.ones(1, "float32")]])
    optimizer.swap_in_evaluation_weights()
    for _ in range(2):
        optimizer.finalize_variable_values([variable])
        np.testing.assert_allclose(tools.to_numpy(variable), 0.5, rtol=1e-6)
    optimizer.swap_in_evaluation_weights()
    np.testing.assert_allclose(tools.to_numpy(variable), 0.5, rtol=1e-6)


def test_optimizers_without_such_weights_have_nothing_to_do(tools):
    variable = keras.Variable(np.array([1.0], "float32"))
    optimizer = optim.AdamW(0.1)
    tools.run(optimizer, [variable], [[np.ones(1, "float32")]])
    before = bits(variable)
    optimizer.swap_in_evaluation_weights()
    assert bits(variable) == before
    optimizer.swap_back()
    optimizer.finalize_variable_values([variable])
    assert bits(variable) == before


class Seen(keras.callbacks.Callback):
    """What the model's weights are at the end of every epoch, and at its first batch."""

    def __init__(self):
        super().__init__()
        self.ends, self.begins = [], []

    def on_epoch_end(self, epoch, logs=None):
        self.ends.append(self.model.get_weights())

    def on_epoch_begin(self, epoch, logs=None):
        self.begins.append(self.model.get_weights())


def make(optimizer):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.set_weights([np.full((3, 1), 0.5, "float32"), np.zeros(1, "float32")])
    model.compile(optimizer, loss="mse", jit_compile=False)
    return model


def fit(model, callbacks, epochs=3):
    history = model.fit(
        X,
        Y,
        validation_data=(X, Y),
        batch_size=4,
        epochs=epochs,
        shuffle=False,
        verbose=0,
        callbacks=callbacks,
    )
    return history.history


OPTIMIZERS = {
    "own": lambda: Ahead(0.2),
    "use_ema": lambda: optim.AdamW(0.1, use_ema=True, ema_momentum=0.6),
    "loss scale": lambda: keras.optimizers.LossScaleOptimizer(Ahead(0.2), initial_scale=4.0),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("on_epoch", [False, True])
def test_fit_validates_with_the_evaluation_weights(name, on_epoch, tmp_path):
    plain, swapping = make(OPTIMIZERS[name]()), make(OPTIMIZERS[name]())
    without = fit(plain, [])
    seen = Seen()
    history = fit(swapping, [optim.SwapEvaluationWeights(on_epoch=on_epoch), seen])
    # The training is the same, what it is judged by is not.
    np.testing.assert_allclose(history["loss"], without["loss"], rtol=1e-6)
    assert not np.allclose(history["val_loss"], without["val_loss"], rtol=1e-4)
    # After `fit` the model holds what was validated last, with or without the callback.
    for model in (plain, swapping):
        assert model.evaluate(X, Y, verbose=0) == pytest.approx(history["val_loss"][-1], rel=1e-6)
    for ours, theirs in zip(plain.get_weights(), swapping.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    ends = [np.mean((X @ kernel + bias - Y) ** 2) for kernel, bias in seen.ends]
    assert np.allclose(ends, history["val_loss"], rtol=1e-5) == on_epoch
    swapping.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.evaluate(X, Y, verbose=0) == pytest.approx(history["val_loss"][-1], rel=1e-6)


def test_the_callback_needs_an_optimizer_of_this_package():
    model = make(keras.optimizers.SGD(0.1))
    with pytest.raises(ValueError, match=r"SwapEMAWeights.*Received: SGD"):
        fit(model, [optim.SwapEvaluationWeights()])


def test_predict_with_the_callback():
    model = make(Ahead(0.2))
    model.optimizer.build(model.trainable_variables)
    model.optimizer.apply([ops.ones((3, 1)), ops.ones(1)])
    ahead = model.predict(X, verbose=0, callbacks=[optim.SwapEvaluationWeights()])
    np.testing.assert_allclose(ahead, X @ np.full((3, 1), 0.1) - 0.4, rtol=1e-5, atol=1e-6)
    now = model.predict(X, verbose=0)
    np.testing.assert_allclose(now, X @ np.full((3, 1), 0.3) - 0.2, rtol=1e-5, atol=1e-6)
