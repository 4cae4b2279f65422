"""Everything that differs between the frameworks.

``load()`` returns the module of the framework that Keras runs on. It implements
``kbtrain.backends.protocol.Backend``.
"""

from __future__ import annotations

import importlib
from typing import cast

import keras

from kbtrain.backends.protocol import Backend


def load() -> Backend:
    """Return the backend module of the framework Keras was imported with.

    Raises:
        ImportError: Keras runs on a backend that kbtrain does not support.
    """
    name = keras.backend.backend()
    try:
        return cast(Backend, importlib.import_module(f"{__name__}.{name}"))
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{name}":
            raise
        raise ImportError(
            f"kbtrain runs on torch, tensorflow and jax. Received: the Keras backend {name!r}. "
            "Set KERAS_BACKEND to one of the three before importing keras."
        ) from None
