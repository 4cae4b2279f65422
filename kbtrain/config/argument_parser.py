"""A command line from dataclasses: options, JSON and YAML files, and overrides of files."""

from __future__ import annotations

import dataclasses
import enum
import json
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin

from kbtrain.config import yaml as yaml_text
from kbtrain.config.converters import read_scalar
from kbtrain.config.inactive_settings import is_inactive
from kbtrain.config.migration import explain_unknown
from kbtrain.errors import ConfigurationError
from kbtrain.utils.packages.optional_imports import require


class ArgumentParser:
    """A command line for ``TrainingArguments`` and your own dataclasses.

    Every field is an option, ``--learning_rate`` as well as ``--learning-rate``, with its type,
    default and help text (``metadata={"help": ...}``). ``--config FILE`` reads a JSON or YAML file
    with the same names; it may be repeated, later files override earlier ones and options override
    files. A flag needs no value (``--bf16``) but may have one (``--bf16 false``), and a flag that
    is True by default has a negation (``--no_remove_unused_columns``). A list takes several values
    (``--report_to json csv``), a dict is JSON.

    The command line is built with jsonargparse (the extra ``cli``); files and dicts are read
    without it (YAML needs PyYAML, from the same extra).

    Args:
        *types: Dataclasses without common field names.
        description: Text above the options in ``--help``.
        prog: Name of the program in ``--help``.

    Raises:
        ConfigurationError: An argument is not a dataclass, or two have a field of the same name.

    Example:
        >>> @dataclasses.dataclass
        ... class ModelArguments:
        ...     width: int = dataclasses.field(default=64, metadata={"help": "Hidden units."})
        >>> from kbtrain import TrainingArguments
        >>> parser = ArgumentParser(ModelArguments, TrainingArguments)
        >>> model_args, args = parser.parse_args(["--width", "8", "--learning-rate", "1e-3"])
        >>> model_args.width, args.learning_rate
        (8, 0.001)
    """

    def __init__(self, *types: type, description: str | None = None, prog: str | None = None):
        # Transformers takes a tuple.
        listed = types[0] if len(types) == 1 and isinstance(types[0], (tuple, list)) else types
        self.types: tuple[type, ...] = tuple(listed)
        self.description, self.prog = description, prog
        if not self.types:
            raise ConfigurationError("ArgumentParser needs at least one dataclass. Received: none.")
        self._owners: dict[str, type] = {}
        self._fields: dict[str, _Field] = {}
        for owner in self.types:
            self._add(owner)

    def _add(self, owner: Any) -> None:
        if not (isinstance(owner, type) and dataclasses.is_dataclass(owner)):
            raise ConfigurationError(f"ArgumentParser takes dataclasses. Received: {owner!r}.")
        hints = typing.get_type_hints(owner)
        for field in dataclasses.fields(owner):
            if not field.init:
                continue
            if field.name in self._owners or field.name == "config":
                other = self._owners.get(field.name)
                taken = f"a field of {other.__name__}" if other else "the option --config"
                raise ConfigurationError(
                    f"The field {field.name!r} of {owner.__name__} has the same name as {taken}. "
                    "Rename one of the two."
                )
            self._owners[field.name] = owner
            self._fields[field.name] = _Field(field, hints[field.name])

    # --- the command line -----------------------------------------------------------------------

    def parse_args(self, args: Sequence[str] | None = None) -> tuple[Any, ...]:
        """Parse a command line.

        Args:
            args: The arguments after the program's name; defaults to ``sys.argv[1:]``.

        Returns:
            An instance of each dataclass, in their order.

        Raises:
            SystemExit: After ``--help``, or with status 2 and a message after an error.
            ConfigurationError: jsonargparse is not installed.
        """
        return self._parse(args, None)

    def parse_args_into_dataclasses(
        self,
        args: Sequence[str] | None = None,
        return_remaining_strings: bool = False,
        look_for_args_file: bool = False,
        args_filename: None = None,
        args_file_flag: None = None,
    ) -> tuple[Any, ...]:
        """``parse_args`` with the name and the arguments of Transformers' parser.

        Args:
            args: The arguments after the program's name; defaults to ``sys.argv[1:]``.
            return_remaining_strings: Return unknown arguments as the last item of the result
                instead of raising an error.
            look_for_args_file: Not supported: files are read with ``--config FILE``.
            args_filename: Not supported either.
            args_file_flag: Not supported either.

        Raises:
            SystemExit: As in ``parse_args``.
            ConfigurationError: A file with arguments is requested.
        """
        if look_for_args_file or args_filename is not None or args_file_flag is not None:
            raise ConfigurationError(
                "Settings are read from JSON and YAML files, not from files with command-line "
                "arguments: write --config FILE. Received: "
                f"look_for_args_file={look_for_args_file!r}, args_filename={args_filename!r}, "
                f"args_file_flag={args_file_flag!r}."
            )
        remaining: list[str] = []
        parsed = self._parse(args, remaining if return_remaining_strings else None)
        return (*parsed, remaining) if return_remaining_strings else parsed

    def _parse(self, args: Sequence[str] | None, remaining: list[str] | None) -> tuple[Any, ...]:
        """``parse_args``; unknown arguments are appended to ``remaining``, if it is a list."""
        words = self._plain_flags(sys.argv[1:] if args is None else args)
        parser = self._command_line()
        try:
            words = self._known_names(words, remaining)
            given = vars(parser.parse_args(words, defaults=False))
            values: dict[str, Any] = {}
            for path in given.pop("config", None) or []:
                values |= self._typed(_read_file(path), path)
            return self._build(values | {k: self._fields[k].value(v) for k, v in given.items()})
        except ConfigurationError as problem:
            message = str(problem)
        except OSError as problem:
            message = f"--config: {problem.strerror}: {problem.filename}"
        parser.error(message)
        raise SystemExit(2)  # unreachable; type checkers do not know that error() exits

    def _command_line(self) -> Any:
        jsonargparse = require("jsonargparse", "cli", "A command line")
        parser = jsonargparse.ArgumentParser(
            description=self.description,
            prog=self.prog,
            # The usage line with all options would fill a screen above every error.
            usage="%(prog)s [--config FILE] [--NAME VALUE ...]   (--help lists the options)",
            allow_abbrev=False,
        )
        parser.add_argument(
            "--config",
            type=str,
            action="append",
            metavar="FILE",
            help="JSON or YAML file with any of the options below; may be repeated.",
        )
        for owner in self.types:
            group = parser.add_argument_group(owner.__name__)
            for name, field in self._fields.items():
                if self._owners[name] is owner:
                    group.add_argument(*field.options(), **field.keywords())
        return parser

    def _plain_flags(self, words: Sequence[str]) -> list[str]:
        """The arguments with normalized flags: Transformers also accepts 0 and 1, and --no_NAME."""
        flags = {name for name, field in self._fields.items() if field.is_flag}
        result: list[str] = []
        for word in words:
            option, equals, value = word.partition("=")
            name = option[2:].replace("-", "_") if option.startswith("--") else ""
            denied = name.removeprefix("no_")
            if result and result[-1][2:].replace("-", "_") in flags:
                word = _TRUTH.get(word.lower(), word)
            elif name in flags and equals:
                word = f"{option}={_TRUTH.get(value.lower(), value)}"
            elif name not in self._fields and denied in flags and self._fields[denied].default:
                word = f"--{denied}=false"
            result.append(word)
        return result

    def _known_names(self, words: Sequence[str], remaining: list[str] | None) -> list[str]:
        """The arguments without inactive settings of Transformers.

        Args:
            words: The arguments of a command line.
            remaining: Collects unknown options with their values; None makes them an error.

        Raises:
            ConfigurationError: There is an unknown option.
        """
        known = {option for field in self._fields.values() for option in field.options()}
        if words and words[0].endswith((".json", ".yaml", ".yml")):
            raise ConfigurationError(
                f"A file with settings is passed as --config {words[0]}. Received: {words[0]!r} "
                "as the first argument."
            )
        kept: list[str] = []
        position = 0
        while position < len(words) and words[position] != "--":
            option, equals, value = words[position].partition("=")
            following = words[position + 1] if position + 1 < len(words) else "--"
            position += 1
            if not option.startswith("--") or option in known | {"--config", "--help"}:
                kept.append(words[position - 1])
                continue
            alone = not equals and following.startswith("--")
            value = value if equals else "" if alone else following
            name = option[2:].replace("-", "_")
            meant = None if value.lower() in ("none", "null") else read_scalar(value)
            if not alone and is_inactive(name, meant):
                position += 0 if equals else 1
            elif remaining is None:
                self._refuse_name(name, value)
            else:
                remaining.append(words[position - 1])
                while position < len(words) and not words[position].startswith("--"):
                    remaining.append(words[position])
                    position += 1
        return [*kept, *words[position:]]

    def _refuse_name(self, name: str, value: Any) -> NoReturn:
        raise ConfigurationError(explain_unknown(name, value, list(self._fields)))

    # --- files and dicts ------------------------------------------------------------------------

    def parse_dict(
        self, values: Mapping[str, Any], allow_extra_keys: bool = False
    ) -> tuple[Any, ...]:
        """Construct the dataclasses from one mapping of names to values.

        Args:
            values: Fields of all the dataclasses.
            allow_extra_keys: Ignore names that no dataclass has.

        Raises:
            ConfigurationError: A name is unknown or missing, or a value is invalid.
        """
        known = {k: v for k, v in values.items() if k in self._fields}
        return self._build(self._typed(known if allow_extra_keys else values, "the mapping"))

    def parse_json_file(
        self, json_file: str | Path, allow_extra_keys: bool = False
    ) -> tuple[Any, ...]:
        """``parse_dict`` of a JSON file."""
        return self.parse_dict(_read_file(json_file, json_only=True), allow_extra_keys)

    def parse_yaml_file(
        self, yaml_file: str | Path, allow_extra_keys: bool = False
    ) -> tuple[Any, ...]:
        """``parse_dict`` of a YAML file."""
        return self.parse_dict(_read_file(yaml_file), allow_extra_keys)

    def _typed(self, values: Mapping[str, Any], source: Any) -> dict[str, Any]:
        """The values of a file, checked against the types of their fields."""
        unknown = [name for name in values if name not in self._fields]
        for name in unknown:
            if not is_inactive(name, values[name]):
                self._refuse_name(name, values[name])
        values = {name: value for name, value in values.items() if name not in unknown}
        return {name: self._fields[name].checked(value, source) for name, value in values.items()}

    def _build(self, values: Mapping[str, Any]) -> tuple[Any, ...]:
        missing = [n for n, field in self._fields.items() if field.required and n not in values]
        if missing:
            raise ConfigurationError(
                f"No value for {', '.join(missing)}, which has no default. Pass "
                f"{' '.join('--' + name for name in missing)} (or a file with them)."
            )
        return tuple(
            owner(**{n: v for n, v in values.items() if self._owners[n] is owner})
            for owner in self.types
        )


