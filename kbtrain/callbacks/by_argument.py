"""The callbacks that arguments ask for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kbtrain.callbacks import time_triggers
from kbtrain.callbacks.base import TrainerCallback
from kbtrain.callbacks.library.profiler import ProfilerCallback

if TYPE_CHECKING:
    from kbtrain.config.training_args import TrainingArguments


def callbacks(args: TrainingArguments) -> list[TrainerCallback]:
    """Those of ``eval_minutes``, ``save_minutes`` and ``profile``."""
    return [*time_triggers.callbacks(args), *([ProfilerCallback()] if args.profile else [])]
