"""TensorFlow: functions that a user decorated with ``tf.function``, inside the train step."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf

from kbtrain.utils.fallback import PrivateApi

_KIND: Any = type(tf.function(lambda: None))


@contextlib.contextmanager
def inlined() -> Iterator[None]:
    """Context in which decorated functions are inlined into the graph that calls them.

    A separate graph would keep the values that weights and seeds had at its first trace, and could
    not return new ones. No public API for this also converts ``if`` and ``while`` on tensors, as
    the decorator does.
    """
    before = _KIND.__call__

    def call(function: Any, *args: Any, **kwargs: Any) -> Any:
        return _body(function)(*args, **kwargs)

    _KIND.__call__ = call
    try:
        yield
    finally:
        _KIND.__call__ = before


def _body(function: Any) -> Callable[..., Any]:
    """The Python function of a decorated function, converted by autograph if that is enabled."""
    python: Any = function.python_function
    if not getattr(function, "_autograph", True):
        result: Callable[..., Any] = python
        return result
    while (wrapper := getattr(python, "_tf_decorator", None)) is not None:
        python = wrapper.decorated_target  # autograph would modify the wrapper permanently
    converted: Callable[..., Any] = _convert(python)
    return converted


def _as_decorated(python: Callable[..., Any]) -> Any:
    autograph = tf.__internal__.autograph
    status = autograph.control_status_ctx()
    # With this status autograph converts the function.
    return autograph.tf_convert(python, type(status)(status=type(status.status).ENABLED))


def _by_to_graph(python: Callable[..., Any]) -> Any:
    if not inspect.ismethod(python):
        return tf.autograph.to_graph(python)
    owner: Any = python.__self__
    if type(owner).__name__ == "TfMethodTarget":  # stands for the object that has the method
        owner = owner.target
    return functools.partial(tf.autograph.to_graph(python.__func__), owner)


_convert = PrivateApi(
    "Making a tf.function a part of the step",
    "tensorflow",
    _as_decorated,
    _by_to_graph,
    "tf.autograph.to_graph converts it.",
)
