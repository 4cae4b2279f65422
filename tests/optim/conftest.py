"""What the tests of `optim` share: NumPy float64 references and a few conversions."""

import json
import math
from types import SimpleNamespace

import keras
import numpy as np
import pytest
from keras import ops
from paths import GOLDEN

# Whether a compiled train step is quick enough for a test; torch.compile takes half a minute.
_JIT_COMPILE = {"jax": True, "tensorflow": True, "torch": False}


def pytest_configure(config):
    # Keras converts variables by `np.array(variable)`, which NumPy 2 warns about on two backends.
    config.addinivalue_line(
        "filterwarnings", "ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"
    )


def to_numpy(x):
    return ops.convert_to_numpy(ops.cast(ops.convert_to_tensor(x), "float32")).copy()


def reference_adamw(
    parameter, gradients, learning_rate, beta_1=0.9, beta_2=0.999, epsilon=1e-8, weight_decay=0.01
):
    """AdamW as its paper and PyTorch write it, in float64. `learning_rate`: number or function."""
    parameter = np.asarray(parameter, "float64")
    mean = np.zeros_like(parameter)
    square = np.zeros_like(parameter)
    for t, gradient in enumerate(gradients, start=1):
        gradient = np.asarray(gradient, "float64")
        rate = learning_rate(t - 1) if callable(learning_rate) else learning_rate
        parameter = parameter * (1 - rate * weight_decay)
        mean = beta_1 * mean + (1 - beta_1) * gradient
        square = beta_2 * square + (1 - beta_2) * gradient**2
        denominator = np.sqrt(square) / math.sqrt(1 - beta_2**t) + epsilon
        parameter = parameter - rate / (1 - beta_1**t) * mean / denominator
    return parameter


def relative_to_movement(result, expected, start):
    """Size of the error divided by the size of the movement."""
    return np.linalg.norm(result - expected) / np.linalg.norm(expected - start)


def run(optimizer, variables, gradients):
    """Apply lists of NumPy gradients (`None` allowed), one list per update."""
    for step in gradients:
        optimizer.apply([None if g is None else ops.convert_to_tensor(g) for g in step], variables)


def linear_model(optimizer, weights, jit_compile=False, dtype="float32"):
    """A dot product trained by the mean of its output: its gradient is the mean of the input."""
    weights = np.asarray(weights, "float32")
    model = keras.Sequential(
        [
            keras.Input((len(weights),)),
            keras.layers.Dense(1, use_bias=False, dtype=dtype, name="dot"),
        ]
    )
    model.set_weights([weights[:, None]])
    model.compile(
        optimizer=optimizer,
        loss=lambda y_true, y_pred: ops.mean(y_pred),
        jit_compile=jit_compile,
    )
    return model


@pytest.fixture(scope="session")
def jit_compile():
    return _JIT_COMPILE[keras.backend.backend()]


@pytest.fixture(scope="session")
def tools():
    return SimpleNamespace(
        to_numpy=to_numpy,
        reference_adamw=reference_adamw,
        relative_to_movement=relative_to_movement,
        run=run,
        linear_model=linear_model,
    )


@pytest.fixture
def golden():
    return lambda name: json.loads((GOLDEN / f"{name}.json").read_text())


@pytest.fixture
def rng():
    return np.random.default_rng(0)
