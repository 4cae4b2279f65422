"""Arrays as a ``.safetensors`` file, under their own names (extra ``safetensors``)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from kbtrain.checkpoint.storage.faults import reading
from kbtrain.errors import CheckpointDamagedError, CheckpointError, CheckpointFormatError
from kbtrain.utils.packages.optional_imports import require

SUFFIX = ".safetensors"

ORDER = "kbtrain.order"
"""Text of the header with the names in their order, which the format does not keep. Automatic names
(``dense_9``, ``dense_10``) are matched by it."""


def write(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write named arrays.

    Args:
        path: The file.
        arrays: Name -> array.
        metadata: Texts for the file's header.

    Raises:
        CheckpointError: An array is of a type that the format lacks.
        ConfigurationError: The package is missing.
        OSError: The file cannot be written.
    """
    library = require("safetensors.numpy", "safetensors", f"Writing {path.suffix} files")
    # The library writes memory as it lies there; a scalar must be an array.
    plain = {name: np.ascontiguousarray(a).reshape(np.shape(a)) for name, a in arrays.items()}
    try:
        texts = {**metadata, ORDER: json.dumps(list(plain))}
        library.save_file(plain, path, metadata=texts)
    except OSError:
        raise
    except Exception as error:  # SafetensorError derives from Exception alone
        if "I/O error" in str(error):
            raise OSError(str(error)) from error
        raise CheckpointError(f"Could not write {path.name}: {error}.") from error


def read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read all arrays, and the texts of the header.

    Raises:
        CheckpointDamagedError: The file is missing or damaged.
        CheckpointFormatError: An array is of a type that NumPy lacks.
        CheckpointUnreadableError: It cannot be read now.
        ConfigurationError: The package is missing.
    """
    library = require("safetensors", "safetensors", f"Reading {SUFFIX} files")
    with reading(path, path.name):
        try:
            # Not mapped into memory: an I/O error must not become a SIGBUS.
            with library.safe_open(path, framework="np", backend="pread") as file:
                metadata = dict(file.metadata() or {})
                order = metadata.pop(ORDER, "")
                return _in_order(file.get_tensors(), order), metadata
        except library.SafetensorError as error:
            raise CheckpointDamagedError(
                f"{path} is not a readable safetensors file ({error})."
            ) from error
        except (AttributeError, TypeError) as error:  # a float8, of which NumPy knows nothing
            raise CheckpointFormatError(
                f"{path} has an array of a type that NumPy lacks: {error}."
            ) from error


def _in_order(arrays: Mapping[str, np.ndarray], text: str) -> dict[str, np.ndarray]:
    """The arrays as they were written; those of other programs by name, with numbers as numbers."""
    try:
        order = json.loads(text)
    except ValueError:
        order = None
    if not isinstance(order, list) or {*map(str, order)} != arrays.keys():
        order = sorted(arrays, key=_by_numbers)
    return {str(name): arrays[str(name)] for name in order}


def _by_numbers(name: str) -> list[tuple[str, int]]:
    return [(text, int(number or -1)) for text, number in re.findall(r"(\D*)(\d*)", name)]
