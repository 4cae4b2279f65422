"""``kbtrain train CONFIG``: train, evaluate and save a model from a file of settings."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kbtrain.cli.parser import command_parser
from kbtrain.cli.train.backend import choose_backend
from kbtrain.cli.train.settings import OTHERS, SECTIONS, Place, Settings
from kbtrain.config import yaml
from kbtrain.config.training_args import TrainingArguments
from kbtrain.errors import ConfigurationError

_OWN = ("--help", "--dry-run", "--print-config")


def run(words: Sequence[str]) -> int:
    """Train as a file says."""
    own, changes = _split(words)
    parser = command_parser(
        "train",
        "Train, evaluate and save a model from a file of settings, and write the report of the "
        "run. Started again, it resumes. Any setting may be changed on the command line: "
        "--args.learning_rate 1e-3, --model.arguments '{width: 64}'.",
        usage="%(prog)s CONFIG [--dry-run] [--print-config] [--SECTION.NAME VALUE ...]",
        epilog=_settings_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", type=Path, metavar="CONFIG", help="a YAML or JSON file")
    parser.add_argument(
        "--dry-run", action="store_true", help="read the data, build the model, say what would run"
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print all that is set, as YAML, and stop"
    )
    options = parser.parse_args(own)
    if not options.config.is_file():
        raise ConfigurationError(f"there is no file {str(options.config)!r} in {Path.cwd()}.")
    settings = Settings(options.config, changes)
    if options.print_config:
        print(settings.shown(), end="")
        return 0
    choose_backend(settings)
    sys.path.insert(0, "")  # for functions of the user's, as `python -m` does
    from kbtrain.cli.train.pipeline import (
        train,  # it imports Keras, for which the backend is chosen
    )

    train(settings, options.dry_run)
    return 0


def _split(words: Sequence[str]) -> tuple[list[str], dict[Place, Any]]:
    """The words of the command itself, and the settings."""
    own: list[str] = []
    changes: dict[Place, Any] = {}
    waiting = list(words)
    while waiting:
        word = waiting.pop(0)
        option, equals, value = word.partition("=")
        name = option[2:]
        section = name.partition(".")[0]
        if not option.startswith("--") or option in _OWN or section not in {*SECTIONS, *OTHERS}:
            own.append(word)
            continue
        if not equals and waiting and not waiting[0].startswith("--"):
            value = waiting.pop(0)
        elif not equals:
            if not _is_flag(name):
                raise ConfigurationError(f"{option} needs a value: {option} VALUE.")
            value = "true"
        changes[tuple(name.replace("-", "_").split("."))] = yaml.value_of(value)
    for word in own:
        if word.startswith("--") and word not in _OWN:
            if close := difflib.get_close_matches(word, _OWN, n=1):
                raise ConfigurationError(f"there is no option {word}. Did you mean {close[0]}?")
            raise ConfigurationError(
                f"there is no option {word}. A setting is written with its section, such as "
                f"--args.{word[2:].replace('-', '_')}. See kbtrain train --help."
            )
    return own, changes


def _is_flag(name: str) -> bool:
    """Whether a setting may stand without a value, for true; unknown names are told later."""
    section, _, field = name.replace("-", "_").partition(".")
    kinds = {"args": TrainingArguments, **SECTIONS}
    if section not in kinds:
        return False
    fields = {f.name: str(f.type) for f in dataclasses.fields(kinds[section])}
    return "bool" in fields.get(field, "bool")


def _settings_help() -> str:
    """The settings of the file, for ``--help``."""
    lines = []
    for name, section in SECTIONS.items():
        lines.append(f"{name}:")
        lines += [_line(f"  {f.name}", f.metadata["help"]) for f in dataclasses.fields(section)]
    return "\n".join(["settings:", *lines, *(_line(n, about) for n, about in OTHERS.items())])


def _line(name: str, about: str) -> str:
    return textwrap.fill(about, 96, initial_indent=f"{name:<16}", subsequent_indent=" " * 16)