HfArgumentParser = ArgumentParser
"""The name of this parser in Transformers."""


class _Field:
    """The command-line option of a dataclass field.

    Args:
        field: The dataclass field.
        hint: Its resolved type.
    """

    def __init__(self, field: dataclasses.Field[Any], hint: Any) -> None:
        self.name, self.metadata = field.name, field.metadata
        self.hint, self.enum = _without_enum(field.metadata.get("command_line", hint))
        # A converter checks and converts by itself, and knows more than a type can express.
        self.checks_itself = "converter" in field.metadata
        if field.default_factory is not dataclasses.MISSING:
            self.default = field.default_factory()
        else:
            self.default = field.default
        self.required = self.default is dataclasses.MISSING

    @property
    def is_flag(self) -> bool:
        """Whether its values are only True and False (and None, as a default)."""
        return bool in _members(self.hint) and set(_members(self.hint)) <= {bool, type(None)}

    def options(self) -> list[str]:
        """All spellings of the option; the first one is its name."""
        spellings = [f"--{self.name}", f"--{self.name.replace('_', '-')}"]
        return list(dict.fromkeys([*spellings, *self.metadata.get("aliases", ())]))

    def keywords(self) -> dict[str, Any]:
        """The other arguments of ``add_argument``."""
        text = str(self.metadata.get("help", "")) or "No description."
        default = self.default.value if isinstance(self.default, enum.Enum) else self.default
        if self.required:
            text += " Required."
        keywords: dict[str, Any] = {"help": text, "type": self.hint}
        if not self.required:
            keywords["default"] = default
        members = _members(self.hint)
        if any(get_origin(m) in (list, tuple, Sequence) or m in (list, tuple) for m in members):
            items = [a for m in members for a in get_args(m) if a is not Ellipsis]
            item = items[0] if items else str
            if get_origin(item) is Mapping:  # one object per value, or a JSON list of all
                item = dict[str, Any] | list[dict[str, Any]]
            keywords |= {"type": item, "nargs": "+"}
        elif bool in members or Literal[True] in members:
            keywords |= {"nargs": "?", "const": True}
        elif self.checks_itself and any(get_origin(m) is Mapping for m in members):
            keywords["type"] = dict[str, Any] | str  # also "key=value,key=value"
        return keywords

    def value(self, parsed: Any) -> Any:
        """The value to pass to the dataclass, from a parsed option."""
        if isinstance(parsed, list):
            parts = [part if isinstance(part, list) else [part] for part in parsed]
            parsed = [item for part in parts for item in part]
        return self.enum(parsed) if self.enum is not None and parsed is not None else parsed

    def checked(self, value: Any, source: Any) -> Any:
        """The value to pass to the dataclass, from a file."""
        if self.checks_itself:
            return value
        if self.enum is not None and isinstance(value, self.enum):
            return value
        jsonargparse = require("jsonargparse", "cli", "Checking the types of a dataclass")
        parser = jsonargparse.ArgumentParser(exit_on_error=False)
        parser.add_argument(f"--{self.name}", type=self.hint)
        try:
            return self.value(parser.parse_object({self.name: value}).get(self.name))
        except Exception as problem:
            raise ConfigurationError(f"{self.name} in {source}: {problem}") from None


