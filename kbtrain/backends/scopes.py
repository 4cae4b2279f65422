"""What a layer may do to a variable while the loss is differentiated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops


def is_overwritten(variable: keras.Variable) -> bool:
    """Whether what is differentiated for a variable is its new value, as for float8 scales."""
    return getattr(variable, "overwrite_with_gradient", False)


class LossScope(keras.StatelessScope):  # type: ignore[misc]
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


class NoticingScope(LossScope):
    """Takes in the variables that nobody told us of: stateful RNNs' states, those of a loss.

    Args:
        variables: Those that are differentiated.
        values: Their values.
        register: Called with each variable that is assigned.
    """

    def __init__(
        self,
        variables: Sequence[keras.Variable],
        values: Sequence[Any],
        register: Callable[[keras.Variable], None],
    ) -> None:
        super().__init__(list(zip(variables, values, strict=True)), collect_losses=True)
        self._register = register
        self._held = {id(v): self.get_current_value(v) for v in variables}

    def add_update(self, update: tuple[keras.Variable, Any]) -> None:
        """Note a new value."""
        self._register(update[0])
        super().add_update(update)

    def changes(self, variables: Sequence[keras.Variable]) -> list[tuple[keras.Variable, Any]]:
        """Those of ``variables`` that were assigned, with their new values."""
        new = [(v, self.get_current_value(v)) for v in variables]
        return [(v, n) for v, n in new if n is not self._held.get(id(v))]


def carry_over(scope: keras.StatelessScope, variables: Sequence[keras.Variable]) -> None:
    """Assign what a scope noted for ``variables``; the rest is forgotten with it."""
    for variable in variables:
        if (new := scope.get_current_value(variable)) is not None:
            variable.assign(new)
