"""JAX: the state of the step that is being traced, as values in a scope of Keras'."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras

from kbtrain.backends.scopes import LossScope
from kbtrain.utils.keras_private import has_value


@dataclass
class StepContext:
    """What is being traced, for the functions that a step calls.

    Attributes:
        state: The variables of the step. Keras' inner scopes do not see the outer scope's values,
            so every nested scope has to carry all of them.
        strangers: Variables that a step has read without having been told of them: those of a
            user's own loss, say.
    """

    state: list[keras.Variable] = field(default_factory=list)
    strangers: list[keras.Variable] = field(default_factory=list)

    @contextlib.contextmanager
    def tracing(self, variables: Sequence[keras.Variable]) -> Iterator[None]:
        """Trace a step of these variables."""
        before, self.state = self.state, list(variables)
        try:
            yield
        finally:
            self.state = before


now = StepContext()


class Scope(keras.StatelessScope):  # type: ignore[misc]
    """Notes the variables that are read and are not part of the state."""

    def get_current_value(self, variable: keras.Variable) -> Any:
        """The value in this scope; None where the variable itself has it."""
        value = super().get_current_value(variable)
        unknown = value is None and has_value(variable)
        if unknown and not any(variable is other for other in (*now.state, *now.strangers)):
            now.strangers.append(variable)
        return value


class _LossScope(Scope, LossScope):
    pass


def run_stateless(
    fn: Callable[[], Any],
    values: Sequence[Any],
    of_loss: bool = False,
) -> tuple[Any, dict[int, Any]]:
    """Run ``fn`` with the state at ``values``; return its result and {index: new value}.

    With ``of_loss`` it is run for its gradient: losses of layers are collected.
    """
    mapping = list(zip(now.state, values, strict=True))
    scope_class = _LossScope if of_loss else Scope
    with scope_class(mapping, collect_losses=of_loss) as scope:
        before = [scope.get_current_value(v) for v in now.state]
        result = fn()
        after = [scope.get_current_value(v) for v in now.state]
    pairs = enumerate(zip(before, after, strict=True))
    return result, {i: new for i, (old, new) in pairs if new is not old}
