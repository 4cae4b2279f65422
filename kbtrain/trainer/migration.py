"""What a user hears who uses a name of the Transformers Trainer that ``Trainer`` lacks."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from typing import TYPE_CHECKING, Any, Self

from kbtrain.config.migration import reason
from kbtrain.config.trainer_names import MEMBERS, OLD_MEMBERS, PARAMETERS
from kbtrain.config.training_args import TrainingArguments
from kbtrain.errors import ConfigurationError


class KnownNames:
    """Explains names of Transformers where Python would only report an unknown name.

    A subclass of the Trainer may have a parameter of such a name. A method of such a name is an
    error, as it would never be called.
    """

    if not TYPE_CHECKING:  # type checkers would take every attribute as existing

        def __getattr__(self, name: str) -> Any:
            """Explain what replaces a member of the Transformers Trainer."""
            reason = MEMBERS.get(name) or OLD_MEMBERS.get(name)
            said = f". {reason}" if reason else ""
            raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}{said}")

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Check the arguments against ``__init__``, and suggest what to use instead."""
        if overridden := [name for name in MEMBERS if callable(getattr(cls, name, None))]:
            raise ConfigurationError(
                f"{cls.__name__}.{overridden[0]} would never be called: Transformers has such a "
                f"method, kbtrain does not. {MEMBERS[overridden[0]]} Otherwise rename it."
            )
        taken = inspect.signature(cls.__init__).parameters
        kinds = {p.kind for p in taken.values()}
        unknown = {name: value for name, value in kwargs.items() if name not in taken}
        if unknown and inspect.Parameter.VAR_KEYWORD not in kinds:
            known = [name for name in taken if name != "self"]
            raise ConfigurationError(
                "\n".join(
                    f"{cls.__name__} has no parameter {name!r}. {_instead(name, value, known)}"
                    for name, value in unknown.items()
                )
            )
        by_position = [p.name for p in taken.values() if p.kind is p.POSITIONAL_OR_KEYWORD][1:]
        if len(args) > len(by_position) and inspect.Parameter.VAR_POSITIONAL not in kinds:
            raise ConfigurationError(
                f"{cls.__name__} takes {len(by_position)} arguments by position "
                f"({', '.join(by_position)}), the others by name. Received: {len(args)} by "
                "position."
            )
        return super().__new__(cls)


def _instead(name: str, value: Any, known: list[str]) -> str:
    """What to use in place of a parameter that does not exist."""
    if name in PARAMETERS:
        return PARAMETERS[name]
    if name in (field.name for field in dataclasses.fields(TrainingArguments)):
        return f"It is a field of TrainingArguments: use TrainingArguments({name}=...)."
    if answer := reason(name, value):
        return f"Such settings belong to TrainingArguments. {answer}"
    close = difflib.get_close_matches(name, known, n=1)
    return f"Did you mean {close[0]}?" if close else f"It has: {', '.join(known)}."
