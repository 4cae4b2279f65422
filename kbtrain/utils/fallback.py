"""What rests on private parts of Keras or of a framework, with a plain way to do the same.

What is not public may change with any release. So nothing here depends on it alone: a
``PrivateApi`` has a fast way and a plain one, which gives the same result. Where the fast one
fails, the plain one goes on, and the log says so once, with the version and where to report it.

These are all of them; `optim.core.fallback` has those of ``optim``:

===============================  ===============================  ==================================
private part                     file                             plain way
===============================  ===============================  ==================================
convolutions in the fast order   backends/jax/trace               the function, traced where it runs
recording a step                 backends/torch/runner            the step runs eagerly
our own recorder                 backends/torch/capture           ``make_fx`` records
optimizers that look at a flag   backends/torch                   old values are selected
norm and product of a list       backends/torch                   one tensor after the other
a user's ``tf.function``         backends/tensorflow/autograph    ``tf.autograph.to_graph``
whether XLA compiles             backends/tensorflow/optimizer    as if it did not
determinism, to be switched off  backends/tensorflow/device       it stays on
values in tensors of metrics     model/metrics                    Keras' own mean over samples
averages of ``use_ema``          optimization/evaluation_weights  Keras puts them in and back
moving variables                 backends/tensorflow/device       they stay where they are
Keras' masks, scopes, values     utils/keras_private              said there
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
"""Where to report what does not work."""

_reported: set[str] = set()


class NoFallback(Exception):
    """Raised by a fast way on purpose: it passes through, and the plain way is not tried."""


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
    """A function in two ways: one that may fail with a new version, and a plain one.

    Where the fast way fails, the plain one is called with the same arguments. If that fails, too,
    the mistake is in what it was given (a user's layer, say): its exception is raised, and nothing
    is reported. Otherwise the failure is reported, and this object keeps to the plain way.

    Args:
        name: What it is, as a user would name it.
        package: The distribution whose private part it is.
        fast: Changes nothing before it can no longer fail.
        plain: Gives the same result.
        instead: What happens where ``fast`` fails, as a sentence.
        passes: Whether an exception of ``fast`` is no failure: running out of memory, say.
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
        self._fast, self._plain = fast, plain
        self._passes = passes
        self.is_broken = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The result for these arguments."""
        if self.is_broken:
            return self._plain(*args, **kwargs)
        try:
            return self._fast(*args, **kwargs)
        except (NoFallback, KbtrainError):
            raise
        except Exception as error:
            if self._passes(error):
                raise
            failure = error
        result = self._plain(*args, **kwargs)
        self.is_broken = True
        report(self._name, self._package, failure, self._instead)
        return result
