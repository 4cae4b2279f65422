"""Optimizers and schedules by name, from the entry points of every installed distribution.

A package offers an optimizer by an entry point in the group ``kbtrain.optimizers`` and a schedule
by one in ``kbtrain.schedules``; this package registers its own in the same way.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import keras

OPTIMIZERS = "kbtrain.optimizers"
SCHEDULES = "kbtrain.schedules"
REFUSED = ".refused"
"""Suffix of a group with known but unsupported names; their entry points load the reason."""

_COUNTS = ("num_warmup_steps", "num_training_steps")


def names() -> list[str]:
    """The names that `get` takes, sorted.

    Returns:
        Names of all installed optimizers. Nothing is imported to list them.

    Example:
        >>> import optim
        >>> "adamw" in optim.names()
        True
    """
    return sorted(_entries(OPTIMIZERS))


def scheduler_names() -> list[str]:
    """The names that `get_scheduler` takes, sorted.

    Returns:
        Names of all installed schedules. Nothing is imported to list them.

    Example:
        >>> import optim
        >>> "cosine" in optim.scheduler_names()
        True
    """
    return sorted(_entries(SCHEDULES))


def get(name: str, /, **kwargs: Any) -> keras.optimizers.Optimizer:
    """Make an optimizer by name.

    Args:
        name: One of `names`.
        **kwargs: Arguments of the optimizer.

    Returns:
        A Keras optimizer.

    Raises:
        ValueError: If the name is unknown or offered by two distributions, or an argument is
            wrong.
        ImportError: If the package that offers the name cannot be imported.
        TypeError: If what it offers is not an optimizer.

    Example:
        >>> import optim
        >>> optim.get("adamw", learning_rate=1e-4, beta_2=0.95).beta_2
        0.95
    """
    optimizer = load(OPTIMIZERS, name)(**kwargs)
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise TypeError(
            f"The entry point {name!r} of the group {OPTIMIZERS!r} must make a Keras optimizer. "
            f"Received: {type(optimizer).__name__}"
        )
    return optimizer


def get_scheduler(
    name: str,
    learning_rate: float,
    num_warmup_steps: int | None = None,
    num_training_steps: int | None = None,
    scheduler_specific_kwargs: dict[str, Any] | None = None,
) -> keras.optimizers.schedules.LearningRateSchedule:
    """Make a learning-rate schedule by name.

    A schedule gets those of the two counts that it has arguments for (``constant`` takes none), so
    one call fits every name. A specific argument that the schedule does not have is an error.

    Args:
        name: One of `scheduler_names`.
        learning_rate: The base learning rate.
        num_warmup_steps: Number of updates of the warm-up.
        num_training_steps: Number of updates of the whole training.
        scheduler_specific_kwargs: Further arguments of the schedule.

    Returns:
        A function of the number of updates done so far, or a metric-driven schedule
        (`optim.schedules.metric_driven`).

    Raises:
        ValueError: If the name is unknown or offered by two distributions, a count or an argument
            that the schedule needs is missing, or an argument is wrong.
        ImportError: If the package that offers the name cannot be imported.
        TypeError: If what it offers is not a schedule, or the specific arguments no dictionary.

    Example:
        >>> import optim
        >>> schedule = optim.get_scheduler("linear", 1.0, num_warmup_steps=0, num_training_steps=4)
        >>> [float(schedule(step)) for step in range(5)]
        [1.0, 0.75, 0.5, 0.25, 0.0]
    """
    factory = load(SCHEDULES, name)
    parameters = inspect.signature(factory).parameters
    offered = {"num_warmup_steps": num_warmup_steps, "num_training_steps": num_training_steps}
    counts = {key: offered[key] for key in _COUNTS if key in parameters}
    for key in [key for key, value in counts.items() if value is None]:
        if parameters[key].default is inspect.Parameter.empty:
            raise ValueError(f"The schedule {name!r} needs `{key}`. Received: {key}=None")
        del counts[key]
    if not isinstance(scheduler_specific_kwargs, Mapping | None):
        raise TypeError(
            "`scheduler_specific_kwargs` must be a dictionary. Received: "
            f"scheduler_specific_kwargs={scheduler_specific_kwargs!r}"
        )
    specific = dict(scheduler_specific_kwargs or {})
    _check_specific(name, parameters, specific)
    schedule = factory(learning_rate=learning_rate, **counts, **specific)
    of_the_step = isinstance(schedule, keras.optimizers.schedules.LearningRateSchedule)
    if not of_the_step and not hasattr(schedule, "on_metric"):
        raise TypeError(
            f"The entry point {name!r} of the group {SCHEDULES!r} must make a Keras learning-rate "
            f"schedule. Received: {type(schedule).__name__}"
        )
    return schedule


def _check_specific(name: str, parameters: Any, specific: dict[str, Any]) -> None:
    taken = ("learning_rate", *_COUNTS)
    any_name = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    usable = [
        key
        for key, parameter in parameters.items()
        if key not in taken and parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    unusable = sorted(
        key for key in specific if key in taken or (key not in usable and not any_name)
    )
    if unusable:
        expected = ", ".join(usable) or "none"
        raise ValueError(
            f"The schedule {name!r} does not take these scheduler_specific_kwargs: "
            f"{', '.join(unusable)}. It takes: {expected}. "
            f"Received: scheduler_specific_kwargs={specific!r}"
        )
    missing = [
        key
        for key in usable
        if key not in specific
        and parameters[key].default is inspect.Parameter.empty
        and parameters[key].kind is not inspect.Parameter.VAR_POSITIONAL
    ]
    if missing:
        raise ValueError(
            f"The schedule {name!r} needs `{missing[0]}` among its scheduler_specific_kwargs. "
            f"Received: scheduler_specific_kwargs={specific!r}"
        )


def load(group: str, name: str) -> Any:
    """Import the object that an entry point names.

    Args:
        group: `OPTIMIZERS` or `SCHEDULES`.
        name: The entry point's name.

    Returns:
        The object, usually a class.

    Raises:
        ValueError: If the name is unknown, or offered by two distributions.
        ImportError: If importing it fails, whatever the reason; the cause is chained.
    """
    name = str(getattr(name, "value", name))
    entries = _entries(group)
    if name not in entries:
        _raise_if_unsupported(group, name)
        known = sorted(entries)
        close = difflib.get_close_matches(name.lower(), known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"No installed package offers {name!r} in the group {group!r}.{hint} "
            f"Known: {', '.join(known) or 'nothing (is the package installed?)'}. "
            f"Received: name={name!r}"
        )
    candidates = entries[name]
    if len(candidates) > 1:
        offers = " and ".join(f"{_owner(entry)} ({entry.value})" for entry in candidates)
        raise ValueError(
            f"The name {name!r} in the group {group!r} is offered by more than one package: "
            f"{offers}. Uninstall one of them, or import the class itself."
        )
    try:
        return candidates[0].load()
    except Exception as error:
        raise ImportError(
            f"{name!r} in the group {group!r} is offered by {_owner(candidates[0])} as "
            f"{candidates[0].value!r}, but importing that failed: {type(error).__name__}: {error}"
        ) from error


def _raise_if_unsupported(group: str, name: str) -> None:
    """Raise with the reason, if a package has registered one for not offering this name."""
    for entry in _entries(group + REFUSED).get(name, []):
        raise ValueError(f"{name!r} is not supported: {entry.load()} Received: name={name!r}")


def _entries(group: str) -> dict[str, list[metadata.EntryPoint]]:
    """Name -> the different offers of it (a search path may list the same one twice)."""
    entries: dict[str, dict[tuple[str, str], metadata.EntryPoint]] = {}
    owners: dict[int, str] = {}  # read once: a distribution parses its metadata for its name
    for entry in metadata.entry_points(group=group):
        if id(entry.dist) not in owners:
            owners[id(entry.dist)] = _owner(entry)
        owner = owners[id(entry.dist)]
        entries.setdefault(entry.name, {}).setdefault((owner, entry.value), entry)
    return {name: list(offers.values()) for name, offers in entries.items()}


def _owner(entry: metadata.EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else "an unknown distribution"
