"""TensorFlow: the context of the step that is being traced."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras


@dataclass
class StepContext:
    """The context of the step that is being traced, for the functions that it calls.

    Attributes:
        variables: The variables of the step, to find out which of them layers assign.
        journal: The variables that ``commit_if`` assigns, by id, with their old values; None if no
            rollback can follow.
    """

    variables: list[keras.Variable] = field(default_factory=list)
    journal: dict[int, tuple[keras.Variable, Any]] | None = None

    @contextlib.contextmanager
    def tracing(self, variables: Sequence[keras.Variable]) -> Iterator[None]:
        """Trace a step of these variables."""
        before, self.variables = self.variables, list(variables)
        try:
            yield
        finally:
            self.variables = before

    def register(self, variable: keras.Variable) -> None:
        """Add a variable that the step uses without having declared it."""
        if not any(variable is known for known in self.variables):
            self.variables.append(variable)


context = StepContext()
