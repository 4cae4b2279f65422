"""Temporary replacements for the ``call`` of a model's layers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras

Call = Callable[..., Any]


@contextlib.contextmanager
def replaced_calls(
    layers: Iterable[keras.layers.Layer], make: Callable[[keras.layers.Layer, Call], Call]
) -> Iterator[None]:
    """Context in which each layer runs ``make(layer, call)`` in place of ``call``; nestable.

    The replacement is set on the instance: other layers of the class, copies and saved models are
    not affected.
    """
    before = [(layer, vars(layer).get("call")) for layer in layers]
    for layer, _ in before:
        vars(layer)["call"] = make(layer, vars(layer).get("call") or _class_call(layer))
    try:
        yield
    finally:
        for layer, own in before:
            if own is None:
                vars(layer).pop("call", None)
            else:
                vars(layer)["call"] = own


def _class_call(layer: keras.layers.Layer) -> Call:
    # Looked up at call time: a backend may replace it while it records a step.
    return lambda *args, **kwargs: type(layer).call(layer, *args, **kwargs)