_TRUTH = dict.fromkeys(("1", "t", "y"), "true") | dict.fromkeys(("0", "f", "n"), "false")
"""Values of a flag that Transformers accepts besides ``true`` and ``false``."""


def _members(hint: Any) -> tuple[Any, ...]:
    """The parts of a union, or the type itself."""
    if get_origin(hint) in (typing.Union, types.UnionType):
        return get_args(hint)
    return (hint,)


def _without_enum(hint: Any) -> tuple[Any, type[enum.Enum] | None]:
    """The type of an option for an enum, which is given by value, and the enum, if it is one."""
    members = _members(hint)
    found = [m for m in members if isinstance(m, type) and issubclass(m, enum.Enum)]
    if not found:
        return hint, None
    words: Any = Literal.__getitem__(tuple(item.value for item in found[0]))
    return (words | None if type(None) in members else words), found[0]


def _read_file(path: str | Path, json_only: bool = False) -> dict[str, Any]:
    """The mapping in a JSON or YAML file (by its suffix; an unknown one means YAML)."""
    text = Path(path).expanduser().read_text(encoding="utf-8")
    if not json_only and Path(path).suffix.lower() != ".json":
        return yaml_text.loads(text, str(path))
    try:
        values = json.loads(text)
    except json.JSONDecodeError as problem:
        raise ConfigurationError(f"{path} is not JSON: {problem}") from None
    if not isinstance(values, dict):
        raise ConfigurationError(
            f"{path} must hold a JSON object. Received: {type(values).__name__}."
        )
    return values
