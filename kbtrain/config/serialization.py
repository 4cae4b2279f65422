"""``Documents``: settings as a dict, as JSON and as YAML, and back."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from kbtrain.config import converters as kinds
from kbtrain.config import yaml as yaml_text
from kbtrain.errors import ConfigurationError


class Documents:
    """Reading and writing of a frozen dataclass whose values JSON can hold."""

    def to_dict(self) -> dict[str, Any]:
        """All fields as a plain dict of what JSON can hold; changing it changes nothing here."""
        return {f.name: kinds.thaw(getattr(self, f.name)) for f in dataclasses.fields(self)}  # type: ignore[arg-type]

    def to_json_string(self) -> str:
        """All fields as an indented JSON object; floats are written so that they read back exactly.

        Returns:
            The text, without a newline at the end.
        """
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def to_json_file(self, path: str | os.PathLike[str]) -> None:
        """Write `to_json_string` to a file, replacing what was there.

        Args:
            path: The file; its directory must exist.
        """
        Path(path).write_text(self.to_json_string() + "\n", encoding="utf-8")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from a mapping of field names to values; fields left out take their defaults.

        Args:
            values: As `to_dict` gives them; anything the constructor accepts is fine.

        Returns:
            The arguments.

        Raises:
            ConfigurationError: As for a new object: unknown keys are explained, not ignored.
        """
        if not isinstance(values, Mapping) or not all(isinstance(key, str) for key in values):
            raise ConfigurationError(
                f"{cls.__name__} is built from a mapping of field names (str) to values. "
                f"Received: {kinds.shown(values)} (type {type(values).__name__})."
            )
        return cls(**values)

    @classmethod
    def from_json_string(cls, text: str) -> Self:
        """Build from a JSON object, the inverse of `to_json_string`.

        Args:
            text: The JSON object.

        Returns:
            The arguments.

        Raises:
            ConfigurationError: If the text is not a JSON object, and as for a new object.
        """
        try:
            values = json.loads(text)
        except json.JSONDecodeError as problem:
            raise ConfigurationError(
                f"{cls.__name__} are read from a JSON object, but the text is not JSON: {problem}. "
                f"Received: {kinds.shown(text)}"
            ) from None
        return cls.from_dict(values)

    @classmethod
    def from_json_file(cls, path: str | os.PathLike[str]) -> Self:
        """Build from a JSON file as written by `to_json_file`.

        Args:
            path: The file.

        Returns:
            The arguments.

        Raises:
            ConfigurationError: If the file holds no JSON object, and as for a new object.
            FileNotFoundError: If there is no such file.
        """
        return cls.from_json_string(Path(path).read_text(encoding="utf-8"))

    def to_yaml_string(self) -> str:
        """All fields as YAML, which any reader reads back the same (needs the extra ``cli``)."""
        return yaml_text.dumps(self.to_dict())

    def to_yaml_file(self, path: str | os.PathLike[str]) -> None:
        """Write `to_yaml_string` to a file, replacing what was there."""
        Path(path).write_text(self.to_yaml_string(), encoding="utf-8")

    @classmethod
    def from_yaml_string(cls, text: str) -> Self:
        """Build from YAML: ``name: value`` lines (needs the extra ``cli``).

        Raises:
            ConfigurationError: If the text is no such YAML, and as for a new object.
        """
        return cls.from_dict(yaml_text.loads(text, "the text"))

    @classmethod
    def from_yaml_file(cls, path: str | os.PathLike[str]) -> Self:
        """Build from a YAML file; the inverse of `to_yaml_file`.

        Raises:
            ConfigurationError: If the file holds no such YAML, and as for a new object.
            FileNotFoundError: If there is no such file.
        """
        return cls.from_dict(yaml_text.loads(Path(path).read_text(encoding="utf-8"), str(path)))
