"""What a run shows while it runs: on a terminal, in a notebook, or as lines in a log file."""

from kbtrain.display.callbacks import PrinterCallback, ProgressCallback, make_display
from kbtrain.display.view import Evaluation, View

__all__ = ["Evaluation", "PrinterCallback", "ProgressCallback", "View", "make_display"]
