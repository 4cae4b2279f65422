"""The events of a run, and the callbacks that handle them."""

from kbtrain.callbacks.base import EarlyStoppingCallback, TrainerCallback
from kbtrain.callbacks.progress_bar import PrinterCallback, ProgressCallback
from kbtrain.callbacks.state import TrainerControl, TrainerState

__all__ = [
    "EarlyStoppingCallback",
    "PrinterCallback",
    "ProgressCallback",
    "TrainerCallback",
    "TrainerControl",
    "TrainerState",
]
