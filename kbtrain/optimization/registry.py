"""Optimizers and schedules by name, from the entry points of installed packages.

kbtrain imports no optimizer package: ``optim`` is found in the same way as a third-party package.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points, packages_distributions
from typing import Any

from kbtrain.errors import ConfigurationError

OPTIMIZERS = "kbtrain.optimizers"
SCHEDULES = "kbtrain.schedules"
WRAPPERS = "kbtrain.optimizer_wrappers"
"""Optimizers that wrap another one, passed as ``inner_optimizer``."""
REFUSED = ".refused"
"""Suffix of a group of known but unsupported names, whose entry points load the reason."""

_DISTRIBUTION = "kbtrain"
_BUNDLED = "optim"
"""The import package of optimizers that the distribution of this name installs as well."""


@functools.cache
def _entries(group: str) -> dict[str, list[EntryPoint]]:
    found: dict[str, list[EntryPoint]] = {}
    for entry in entry_points(group=group):
        same = found.setdefault(entry.name, [])
        # One package can be seen twice (an editable install and its build folder).
        if all(other.value != entry.value for other in same):
            same.append(entry)
    return found


def names(group: str) -> list[str]:
    """The names registered in ``group``, sorted. Nothing is imported."""
    return sorted(_entries(group))


def find(group: str, name: str, field: str) -> Any:
    """Import the object registered as ``name``.

    Args:
        group: ``OPTIMIZERS``, ``SCHEDULES`` or ``WRAPPERS``.
        name: The name of the entry point.
        field: The argument in which the name was given, for error messages.

    Raises:
        ConfigurationError: The name is unknown or registered by two packages, or the package
            cannot be imported.
    """
    entries = _entries(group).get(name, [])
    if not entries:
        for refusal in _entries(group + REFUSED).get(name, []):
            _check_bundled_package(refusal, f"{field}={name!r}")
            raise ConfigurationError(f"{field}={name!r} is not supported: {refusal.load()}")
        known = names(group)
        close = difflib.get_close_matches(name.lower(), known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        listing = ", ".join(known) or (
            "none: is the distribution kbtrain installed (pip install), and not just on the path?"
        )
        raise ConfigurationError(
            f"{field}={name!r} is not registered in the entry points {group!r}.{hint} "
            f"Known: {listing}."
        )
    if len(entries) > 1:
        owners = " and ".join(f"{e.value} ({e.dist.name if e.dist else '?'})" for e in entries)
        raise ConfigurationError(
            f"{field}={name!r} is registered twice in {group!r}: by {owners}. Uninstall one."
        )
    _check_bundled_package(entries[0], f"{field}={name!r}")
    try:
        return entries[0].load()
    except Exception as error:
        owner = entries[0].dist.name if entries[0].dist else "?"
        raise ConfigurationError(
            f"{field}={name!r} is registered by the package {owner!r} as {entries[0].value!r}, "
            f"which cannot be imported: {type(error).__name__}: {error}"
        ) from error


def _check_bundled_package(entry: EntryPoint, what: str) -> None:
    """Check that ``import optim`` finds our package: the name is short, and others have used it.

    Raises:
        ConfigurationError: It finds another one, or one that cannot be imported.
    """
    ours = entry.dist is not None and entry.dist.name == _DISTRIBUTION
    if not ours or entry.module.partition(".")[0] != _BUNDLED:
        return
    try:
        package = importlib.import_module(_BUNDLED)
    except Exception:  # reported by whoever loads the entry point
        return
    if getattr(package, "DISTRIBUTION", None) == _DISTRIBUTION:
        return
    place = getattr(package, "__file__", None) or list(getattr(package, "__path__", ["?"]))[0]
    others = sorted(set(packages_distributions().get(_BUNDLED, [])) - {_DISTRIBUTION})
    remedy = (
        f"Uninstall {', '.join(others)}, then reinstall {_DISTRIBUTION}"
        if others
        else f"Take it off the module search path, or reinstall {_DISTRIBUTION}"
    )
    raise ConfigurationError(
        f"{what} needs the package {_BUNDLED!r} that comes with {_DISTRIBUTION}, but "
        f"`import {_BUNDLED}` finds another one of that name: {place}. {remedy}."
    )


def takes(factory: Any, argument: str) -> bool:
    """Whether a class or function names ``argument`` in its signature."""
    return argument in inspect.signature(factory).parameters


def check_takes(factory: Any, argument: str, name: str, field: str) -> None:
    """Check that an optimizer takes an argument.

    Args:
        factory: The class or function registered as ``name``.
        argument: The required argument.
        name: The name of the optimizer.
        field: The field of the arguments that sets ``argument``.

    Raises:
        ConfigurationError: The factory does not take it; the message lists optimizers that do.
    """
    if takes(factory, argument):
        return
    able = [other for other in names(OPTIMIZERS) if _takes(other, argument)]
    raise ConfigurationError(
        f"`{field}` is for optimizers that take {argument}: "
        f"{', '.join(able) or 'none is installed'}. "
        f"Received: optim={name!r}. Leave {field} out, or choose one of these."
    )


def _takes(name: str, argument: str) -> bool:
    try:
        return takes(find(OPTIMIZERS, name, "optim"), argument)
    except (
        ConfigurationError,
        TypeError,
        ValueError,
    ):  # a broken entry of another package is not an error here
        return False


def check_names(factory: Any, own: Iterable[str], what: str) -> None:
    """Check argument names against the signature of a factory.

    Args:
        factory: A class or function.
        own: Names of arguments that a user passed for it.
        what: The name of these arguments in errors.

    Raises:
        ConfigurationError: The factory has no argument of such a name.
    """
    parameters = inspect.signature(factory).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    if unknown := sorted(set(own) - set(parameters)):
        known = [p for p in parameters if p != "self"]
        close = difflib.get_close_matches(unknown[0], known, n=1)
        raise ConfigurationError(
            f"{what}: {getattr(factory, '__name__', factory)} has no argument {unknown[0]!r}."
            f"{f' Did you mean {close[0]!r}?' if close else ''} It takes: {', '.join(known)}."
        )


def call_with_known(factory: Any, offered: dict[str, Any], own: dict[str, Any], what: str) -> Any:
    """Call ``factory`` with all of ``own`` and those of ``offered`` that it accepts.

    Args:
        factory: A class or function.
        offered: Arguments that only some factories accept.
        own: Arguments a user passed for this one; they take precedence over ``offered``.
        what: The name of these arguments in errors.

    Raises:
        ConfigurationError: The factory lacks one of ``own``, or rejects a value.
    """
    check_names(factory, own, what)
    parameters = inspect.signature(factory).parameters
    arguments = {k: v for k, v in offered.items() if k in parameters} | own
    try:
        return factory(**arguments)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"{what}: {error}") from None
