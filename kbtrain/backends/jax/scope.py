"""JAX: the state of the step that is being traced, as values in a Keras scope."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras

from kbtrain.backends.jax.mesh import gathered_weight, layout_of
from kbtrain.backends.scopes import LossScope
from kbtrain.utils.packages.keras_private import autocast, has_value


@dataclass
class StepContext:
    """The context of the step that is being traced, for the functions that it calls.

    Attributes:
        state: The variables of the step. Keras' inner scopes do not see the outer scope's values,
            so every nested scope must carry all of them.
        undeclared: Undeclared variables that a step has read, such as those of a custom loss.
    """

    state: list[keras.Variable] = field(default_factory=list)
    undeclared: list[keras.Variable] = field(default_factory=list)

    @contextlib.contextmanager
    def tracing(self, variables: Sequence[keras.Variable]) -> Iterator[None]:
        """Trace a step of these variables."""
        before, self.state = self.state, list(variables)
        try:
            yield
        finally:
            self.state = before


context = StepContext()


class Scope(keras.StatelessScope):  # type: ignore[misc]
    """Records the variables that are read and are not part of the state."""

    def get_current_value(self, variable: keras.Variable) -> Any:
        """The value in this scope; None if the variable holds it."""
        value = super().get_current_value(variable)
        unknown = value is None and has_value(variable)
        if unknown and not any(
            variable is other for other in (*context.state, *context.undeclared)
        ):
            context.undeclared.append(variable)
        return value


class _LossScope(Scope, LossScope):
    """Hands out weights as layers use them: those that are divided are gathered when asked for."""

    def __init__(self, mapping: Sequence[Any], **options: Any) -> None:
        super().__init__(mapping, **options)
        self._gathered: dict[tuple[int, str], tuple[Any, Any]] = {}

    def get_current_value(self, variable: keras.Variable) -> Any:
        """The value in this scope; a layer that asks again gets the same one."""
        value = super().get_current_value(variable)
        if value is None or layout_of(variable) is None:
            return value
        cast = autocast(variable, value)
        key = id(variable), str(cast.dtype)
        known, gathered = self._gathered.get(key, (None, None))
        if known is not value:
            gathered = gathered_weight(variable, cast)
            self._gathered[key] = value, gathered
        return gathered


def held_value(scope: keras.StatelessScope, variable: keras.Variable) -> Any:
    """The value of a variable in a scope, divided if its state is; None if it is not there."""
    return keras.StatelessScope.get_current_value(scope, variable)


def run_stateless(
    fn: Callable[[], Any],
    values: Sequence[Any],
    of_loss: bool = False,
) -> tuple[Any, dict[int, Any]]:
    """Run ``fn`` with the state at ``values``; return its result and {index: new value}.

    With ``of_loss`` the losses of layers are collected, for a gradient.
    """
    mapping = list(zip(context.state, values, strict=True))
    scope_class = _LossScope if of_loss else Scope
    with scope_class(mapping, collect_losses=of_loss) as scope:
        before = [held_value(scope, v) for v in context.state]
        result = fn()
        after = [held_value(scope, v) for v in context.state]
    pairs = enumerate(zip(before, after, strict=True))
    return result, {i: new for i, (old, new) in pairs if new is not old}
