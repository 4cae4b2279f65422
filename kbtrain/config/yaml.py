"""YAML 1.2 scalars on PyYAML: ``no`` is a string and ``3e-4`` a number."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

from kbtrain.errors import ConfigurationError
from kbtrain.utils.packages.optional_imports import require

_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_FLOAT = re.compile(
    r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
_INT = re.compile(r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$")
_REPLACED = {"bool", "float", "int", "timestamp"}


def dumps(values: Mapping[str, Any]) -> str:
    """Write a mapping as YAML, keeping the order of its keys.

    Args:
        values: Scalars, lists and dicts.

    Returns:
        The text, which parsers of YAML 1.1 and 1.2 read alike.

    Raises:
        ConfigurationError: PyYAML is not installed.
    """
    text: str = _yaml().dump(dict(values), Dumper=_dumper(), sort_keys=False)
    return text


def loads(text: str, source: str) -> dict[str, Any]:
    """Read a YAML mapping.

    Args:
        text: The YAML.
        source: Where it comes from, for error messages.

    Returns:
        The mapping; empty for an empty string.

    Raises:
        ConfigurationError: It is not YAML, not a mapping, has a duplicate key, or PyYAML is not
            installed.
    """
    yaml = _yaml()
    try:
        values = yaml.load(text, Loader=_loader())
    except yaml.YAMLError as problem:
        raise ConfigurationError(f"{source} is not YAML: {problem}") from None
    values = {} if values is None else values
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigurationError(
            f"{source} must hold a mapping, `name: value` on each line. "
            f"Received: {type(values).__name__}."
        )
    return values


def lines_of(text: str) -> dict[tuple[str | int, ...], int]:
    """The line of each key and each item of a list in a YAML text, for error messages.

    Args:
        text: The YAML, which can be read.

    Returns:
        Keys from the outermost on -> line, from 1.
    """
    found: dict[tuple[str | int, ...], int] = {}

    def visit(node: Any, place: tuple[str | int, ...]) -> None:
        for index, item in enumerate(node.value if isinstance(node.value, list) else ()):
            # A mapping has pairs of nodes, a list has nodes.
            key, value = item if isinstance(item, tuple) else (None, item)
            inner = (*place, index if key is None else str(key.value))
            found[inner] = (item if key is None else key).start_mark.line + 1
            visit(value, inner)

    if (root := _yaml().compose(text, Loader=_loader())) is not None:
        visit(root, ())
    return found


def value_of(text: str) -> Any:
    """The value that a text has in a YAML file: a number, true, a list; else the text itself."""
    try:
        return loads(f"value: {text}", "")["value"]
    except ConfigurationError:
        return text


def _yaml() -> Any:
    return require("yaml", "cli", "Reading or writing YAML")


@functools.cache
def _loader() -> Any:
    """PyYAML's safe loader with the scalars of YAML 1.2; duplicate keys are an error."""
    yaml = _yaml()

    def construct_mapping(self: Any, node: Any, deep: bool = False) -> Any:
        keys = [key.value for key, _ in node.value]
        for key, _ in node.value:
            if keys.count(key.value) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"duplicate key {key.value!r}", key.start_mark
                )
        return yaml.SafeLoader.construct_mapping(self, node, deep)

    loader: Any = type("Loader", (yaml.SafeLoader,), {"construct_mapping": construct_mapping})
    loader.yaml_implicit_resolvers = {
        first: [(tag, regexp) for tag, regexp in pairs if tag.rpartition(":")[2] not in _REPLACED]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _add_resolvers(loader)
    # PyYAML reads 010 as octal and 1:30 in base 60; YAML 1.2 does not.
    loader.add_constructor("tag:yaml.org,2002:int", _whole)
    return loader


@functools.cache
def _dumper() -> Any:
    """PyYAML's safe dumper; quotes strings that either YAML version would not read as one."""
    dumper: Any = type("Dumper", (_yaml().SafeDumper,), {})
    _add_resolvers(dumper)
    return dumper


def _add_resolvers(target: Any) -> None:
    # The order matters: an integer also matches the pattern of a float.
    for name, pattern, first in (
        ("bool", _BOOL, "tTfF"),
        ("int", _INT, "-+0123456789"),
        ("float", _FLOAT, "-+.0123456789"),
    ):
        target.add_implicit_resolver(f"tag:yaml.org,2002:{name}", pattern, list(first))


def _whole(loader: Any, node: Any) -> int:
    text = node.value
    return int(text, 0) if text.startswith(("0o", "0x")) else int(text)
