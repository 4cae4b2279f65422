"""Keeps Keras from importing TensorFlow where it is not used.

In some places Keras imports TensorFlow, if it is installed, only to check whether an object belongs
to it. That takes seconds and more memory than a small training. If TensorFlow has not been
imported, no object can belong to it.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from kbtrain.utils.fallback import report


@contextlib.contextmanager
def not_imported() -> Iterator[None]:
    """Inside, Keras treats TensorFlow as not installed, unless it has been imported already.

    Example:
        >>> import keras
        >>> with not_imported():
        ...     keras.utils.set_random_seed(0)
    """
    try:
        # Keras has no public API for the module object through which it imports TensorFlow.
        from keras.src.utils import module_utils

        lazy: Any = module_utils.tensorflow
        before = lazy._available
    except Exception as error:
        report(
            "Keeping Keras from importing TensorFlow",
            "keras",
            error,
            "Where TensorFlow is installed, the start takes seconds longer.",
        )
        yield
        return
    if "tensorflow" not in sys.modules:
        lazy._available = False
    try:
        yield
    finally:
        lazy._available = before
