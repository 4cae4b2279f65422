"""``python -m kbtrain args``: every field of TrainingArguments with type, default and meaning."""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import textwrap
from collections.abc import Sequence

from kbtrain.config.fields import Fields
from kbtrain.config.migration import explain_unknown
from kbtrain.config.training_args import TrainingArguments
from kbtrain.errors import ConfigurationError


def run(words: Sequence[str]) -> int:
    """Print all fields, or those named on the command line."""
    parser = argparse.ArgumentParser(
        "python -m kbtrain args", description="List the fields of TrainingArguments."
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these fields")
    names = parser.parse_args(words).names
    fields = {field.name: field for field in dataclasses.fields(TrainingArguments)}
    for name in names:
        if name not in fields:
            raise ConfigurationError(explain_unknown(name, None, list(fields)))
    width = min(shutil.get_terminal_size((100, 24)).columns, 100)
    for name in names or fields:
        print(describe_field(fields[name], width))
    return 0


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
