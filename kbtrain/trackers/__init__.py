"""Where logs go besides the screen: one callback per ``report_to`` name."""

from __future__ import annotations

from collections.abc import Callable

from kbtrain.callbacks import TrainerCallback
from kbtrain.errors import ConfigurationError
from kbtrain.trackers.json_lines import JsonLinesCallback

TRACKERS: dict[str, Callable[[], TrainerCallback]] = {"json": JsonLinesCallback}

__all__ = ["TRACKERS", "JsonLinesCallback", "make_trackers"]


def make_trackers(names: tuple[str, ...] | list[str]) -> list[TrainerCallback]:
    """The callbacks for the names of ``report_to``.

    Raises:
        ConfigurationError: A name that is not known; the message lists those that are.
    """
    unknown = [name for name in names if name not in TRACKERS]
    if unknown:
        raise ConfigurationError(
            f"report_to: {unknown[0]!r} is not a tracker of this version. "
            f"Known: {', '.join(sorted(TRACKERS))}, or 'none'."
        )
    return [TRACKERS[name]() for name in names]
