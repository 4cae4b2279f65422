"""Steps on JAX that cannot be compiled."""

import importlib

import pytest

from kbtrain.errors import ConfigurationError

pytestmark = pytest.mark.cross  # needs JAX, whatever Keras runs on


def test_a_number_that_jax_does_not_have_is_an_error_in_words():
    jax = importlib.import_module("jax")
    compiling = importlib.import_module("kbtrain.backends.jax.compile")

    def looks(x):
        return x * float(x)

    step = compiling._explaining(jax.value_and_grad(looks))
    with pytest.raises(ConfigurationError, match=r"test_compile.py.*stop_gradient"):
        step(1.0)
