"""A model as a ``.keras`` file."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import keras
import numpy as np

from kbtrain.model.lora import has_adapters, lora_of, merge_lora, merged_copy
from kbtrain.utils.files.output_files import writing
from kbtrain.utils.packages import tensorflow_import


def save_keras_file(
    model: keras.Model,
    path: Path,
    values: Sequence[tuple[keras.Variable, np.ndarray]] = (),
) -> None:
    """Write ``model`` as a ``.keras`` file, atomically, with LoRA adapters added to the kernels.

    Args:
        model: The model.
        path: The file.
        values: The values of variables that are divided among processes.
    """
    if lora_of(model) is not None:
        # Keras would add adapters too, but the loaded model would have some that are zero and
        # cannot be trained.
        model, values = merged_copy(model, values), ()
    whole = keras.StatelessScope(list(values)) if values else contextlib.nullcontext()
    with writing(path) as temporary, tensorflow_import.not_imported(), whole:
        model.save(temporary)


def without_adapters(model: keras.Model) -> keras.Model:
    """The model, or if it has LoRA adapters a copy of it without.

    Raises:
        ConfigurationError: It cannot be copied.
    """
    return merge_lora(model) if has_adapters(model) else model
