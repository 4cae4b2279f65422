"""Uses of private parts of Keras or of a framework, each with a public way to do the same.

What is private may change with any release. Where the fast way fails, the plain one takes over,
with the same result, and the log says so once. These are all uses:

- ``kernels/jax/``: results in the order in which they overwrite their old values;
- ``kernels/tensorflow/``: the same, and whether XLA compiles;
- ``kernels/torch/``: PyTorch's fused optimizers, recorded rules and leaving the modes that record a
  step (``_disable_current_modes``), kernels by Triton, Keras' stateless scope;
- ``core/precision.py``: the table by which Keras makes float32 of float64;
- here: iterating over a model's layers.

`kbtrain.utils.fallback` has the same two functions, and `kbtrain.utils.packages.keras_private`
Keras' table too: neither package imports the other, so these few lines are written twice.
"""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Callable, Iterator
from typing import Any

import keras

logger = logging.getLogger("optim")

ISSUES = "https://github.com/kbtrain/kbtrain/issues"
"""Where to report what does not work."""

_reported: set[str] = set()


def report(name: str, package: str, error: BaseException, instead: str) -> None:
    """Log, once for each name, that a private part does not work.

    Args:
        name: What does not work, as a user would name it.
        package: The distribution whose private part it is.
        error: How it failed.
        instead: What happens now, as a sentence.
    """
    if name in _reported:
        return
    _reported.add(name)
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        version = "(version unknown)"
    lines = str(error).strip().splitlines() or [""]
    logger.warning(
        "%s does not work with %s %s (%s: %s). %s Please report it: %s",
        name,
        package,
        version,
        type(error).__name__,
        lines[0],
        instead,
        ISSUES,
    )


class PrivateApi:
    """A function in two ways: one that may fail with a new version, and a plain one.

    What fails both ways is a mistake in the arguments (a rule of the user's): it is raised, and
    nothing is reported.

    Args:
        name: What it is, as a user would name it.
        package: The distribution whose private part it is.
        fast: Has no effects.
        plain: Gives the same result.
        instead: What happens where ``fast`` fails, as a sentence.
    """

    def __init__(
        self,
        name: str,
        package: str,
        fast: Callable[..., Any],
        plain: Callable[..., Any],
        instead: str,
    ) -> None:
        self._name, self._package, self._instead = name, package, instead
        self._fast, self._plain = fast, plain
        self.is_broken = False

    def __call__(self, *args: Any) -> Any:
        """The result for these arguments."""
        if self.is_broken:
            return self._plain(*args)
        try:
            return self._fast(*args)
        except Exception as error:
            failure = error
        result = self._plain(*args)
        self.is_broken = True
        report(self._name, self._package, failure, self._instead)
        return result


def _walk(value: Any) -> Iterator[Any]:
    if isinstance(value, keras.Model):
        inner: Any = value.layers
    elif isinstance(value, keras.layers.Layer):
        inner = list(vars(value).values())
    else:
        inner = value.values() if isinstance(value, dict) else value
    if isinstance(value, keras.layers.Layer):
        yield value
    if isinstance(inner, list | tuple) or isinstance(value, dict):
        for item in inner:
            if isinstance(item, keras.layers.Layer | dict | list | tuple):
                yield from _walk(item)


flatten_layers = PrivateApi(
    "Walking over the layers of a model",
    "keras",
    lambda layer: list(layer._flatten_layers()),
    lambda layer: list({id(found): found for found in _walk(layer)}.values()),
    "Layers are found by the attributes of layers.",
)
"""The layer and everything below it, each once."""
