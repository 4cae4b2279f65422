"""``Serializable``: conversion to and from dicts, JSON and YAML."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from kbtrain.config import converters
from kbtrain.config import yaml as yaml_text
from kbtrain.errors import ConfigurationError


def secret_names(kind: type) -> frozenset[str]:
    """The names of the fields whose values must not be saved or shown."""
    fields = dataclasses.fields(kind)
    return frozenset(field.name for field in fields if field.metadata.get("secret"))


def without_secrets(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of fields as they may be saved or shown.

    Args:
        kind: The dataclass.
        values: Field names with values, of any of its fields.

    Returns:
        The same with ``<NAME>`` in place of each secret, which the constructor takes as none.
    """
    secret = secret_names(kind)
    return {
        name: f"<{name.upper()}>" if name in secret and value is not None else value
        for name, value in values.items()
    }


class Serializable:
    """Base of an immutable dataclass whose values JSON can represent."""

    def to_dict(self) -> dict[str, Any]:
        """All fields as a new dict of JSON values, which the caller may change.

        A token is replaced by ``<HUB_TOKEN>``, which the constructor takes as none.
        """
        values = {
            field.name: converters.thaw(getattr(self, field.name))
            for field in dataclasses.fields(self)  # type: ignore[arg-type]
        }
        return without_secrets(type(self), values)

    def to_json_string(self) -> str:
        """All fields as an indented JSON object; floats survive the round trip exactly.

        Returns:
            The text, without a newline at the end.
        """
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def to_json_file(self, path: str | os.PathLike[str]) -> None:
        """Write ``to_json_string`` to a file, replacing its content.

        Args:
            path: The file; its directory must exist.
        """
        Path(path).write_text(self.to_json_string() + "\n", encoding="utf-8")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Construct from a mapping of field names to values; missing fields get their defaults.

        Args:
            values: As from ``to_dict``, or anything that the constructor accepts.

        Returns:
            The arguments.

        Raises:
            ConfigurationError: As for the constructor; unknown keys are an error, too.
        """
        if not isinstance(values, Mapping) or not all(isinstance(key, str) for key in values):
            raise ConfigurationError(
                f"{cls.__name__} is built from a mapping of field names (str) to values. "
                f"Received: {converters.shown(values)} (type {type(values).__name__})."
            )
        return cls(**values)

    @classmethod
    def from_json_string(cls, text: str) -> Self:
        """Construct from a JSON object, the inverse of ``to_json_string``.

        Args:
            text: The JSON object.

        Returns:
            The arguments.

        Raises:
            ConfigurationError: The text is not a JSON object, or as for the constructor.
        """
        try:
            values = json.loads(text)
        except json.JSONDecodeError as problem:
            raise ConfigurationError(
                f"{cls.__name__} needs a JSON object, but the text is not JSON: {problem}. "
                f"Received: {converters.shown(text)}"
            ) from None
        return cls.from_dict(values)

    @classmethod
    def from_json_file(cls, path: str | os.PathLike[str]) -> Self:
        """Construct from a JSON file as written by ``to_json_file``.

        Args:
            path: The file.

        Returns:
            The arguments.

        Raises:
            ConfigurationError: The file is not a JSON object, or as for the constructor.
            FileNotFoundError: There is no such file.
        """
        return cls.from_json_string(Path(path).read_text(encoding="utf-8"))

    def to_yaml_string(self) -> str:
        """All fields as YAML, which every YAML parser reads the same (needs the extra ``cli``)."""
        return yaml_text.dumps(self.to_dict())

    def to_yaml_file(self, path: str | os.PathLike[str]) -> None:
        """Write ``to_yaml_string`` to a file, replacing its content."""
        Path(path).write_text(self.to_yaml_string(), encoding="utf-8")

    @classmethod
    def from_yaml_string(cls, text: str) -> Self:
        """Construct from YAML: ``name: value`` lines (needs the extra ``cli``).

        Raises:
            ConfigurationError: The text is not a YAML mapping, or as for the constructor.
        """
        return cls.from_dict(yaml_text.loads(text, "the text"))

    @classmethod
    def from_yaml_file(cls, path: str | os.PathLike[str]) -> Self:
        """Construct from a YAML file, the inverse of ``to_yaml_file``.

        Raises:
            ConfigurationError: The file is not a YAML mapping, or as for the constructor.
            FileNotFoundError: There is no such file.
        """
        return cls.from_dict(yaml_text.loads(Path(path).read_text(encoding="utf-8"), str(path)))
