"""``kbtrain args``: every field of TrainingArguments with type, default and meaning."""

from __future__ import annotations

import dataclasses
import shutil
import textwrap
from collections.abc import Sequence

from kbtrain.cli.parser import command_parser
from kbtrain.config.fields import Fields
from kbtrain.config.migration import DROPPED, NOT_YET, RENAMED, explain_unknown, mentioned, reason
from kbtrain.config.training_args import TrainingArguments
from kbtrain.errors import ConfigurationError


def run(words: Sequence[str]) -> int:
    """Print all fields, or those named on the command line."""
    parser = command_parser(
        "args",
        "List the fields of TrainingArguments: type, default, meaning; of other names that "
        "Transformers, Keras or Lightning have, what they became.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these")
    names = parser.parse_args([_field_name(word) for word in words]).names
    fields = {field.name: field for field in dataclasses.fields(TrainingArguments)}
    elsewhere = {**RENAMED, **DROPPED, **NOT_YET}
    for name in names:
        if name not in fields and name not in elsewhere:
            raise ConfigurationError(explain_unknown(name, None, [*fields], "", [*elsewhere]))
    width = min(shutil.get_terminal_size((100, 24)).columns, 100)
    for name in names or fields:
        if name in fields:
            print(describe_field(fields[name], width))
            continue
        print(textwrap.fill(f"{name} is not a field here. {reason(name, ...)}", width))
        for other in mentioned(reason(name, ...)):
            if other in fields:
                print(describe_field(fields[other], width))
    return 0


def _field_name(word: str) -> str:
    """A field's name, also where it is written as an option: ``--learning-rate``."""
    return word if word == "--help" else word.removeprefix("--").replace("-", "_")


def describe_field(field: dataclasses.Field[object], width: int) -> str:
    """Describe a field in a few lines.

    Args:
        field: A field of TrainingArguments.
        width: Columns of the screen.

    Returns:
        Name, type and default on the first line, the meaning below.
    """
    meaning = textwrap.fill(
        field.metadata["help"],
        width,
        initial_indent="    ",
        subsequent_indent="    ",
        break_on_hyphens=False,  # keep the names of options searchable
    )
    return f"{field.name}: {written_type(field)} = {field.default!r}\n{meaning}"


def written_type(field: dataclasses.Field[object]) -> str:
    """The type of a field as it is declared: an argument parser may have replaced ``field.type``.

    Args:
        field: A field of TrainingArguments.

    Returns:
        The annotation, as text.
    """
    declared = [vars(base).get("__annotations__", {}) for base in Fields.__mro__]
    return str(next(types[field.name] for types in declared if field.name in types))
