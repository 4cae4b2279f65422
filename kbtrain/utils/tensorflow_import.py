"""Keeping Keras from importing TensorFlow where nobody uses it.

Keras asks in places whether something is of TensorFlow, and imports it to find out, wherever it is
installed: seconds at the start or in the middle of a run, and more memory than a small training
takes. What is not imported cannot have made the thing that is asked about.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from kbtrain.utils.fallback import report


@contextlib.contextmanager
def not_imported() -> Iterator[None]:
    """Inside, Keras takes TensorFlow for not installed, unless it has been imported already.

    Example:
        >>> with not_imported():
        ...     keras.utils.set_random_seed(0)
    """
    try:
        # Keras has no public door to the module object that it imports TensorFlow through.
        from keras.src.utils import module_utils

        lazy: Any = module_utils.tensorflow
        before = lazy._available
    except Exception as error:
        report(
            "Keeping Keras from importing TensorFlow",
            "keras",
            error,
            "Where TensorFlow is installed, a start takes seconds longer.",
        )
        yield
        return
    if "tensorflow" not in sys.modules:
        lazy._available = False
    try:
        yield
    finally:
        lazy._available = before
