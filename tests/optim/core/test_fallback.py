"""Kernels that fail with another version: one report, and the rule as it is written."""

import importlib
import logging
import sys

import keras
import numpy as np
import pytest

import optim
from optim.core import fallback
from optim.core.fallback import PrivateApi
from optim.core.rule import elementwise
from optim.kernels import backend

BROKEN = {
    "jax": [
        ("optim.kernels.jax.inplace_order", "in_place"),
        ("optim.kernels.jax.inplace_order", "jaxpr_as_fun"),
    ],
    "tensorflow": [
        ("optim.kernels.tensorflow.inplace_order", "in_place"),
        ("optim.kernels.tensorflow.inplace_order", "_for_xla._fast"),
    ],
    "torch": [
        ("torch", "_fused_adam_"),
        ("torch.fx.experimental.proxy_tensor", "make_fx"),
        ("optim.kernels.torch.tiles", "adam_"),
        ("keras.src.backend.common.stateless_scope", "in_stateless_scope"),
    ],
}[backend.__name__.rpartition(".")[2]]


def broken(*args, **kwargs):
    raise TypeError("takes other arguments now")


@pytest.fixture(autouse=True)
def nothing_failed_yet(monkeypatch):
    monkeypatch.setattr(fallback, "_reported", set())
    name = backend.__name__
    modules = [m for n, m in list(sys.modules.items()) if n.startswith(name)]
    for item in [item for module in modules for item in vars(module).values()]:
        if isinstance(item, PrivateApi):
            monkeypatch.setattr(item, "is_broken", False)


def trained(optimizer):
    """Weights after three updates of a model that is large enough for every kernel."""
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((128,)), keras.layers.Dense(130)])
    model.compile(optimizer, "mse", jit_compile=backend.__name__.endswith("tensorflow") or "auto")
    generator = np.random.default_rng(2)
    x, y = generator.normal(size=(12, 128)), generator.normal(size=(12, 130))
    model.fit(x.astype("float32"), y.astype("float32"), batch_size=4, verbose=0, shuffle=False)
    return model.get_weights()


@pytest.fixture(scope="module")
def expected():
    return {name: trained(getattr(optim, name)(1e-2)) for name in ("Adam", "NAdam")}


@pytest.mark.parametrize("place", BROKEN, ids=".".join)
def test_a_broken_kernel_leaves_the_numbers_as_they_are(place, expected, monkeypatch, caplog):
    importlib.import_module(place[0])
    monkeypatch.setattr(".".join(place), broken)
    with caplog.at_level(logging.WARNING, "optim"):
        for name, weights in expected.items():
            for weight, other in zip(trained(getattr(optim, name)(1e-2)), weights, strict=True):
                np.testing.assert_allclose(weight, other, rtol=1e-5, atol=1e-6)
    (message,) = [r.getMessage() for r in caplog.records if r.name == "optim"]
    assert "(TypeError: takes other arguments now)" in message
    assert message.endswith(fallback.ISSUES)


def test_a_mistake_in_a_rule_is_raised_and_not_reported(caplog):
    class Mistaken(optim.Lion):
        @elementwise
        def update(self, parameter, gradient, slots, step, learning_rate, weight_decay):
            raise ValueError("a rule of the user's")

    with pytest.raises(ValueError, match="of the user's"):
        trained(Mistaken(1e-2))
    assert [r for r in caplog.records if r.name == "optim"] == []


def test_layers_are_found_without_keras_walk(monkeypatch, caplog):
    shared = keras.layers.Dense(2)
    inner = keras.Sequential([keras.Input((2,)), shared, keras.layers.LayerNormalization()])
    inputs = keras.Input((2,))
    model = keras.Model(inputs, inner(shared(inputs)))
    found = {id(layer) for layer in fallback.flatten_layers(model)}
    monkeypatch.setattr(fallback.flatten_layers, "_fast", broken)
    monkeypatch.setattr(fallback.flatten_layers, "is_broken", False)
    plain = [id(layer) for layer in fallback.flatten_layers(model)]
    assert plain[0] == id(model)
    assert len(set(plain)) == len(plain)
    assert {id(inner), id(shared), id(inner.layers[-1])} <= set(plain) <= found
    assert len(caplog.records) == 1
