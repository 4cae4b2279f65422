"""Dtype policies of the layers of a model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import keras

from kbtrain.utils.layers import walk_layers


def use_mixed_precision(model: keras.Model, policy: str) -> None:
    """Set a policy such as ``mixed_bfloat16`` on every float32 layer; weights stay float32.

    A layer reads the global policy when it is created, so changing that would be too late.
    """
    for layer in walk_layers(model):
        if layer.dtype_policy.name == "float32":
            layer.dtype_policy = policy


def computes_in_float16(model: keras.Model) -> bool:
    """Whether a layer with weights has the policy ``mixed_float16``, or the model itself."""
    return any(
        layer.dtype_policy.name == "mixed_float16"
        for layer in walk_layers(model)
        if layer is model or layer.trainable_variables
    )


@contextlib.contextmanager
def computing_in(model: keras.Model, policy: str | None) -> Iterator[None]:
    """Context in which layers with float32 weights use ``policy``; None changes nothing."""
    changed = [] if policy is None else list(walk_layers(model))
    mixed = ("float32", "mixed_bfloat16", "mixed_float16")
    before = [(layer, layer.dtype_policy) for layer in changed if layer.dtype_policy.name in mixed]
    for layer, _ in before:
        layer.dtype_policy = policy
    try:
        yield
    finally:
        for layer, own in before:
            layer.dtype_policy = own
