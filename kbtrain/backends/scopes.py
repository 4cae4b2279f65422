"""Scopes that collect the assignments of layers while the loss is differentiated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops


def is_overwritten(variable: keras.Variable) -> bool:
    """Whether the "gradient" of a variable is its new value, as for float8 scales."""
    return getattr(variable, "overwrite_with_gradient", False)


class LossScope(keras.StatelessScope):  # type: ignore[misc]
    """Collects assignments of layers without detaching a weight from its gradient.

    A layer that assigns its own weights (``SpectralNormalization``) continues with the new value,
    and the gradient is taken at the new value, as in Keras' training on PyTorch and TensorFlow. No
    gradient flows through its computation.
    """

    def add_update(self, update: tuple[keras.Variable, Any]) -> None:
        """Record a new value."""
        variable, value = update
        held = self.get_current_value(variable) if variable.trainable else None
        if held is not None:  # adds zero, and the gradient of `held`
            value = ops.stop_gradient(value) + (held - ops.stop_gradient(held))
        super().add_update((variable, value))


class NoticingScope(LossScope):
    """Also tracks undeclared variables: states of stateful RNNs, variables of a loss.

    Args:
        variables: The variables to differentiate with respect to.
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
        """Record a new value."""
        self._register(update[0])
        super().add_update(update)

    def changes(self, variables: Sequence[keras.Variable]) -> list[tuple[keras.Variable, Any]]:
        """The assigned ones of ``variables``, with their new values."""
        new = [(v, self.get_current_value(v)) for v in variables]
        return [(v, n) for v, n in new if n is not self._held.get(id(v))]


def carry_over(scope: keras.StatelessScope, variables: Sequence[keras.Variable]) -> None:
    """Assign the values that a scope has recorded for ``variables``, and no others."""
    for variable in variables:
        if (new := scope.get_current_value(variable)) is not None:
            variable.assign(new)
