"""Uses of private APIs of Keras or a framework, each with a fallback that gives the same result.

A private API may change with any release, so kbtrain never depends on one alone: a ``PrivateApi``
has a fast implementation that uses it and a plain one that does not. If the fast one fails, the
plain one takes over, and one warning gives the version and where to report it.

The list of all uses; ``optim.core.fallback`` has those of ``optim``:

===============================  ===============================  ==================================
private API for                  file                             fallback
===============================  ===============================  ==================================
convolutions in the fast order   backends/jax/trace               the function is traced in place
recording a step                 backends/torch/runner            the step runs eagerly
kbtrain's own recorder           backends/torch/capture           ``make_fx`` records
predicated optimizer updates     backends/torch                   old values are selected
norm and product of a list       backends/torch                   one tensor after the other
scalars of a step in a kernel    backends/torch/fusion            operations one by one
norm of gradients in kernels     backends/torch/fusion            norms of the tensors
random numbers in a kernel       backends/torch/capture/random    several operations
small operations put together    backends/torch/fusion            they stay as recorded
a user's ``tf.function``         backends/tensorflow/autograph    ``tf.autograph.to_graph``
whether XLA compiles             backends/tensorflow/optimizer    treated as not compiled
switching determinism off        backends/tensorflow/device       it stays on
the cluster of a program         backends/tensorflow/processes    it is not noticed
metric values as tensors         model/metrics                    Keras' own mean over samples
averages of ``use_ema``          optimization/evaluation_weights  Keras swaps them in and out
moving variables                 backends/tensorflow/device       they stay on their device
counting recorded operations     backends/torch/flops             the step runs once more
functions of a graph             backends/tensorflow/flops        what they compute does not count
Keras' masks, scopes, values     utils/packages/keras_private     see there
===============================  ===============================  ==================================
"""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Callable
from typing import Any

from kbtrain.errors import KbtrainError, first_lines

logger = logging.getLogger("kbtrain")

ISSUES = "https://github.com/kbtrain/kbtrain/issues"
"""Where users report problems."""

_reported: set[str] = set()


class NoFallback(Exception):
    """Raised by a fast implementation on purpose: it propagates, and no fallback is tried."""


def report(name: str, package: str, error: BaseException, instead: str) -> None:
    """Log, once for each name, that a private API does not work.

    Args:
        name: What does not work, in a user's terms.
        package: The distribution whose private API it is.
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
    logger.warning(
        "%s does not work with %s %s (%s: %s). %s Please report it: %s",
        name,
        package,
        version,
        type(error).__name__,
        first_lines(error, 1),
        instead,
        ISSUES,
    )


class PrivateApi:
    """A function with two implementations: one on a private API, and a plain fallback.

    If the fast implementation fails, the plain one is called with the same arguments. If that fails
    too, the arguments are at fault (a user's layer, for example): its exception is raised, and
    nothing is reported. Otherwise the failure is reported, and from then on this object uses the
    plain implementation.

    Args:
        name: What the function does, in a user's terms.
        package: The distribution whose private API it is.
        fast: The fast implementation; has no side effects before the point where it may fail.
        plain: The fallback; gives the same result.
        instead: What happens when ``fast`` fails, as a sentence.
        passes: Whether to raise an exception of ``fast`` without a fallback, such as running out
            of memory.

    Attributes:
        plain: As given.
        is_broken: Whether the fast implementation has failed.
    """

    def __init__(
        self,
        name: str,
        package: str,
        fast: Callable[..., Any],
        plain: Callable[..., Any],
        instead: str,
        passes: Callable[[BaseException], bool] = lambda error: False,
    ) -> None:
        self._name, self._package, self._instead = name, package, instead
        self._fast, self.plain = fast, plain
        self._passes = passes
        self.is_broken = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The result for these arguments."""
        if self.is_broken:
            return self.plain(*args, **kwargs)
        try:
            return self._fast(*args, **kwargs)
        except (NoFallback, KbtrainError):
            raise
        except Exception as error:
            if self._passes(error):
                raise
            failure = error
        result = self.plain(*args, **kwargs)
        self.is_broken = True
        report(self._name, self._package, failure, self._instead)
        return result
