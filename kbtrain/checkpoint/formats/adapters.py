"""LoRA adapters as a file of their own: what a checkpoint of such a run has, without the rest."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kbtrain.checkpoint.formats import safetensors_file
from kbtrain.checkpoint.storage.array_writer import write_arrays
from kbtrain.checkpoint.storage.faults import exists
from kbtrain.checkpoint.storage.format import read_arrays
from kbtrain.errors import (
    CheckpointDamagedError,
    CheckpointNotFoundError,
    ConfigurationError,
    concise,
)
from kbtrain.utils.files.addresses import check_local
from kbtrain.utils.files.output_files import writing

if TYPE_CHECKING:
    import keras

ABOUT = "lora.json"
"""What the file says about the adapters: a text of a safetensors header, or an array of bytes."""

_FORMATS = (safetensors_file.SUFFIX, ".weights.h5")


@concise
def save_adapters(model: keras.Model, path: str | os.PathLike[str]) -> Path:
    """Save the adapters of a model, and what else is trained in it, without its frozen weights.

    Args:
        model: A model with which ``enable_lora`` was called.
        path: A file that ends in ``.safetensors`` or ``.weights.h5``.

    Returns:
        The path.

    Raises:
        ConfigurationError: ``enable_lora`` was not called, the file has another ending, or the
            model is divided among processes.
        OutputError: The file cannot be written.
    """
    from kbtrain import backends
    from kbtrain.checkpoint import frozen_base, name_variables, run_state
    from kbtrain.checkpoint.divided_state import check_whole

    check_local("path", path)
    about = frozen_base.document(model, name_variables(run_state.model_variables(model)))
    if about is None:
        raise ConfigurationError(
            f"The model {model.name!r} has no adapters. Call kbtrain.enable_lora first."
        )
    check_whole(backends.load(), model)
    return write_adapters(Path(path), run_state.gather_model(model), about)


def write_adapters(path: Path, arrays: Mapping[str, np.ndarray], about: Any) -> Path:
    """Write the arrays of adapters, and the document about them.

    Raises:
        ConfigurationError: The file has another ending.
        OutputError: It cannot be written.
    """
    if not path.name.endswith(_FORMATS):
        raise ConfigurationError(
            f"Adapters are saved in files that end in {' or '.join(_FORMATS)}. Received: {path}"
        )
    text = json.dumps(about, sort_keys=True)
    with writing(path) as temporary:
        if path.suffix == safetensors_file.SUFFIX:
            safetensors_file.write(temporary, arrays, {"format": "kbtrain", ABOUT: text})
        else:
            temporary.unlink(missing_ok=True)  # it must not exist
            write_arrays(temporary, {**arrays, ABOUT: np.frombuffer(text.encode(), np.uint8)})
    return path


def read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays of a file and the texts of its header.

    Raises:
        CheckpointError: The file is missing, damaged or cannot be read.
        ConfigurationError: The file has another ending.
    """
    if not exists(path):
        raise CheckpointNotFoundError(f"There is no {path}.")
    if path.suffix == safetensors_file.SUFFIX:
        return safetensors_file.read(path)
    if not path.name.endswith(_FORMATS):
        raise ConfigurationError(
            f"Adapters are in files that end in {' or '.join(_FORMATS)}. Received: {path}"
        )
    return read_arrays(path), {}


def parse(
    arrays: dict[str, np.ndarray], texts: Mapping[str, str], path: Path
) -> tuple[dict[str, np.ndarray], Any]:
    """The arrays of a file without the document, and the document; None if it has none.

    Raises:
        CheckpointDamagedError: The document is not JSON.
    """
    rest = {name: array for name, array in arrays.items() if name != ABOUT}
    text = texts.get(ABOUT)
    if text is None and ABOUT in arrays:
        text = arrays[ABOUT].tobytes().decode(errors="replace")
    try:
        about = None if text is None else json.loads(text)
        if about is not None and not isinstance(about, dict):
            raise ValueError("it is not an object")
    except ValueError as error:
        raise CheckpointDamagedError(f"{path} is damaged: {ABOUT}: {error}.") from error
    return rest, about
