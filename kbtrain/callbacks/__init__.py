"""The events of a run, and the callbacks that handle them."""

from __future__ import annotations

import importlib
from typing import Any

from kbtrain.callbacks.base import EarlyStoppingCallback, TrainerCallback
from kbtrain.callbacks.state import TrainerControl, TrainerState

__all__ = [
    "EarlyStoppingCallback",
    "TrainerCallback",
    "TrainerControl",
    "TrainerState",
]


def __getattr__(name: str) -> Any:
    """What shows a run has moved to ``kbtrain.display``, which imports this package."""
    if name not in ("PrinterCallback", "ProgressCallback"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("kbtrain.display.callbacks"), name)
