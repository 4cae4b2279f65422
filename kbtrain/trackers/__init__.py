"""Where logs go besides the screen: one callback per ``report_to`` name.

A package of its own registers a tracker under the entry points ``kbtrain.trackers``: a
``TrainerCallback``, best a ``kbtrain.trackers.base.Tracker``, that is made without arguments.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
from collections.abc import Iterable
from typing import Any

from kbtrain.callbacks.base import TrainerCallback
from kbtrain.errors import ConfigurationError
from kbtrain.optimization import registry

GROUP = "kbtrain.trackers"

TRACKERS: dict[str, tuple[str, str | None]] = {
    "csv": ("csv_table:CsvCallback", None),
    "json": ("json_lines:JsonLinesCallback", None),
    "mlflow": ("mlflow:MlflowCallback", "mlflow"),
    "tensorboard": ("tensorboard:TensorBoardCallback", "tensorboardX"),
    "trackio": ("trackio:TrackioCallback", "trackio"),
    "wandb": ("wandb:WandbCallback", "wandb"),
}
"""kbtrain's own: where the class is, and the package it needs."""


def make_trackers(names: Iterable[str]) -> list[TrainerCallback]:
    """The callbacks for the names of ``report_to``.

    Args:
        names: Names; ``"all"`` stands for every tracker whose package is installed.

    Returns:
        One callback for each, in order.

    Raises:
        ConfigurationError: A name that is not known (the message lists those that are), or a
            package that is missing (it says which extra to install).
    """
    wanted: list[str] = []
    for name in names:
        wanted += _installed() if name == "all" else [name]
    trackers = [_factory(name)() for name in dict.fromkeys(wanted)]
    for tracker in trackers:
        tracker.is_best_effort = True
    return trackers


def _installed() -> list[str]:
    own = [n for n, (_, p) in TRACKERS.items() if p is None or importlib.util.find_spec(p)]
    return [*own, *registry.names(GROUP)]


def _factory(name: str) -> Any:
    others = registry.names(GROUP)
    if name in TRACKERS:
        if name in others:
            raise ConfigurationError(
                f"report_to: a package registers {name!r} under {GROUP!r}, which is the name of a "
                "tracker of kbtrain. Uninstall it, or rename its entry point."
            )
        module, _, attribute = TRACKERS[name][0].partition(":")
        return getattr(importlib.import_module(f"kbtrain.trackers.{module}"), attribute)
    if name not in others:
        known = sorted([*TRACKERS, *others])
        close = difflib.get_close_matches(name.lower(), known, n=1)
        raise ConfigurationError(
            f"report_to: {name!r} is not a known tracker. "
            f"{f'Did you mean {close[0]!r}? ' if close else ''}Known: {', '.join(known)}, 'all' or "
            f"'none'. Others can be registered under the entry points {GROUP!r}, or be given to "
            "the Trainer as callbacks."
        )
    return registry.find(GROUP, name, "report_to")
