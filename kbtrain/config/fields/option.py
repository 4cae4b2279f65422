"""How a field is declared, and what its change means for a resumed run."""

from __future__ import annotations

import dataclasses
from typing import Any

from kbtrain.config.converters import Converter
from kbtrain.config.field_types import Metadata

HARMLESS = ""
"""Changing it does not affect the training of a resumed run, or it says how to resume."""

NEW_VALUE = (
    "the rest of the run uses the new value, except that a metric-driven learning rate resumes "
    "where it was"
)
DATA_ORDER = "the rest of the data comes in another order"
EPOCH_LENGTH = "an epoch has another number of steps"
RUN_LENGTH = "schedules that depend on the length of the run follow the new one"
LOG_STEPS = "logs come at other steps"
EVALUATION_STEPS = "evaluations come at other steps"
SAVE_STEPS = "checkpoints come at other steps"
EVALUATION_PRECISION = "evaluations are computed in another precision than before"
ROUNDING = "the same numbers are computed with other rounding from here on"
BEST_METRIC = "the best value so far, which new ones are compared with, belongs to the old setting"


def option(
    default: Any,
    converter: Converter,
    help: str,
    *,
    on_resume: str,
    command_line: Any = None,
    by_position: bool = False,
    secret: bool = False,
) -> Any:
    """Declare a field of ``TrainingArguments``.

    Args:
        default: Its default, as the constructor takes it.
        converter: Checks a value and converts it to the form that is stored.
        help: Its meaning and unit.
        on_resume: What a run that is resumed with another value does differently, as a clause for
            a warning; ``HARMLESS`` if nothing.
        command_line: The type of its command-line option, if that accepts more than is stored.
        by_position: Whether it may be given by position.
        secret: Whether its value must not be saved or shown; ``<NAME>`` is written in its place.
    """
    metadata: dict[str, Any] = {"converter": converter, "help": help, "on_resume": on_resume}
    if command_line is not None:
        metadata["command_line"] = command_line
    metadata["secret"] = secret
    return dataclasses.field(
        default=default, metadata=Metadata(metadata), kw_only=not by_position, repr=not secret
    )
