"""Which methods of ``keras.Model`` a model overrides."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras

from kbtrain.errors import ConfigurationError

logger = logging.getLogger("kbtrain")


def overrides(model: Any, name: str) -> bool:
    """Whether a model overrides a method of ``keras.Model``."""
    own = getattr(model, name, None)
    return own is not None and getattr(own, "__func__", own) is not getattr(keras.Model, name)


class MethodOverrides(NamedTuple):
    """Which methods of ``keras.Model`` a model overrides and the Trainer uses.

    Attributes:
        compute_loss, compute_metrics: Called in the Trainer's step.
        train_step: Replaces that step.
        test_step: Replaces the evaluation step.
        predict_step: Replaces the call of the model in predictions.
    """

    compute_loss: bool = False
    compute_metrics: bool = False
    train_step: bool = False
    test_step: bool = False
    predict_step: bool = False

    @classmethod
    def of(cls, model: Any, replaced: Sequence[str]) -> MethodOverrides:
        """The overridden methods of a model.

        Args:
            model: The model.
            replaced: Arguments and overrides of the Trainer that replace the model's loss.

        Raises:
            ConfigurationError: The model has a custom ``train_step`` or ``test_step``, and the
                Trainer was given a loss.
        """
        found = {name: overrides(model, name) for name in cls._fields}
        if not replaced:
            return cls(**found)
        kind = type(model).__name__
        if replaced[0] == "loss" and (found["train_step"] or found["test_step"]):
            name = "train_step" if found["train_step"] else "test_step"
            raise ConfigurationError(
                f"The model has a custom {name} ({kind}.{name}), which computes the loss, but "
                "loss=... was passed to the Trainer. Compile the model with that loss if its "
                f"{name} uses it, or override Trainer.compute_loss, which replaces it."
            )
        # An overridden Trainer.compute_loss may call the base method, which calls the model's.
        names = ["train_step", "test_step"]
        names += ["compute_loss"] if replaced[-1] != "Trainer.compute_loss" else []
        unused = [name for name in names if found[name]]
        if unused:
            logger.warning(
                "%s is not used because the Trainer has its own loss (%s).",
                " and ".join(f"{kind}.{name}" for name in unused),
                replaced[0],
            )
        return cls(**(found | dict.fromkeys(unused, False)))
