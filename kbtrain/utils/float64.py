"""Keeps models in float64 at float64, which Keras' promotion rules would turn into float32."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from kbtrain.utils.packages.keras_private import flatten_layers, narrowing_table


def computes_in_float64(model: keras.Model) -> bool:
    """Whether any layer of a model has weights or computes in float64, if the backend supports it.

    JAX silently uses float32 instead unless ``jax_enable_x64`` is set.
    """
    policies = (layer.dtype_policy for layer in flatten_layers(model))
    asked = any("float64" in (p.compute_dtype, p.variable_dtype) for p in policies)
    return asked and float_dtype(keras.ops.convert_to_tensor(np.zeros(1))) == "float64"


@contextlib.contextmanager
def kept(model: keras.Model) -> Iterator[None]:
    """Inside, Keras operations on float64 return float64, if the model computes in float64.

    Keras' promotion rules end with a step from 64 to 32 bits, "to be aligned with JAX's default
    behavior": on PyTorch, and on JAX with ``jax_enable_x64``, the product of two float64 matrices
    is float32. For other models the rules stay unchanged.
    """
    table = narrowing_table() if computes_in_float64(model) else {}
    before = table.get("float64")
    if before is not None:
        table["float64"] = "float64"
    try:
        yield
    finally:
        if before is not None:
            table["float64"] = before


def float_dtype(*tensors: Any) -> str:
    """The dtype to compute in: ``"float64"`` if any of the tensors has it, else ``"float32"``."""
    wide = any(keras.backend.standardize_dtype(t.dtype) == "float64" for t in tensors)
    return "float64" if wide else "float32"
