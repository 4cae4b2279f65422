"""Presets of KerasHub models: on the Hugging Face Hub (``hf://``) or on Kaggle (``kaggle://``)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kbtrain.config.training_args import TrainingArguments
from kbtrain.errors import ConfigurationError, HubError, first_lines
from kbtrain.utils.machine.processes import current
from kbtrain.utils.packages.optional_imports import require

HUGGING_FACE, KAGGLE = "hf://", "kaggle://"


def is_preset(name: str) -> bool:
    """Whether a repository's name asks for a preset in place of ``model.keras``."""
    return name.startswith((HUGGING_FACE, KAGGLE))


def check_preset(name: str, args: TrainingArguments, model: Any) -> None:
    """Check that a model can be pushed as a preset.

    Raises:
        ConfigurationError: It is no KerasHub model, or a setting does not fit.
    """
    if not callable(getattr(model, "save_to_preset", None)):
        raise ConfigurationError(
            f"hub_model_id={name!r} asks for a KerasHub preset, and {type(model).__name__} has no "
            "save_to_preset. Write hub_model_id='user/name' to push model.keras."
        )
    if current().size > 1:
        raise ConfigurationError(
            f"A preset is pushed by a run of one process. Received: hub_model_id={name!r}, "
            f"{current().size} processes. Write hub_model_id='user/name', or upload the preset "
            "after the run."
        )
    if name.startswith(KAGGLE) and args.push_to_hub and args.hub_strategy != "end":
        raise ConfigurationError(
            "On Kaggle every push makes a new version of the model: set hub_strategy='end'. "
            f"Received: hub_strategy={args.hub_strategy!r}."
        )


class KaggleModel:
    """A variation of a model on Kaggle; every push makes a new version of it.

    Args:
        uri: "kaggle://user/model/keras/variation".

    Raises:
        ConfigurationError: The address is invalid, or a package is missing.
    """

    def __init__(self, uri: str) -> None:
        if not re.fullmatch(rf"{KAGGLE}[\w-]+/[\w-]+/[\w-]+/[\w-]+", uri):
            raise ConfigurationError(
                "A model on Kaggle has the address 'kaggle://user/model/keras/variation'. "
                f"Received: hub_model_id={uri!r}."
            )
        require("kagglehub", "kaggle", f"hub_model_id={uri!r}")
        self._keras_hub = require("keras_hub", "kaggle", f"hub_model_id={uri!r}")
        self.name = uri
        self.created = True

    def create(self) -> None:
        """Kaggle creates a model with its first version."""

    def commit(self, stage: Path, message: str, replacing: Sequence[str] = ()) -> Any:
        """Upload a preset with ``keras_hub.upload_preset``.

        Args:
            stage: A folder with the preset.
            message: Unused, as Kaggle has a number for each version.
            replacing: Unused: a version is uploaded as a whole.

        Raises:
            HubError: It failed.
        """
        try:
            self._keras_hub.upload_preset(self.name, str(stage))
        except Exception as error:  # kagglehub raises errors of several packages
            raise HubError(
                f"Could not upload to {self.name}: {type(error).__name__}: {first_lines(error)}"
            ) from error
