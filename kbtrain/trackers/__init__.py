"""Experiment trackers and log files: one callback per ``report_to`` name.

Other packages can register a tracker under the entry points ``kbtrain.trackers``: a
``TrainerCallback``, preferably a ``kbtrain.trackers.base.Tracker``, created without arguments.
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
    "comet_ml": ("comet_ml:CometCallback", "comet_ml"),
    "csv": ("csv_table:CsvCallback", None),
    "html": ("html:HtmlCallback", None),
    "json": ("json_lines:JsonLinesCallback", None),
    "mlflow": ("mlflow:MlflowCallback", "mlflow"),
    "swanlab": ("swanlab:SwanLabCallback", "swanlab"),
    "tensorboard": ("tensorboard:TensorBoardCallback", "tensorboardX"),
    "trackio": ("trackio:TrackioCallback", "trackio"),
    "wandb": ("wandb:WandbCallback", "wandb"),
}
"""kbtrain's trackers: name -> (module and class, required package)."""


def make_trackers(names: Iterable[str]) -> list[TrainerCallback]:
    """Create the callbacks for the names in ``report_to``.

    Args:
        names: Names; ``"all"`` stands for every tracker whose package is installed.

    Returns:
        One callback for each name, in order.

    Raises:
        ConfigurationError: A name is unknown (the message lists the known ones), or a package is
            missing (the message names the extra to install).
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
                f"report_to: a package registers {name!r} under {GROUP!r}, which is already the "
                "name of a tracker of kbtrain. Uninstall it, or rename its entry point."
            )
        module, _, attribute = TRACKERS[name][0].partition(":")
        return getattr(importlib.import_module(f"kbtrain.trackers.{module}"), attribute)
    if name not in others:
        known = sorted([*TRACKERS, *others])
        close = difflib.get_close_matches(name.lower(), known, n=1)
        raise ConfigurationError(
            f"report_to: {name!r} is not a known tracker. "
            f"{f'Did you mean {close[0]!r}? ' if close else ''}Known: {', '.join(known)}, 'all' or "
            f"'none'. Others can be registered under the entry points {GROUP!r}, or passed to the "
            "Trainer as callbacks."
        )
    return registry.find(GROUP, name, "report_to")
