"""What a layer may do to a variable while the loss is differentiated."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops


class LossScope(keras.StatelessScope):
    """Holds what the layers assign, without cutting a weight off from its gradient.

    A layer that assigns its own weights (``SpectralNormalization``) goes on with the new value,
    and the gradient is the one at the new value, as in Keras' training on PyTorch and TensorFlow:
    nothing flows back through the way it was computed.
    """

    def add_update(self, update: tuple[keras.Variable, Any]) -> None:
        """Note a new value."""
        variable, value = update
        held = self.get_current_value(variable) if variable.trainable else None
        if held is not None:  # adds zero, and the gradient of `held`
            value = ops.stop_gradient(value) + (held - ops.stop_gradient(held))
        super().add_update((variable, value))
