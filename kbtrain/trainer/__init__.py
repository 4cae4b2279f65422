"""The user interface: ``Trainer``, checks of its arguments, reports and search."""

from kbtrain.trainer.trainer import Trainer

__all__ = ["Trainer"]
