"""Models that come as presets of KerasHub, with their own preparation of the data."""

from __future__ import annotations

import dataclasses
from typing import Any

import keras
import numpy as np

from kbtrain.cli.train.data import Data, successors
from kbtrain.cli.train.settings import Settings
from kbtrain.errors import ConfigurationError, first_lines
from kbtrain.utils.packages.optional_imports import require

PLACE = ("model", "preset")


def from_preset(settings: Settings, data: Data) -> keras.Model:
    """The model of a preset for the task, and the data as its preprocessor makes them.

    Args:
        settings: The settings.
        data: Texts with labels, images, or a plain text; its sets are replaced.

    Raises:
        ConfigurationError: The preset cannot be loaded, or is not for these data.
    """
    if data.kind == "features":
        raise settings.error(
            PLACE,
            "is for texts, whose column data.text names, folders of images, or a plain text. Any "
            "other model of KerasHub comes from a function of yours, model.function.",
        )
    hub = require("keras_hub", "keras-hub", "A preset")
    of_text = _plain_text if data.task == "language_modeling" else _texts
    build = _images if data.kind == "images" else of_text
    try:
        task = build(hub, settings, data)
    except ConfigurationError:
        raise
    except (ValueError, ImportError, OSError, TypeError) as problem:
        raise settings.error(PLACE, f"{settings.model.preset}: {first_lines(problem)}") from None
    data.preset, data.preprocessor = task, task.preprocessor
    # A task comes compiled, with an optimizer that would override the arguments.
    return keras.Model(task.input, task.output)


def _loaded(kind: Any, settings: Settings, **more: Any) -> Any:
    arguments = settings.model.arguments or {}
    return kind.from_preset(str(settings.model.preset), **more, **arguments)


def _texts(hub: Any, settings: Settings, data: Data) -> Any:
    """A classifier; its preprocessor makes tokens of the texts, once."""
    task = _loaded(hub.models.TextClassifier, settings, num_classes=data.outputs)
    if "length" in settings.get("data"):
        task.preprocessor.sequence_length = settings.data.length
    for name, (texts, labels) in data.sets.items():
        x = task.preprocessor(texts.tolist())
        data.sets[name] = ({n: np.asarray(part) for n, part in x.items()}, labels)
    data.kind = "tokens"
    return task


def _plain_text(hub: Any, settings: Settings, data: Data) -> Any:
    """A causal language model; each sample is followed by the one that begins where it ends."""
    task = _loaded(hub.models.CausalLM, settings)
    (length,) = data.shape
    for name, text in data.sets.items():
        ids = np.asarray(task.preprocessor.tokenizer(text), "int32").reshape(-1)
        where = name if getattr(settings.data, name, None) else "eval_fraction"
        x, y = successors(settings, where, ids, length, "tokens")
        data.sets[name] = ({"token_ids": x, "padding_mask": np.ones_like(x)}, y)
    data.kind, data.outputs = "tokens", int(task.output.shape[-1])
    data.tokens = data.outputs
    return task


def _images(hub: Any, settings: Settings, data: Data) -> Any:
    """A classifier; each image is scaled as its converter says, in the process that reads it."""
    task = _loaded(hub.models.ImageClassifier, settings, num_classes=data.outputs)
    size, wanted = data.shape[:2], tuple(task.input.shape[1:3])
    if any(side not in (None, given) for side, given in zip(wanted, size, strict=True)):
        raise settings.error(
            ("data", "image_size"), f"must be {list(wanted)} for this preset. Received: {[*size]}."
        )
    converter = task.preprocessor.image_converter
    if type(converter).call is not hub.layers.ImageConverter.call:
        raise settings.error(PLACE, "prepares images in a way of its own: use model.function.")
    converter.image_size = size
    for images in data.sets.values():
        images.prepare = Scaling(converter.scale, converter.offset)
    data.prepared_by = f"pixels x {_shown(converter.scale, 1)} + {_shown(converter.offset, 0)}"
    return task


@dataclasses.dataclass(frozen=True)
class Scaling:
    """Pixels from 0 to 255, scaled and shifted, each channel by its own number or all by one."""

    scale: Any
    offset: Any

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """The scaled pixels, float32."""
        scaled = pixels if self.scale is None else pixels * np.asarray(self.scale, "float32")
        return scaled if self.offset is None else scaled + np.asarray(self.offset, "float32")


def _shown(numbers: Any, neutral: int) -> str:
    return str(neutral if numbers is None else np.asarray(numbers).tolist())
