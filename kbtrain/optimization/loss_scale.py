"""What a step knows of an overflow, for the optimizer that scales the loss.

``keras.optimizers.LossScaleOptimizer`` looks for values that are not finite in one gradient after
the other: a reduction for each. The norm of all gradients, which a step computes anyway, is finite
if they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import keras

_LOOKS = "check_finite"


def can_be_told(optimizer: keras.optimizers.Optimizer) -> bool:
    """Whether an optimizer looks for an overflow as Keras' does, not in a way of its own."""
    keras_own = getattr(keras.optimizers.LossScaleOptimizer, _LOOKS, None)
    return keras_own is not None and getattr(type(optimizer), _LOOKS, None) is keras_own


@contextlib.contextmanager
def told_of_overflow(optimizer: keras.optimizers.Optimizer, finite: Any) -> Iterator[None]:
    """Context in which an optimizer that scales the loss takes ``finite`` for its own check.

    Nothing happens to other optimizers, and to those that look in a way of their own.

    Args:
        optimizer: The optimizer that is about to be applied.
        finite: Whether all gradients are finite, a boolean scalar on the device.
    """
    if not can_be_told(optimizer):
        yield
        return
    # Not by `setattr`, which would track the function as a part of the optimizer.
    vars(optimizer)[_LOOKS] = lambda gradients: finite
    try:
        yield
    finally:
        del vars(optimizer)[_LOOKS]
