"""Models for programs that serve them: SavedModel, ONNX, LiteRT, and Transformers' own files.

Keras and KerasHub do the work. What they can do depends on the backend and on the installed
packages, and they say so when they are asked.
"""

from __future__ import annotations

import contextlib
import io
import os
import secrets
import shutil
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import keras

from kbtrain.errors import ConfigurationError, OutputError
from kbtrain.model.forward import inputs_of
from kbtrain.utils.files.output_files import explained, writing

KERAS_FORMATS = {"saved_model": "tf_saved_model", "onnx": "onnx", "litert": "litert"}
"""Our names of formats -> those of ``keras.Model.export``."""


def write_serving(model: keras.Model, target: Path, format: str, options: dict[str, Any]) -> None:
    """Write a model with ``keras.Model.export``, complete or not at all.

    Args:
        model: A built model.
        target: The file; for ``saved_model`` a folder that does not exist or is empty.
        format: A key of ``KERAS_FORMATS``.
        options: Further arguments of ``keras.Model.export``.

    Raises:
        ConfigurationError: Keras cannot write it on this backend, or a package is missing.
        OutputError: The place cannot be written to.
    """

    def write(place: Path) -> None:
        if (inputs := inputs_of(model)) is not None:
            model(inputs)  # symbolically: Keras exports no model that was never called
        model.export(str(place), format=KERAS_FORMATS[format], verbose=False, **options)

    where = writing_folder(target) if format == "saved_model" else writing(target)
    with where as place:
        _attempt(format, lambda: write(place))


def write_transformers(model: keras.Model, target: Path) -> None:
    """Write the folder that ``from_pretrained`` of Transformers reads, by KerasHub's converter.

    Args:
        model: A backbone or a causal language model of KerasHub.
        target: A folder that does not exist or is empty.

    Raises:
        ConfigurationError: KerasHub has no converter for the model, or a package is missing.
        OutputError: The folder cannot be written to.
    """
    convert = getattr(model, "export_to_transformers", None)
    if convert is None:
        raise ConfigurationError(
            "Names of Transformers are known for models of KerasHub that have a method "
            f"export_to_transformers. Received: {type(model).__name__}. Choose the format "
            "'safetensors', which has the variables' own names."
        )
    with writing_folder(target) as place:
        _attempt("transformers", lambda: convert(str(place)))


def _attempt(format: str, action: Callable[[], None]) -> None:
    backend = keras.config.backend()
    said = io.StringIO()  # converters print graphs
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(said):
            warnings.simplefilter("ignore")  # of converters, about their own code
            action()
    except ImportError as error:
        raise ConfigurationError(
            f"Exporting as {format} on {backend} needs a package that is not installed: "
            f"{_sentence(error)}{_advice(format, backend, True)}"
        ) from error
    except (OSError, MemoryError, OutputError):
        raise
    except Exception as error:  # converters raise all kinds of errors
        raise ConfigurationError(
            f"This model cannot be exported as {format} on {backend}: {type(error).__name__}: "
            f"{_sentence(error)}{_advice(format, backend, False)}"
        ) from error


def _advice(format: str, backend: str, missing: bool) -> str:
    """What to do about a failed export, after its error.

    Args:
        format: The format.
        backend: The backend in use.
        missing: Whether the error is that of a package that cannot be imported.
    """
    if format in ("saved_model", "litert") and backend != "tensorflow":
        return f" {_ON_TENSORFLOW}"
    packages = ("onnx", *_CONVERTERS.get(backend, ()))
    if format == "onnx" and backend in _CONVERTERS and not all(map(find_spec, packages)):
        return " Install what it needs: pip install 'kbtrain[onnx]'."
    if format == "transformers":
        return " Install what it needs: pip install 'kbtrain[safetensors]'." if missing else ""
    shapes = (
        "Shapes of fixed sizes may help: input_signature=[keras.InputSpec(shape=..., dtype=...)]."
    )
    if missing:
        return ""
    return f" {shapes}" if backend == "tensorflow" else f" {shapes} {_ON_TENSORFLOW}"


_CONVERTERS = {"torch": ("onnxscript",), "tensorflow": ("tf2onnx",)}
"""What Keras needs besides ``onnx``, all in the extra of that name; JAX's is not on that list."""

_ON_TENSORFLOW = (
    "TensorFlow can write it: run the same command with KERAS_BACKEND=tensorflow, from a "
    "checkpoint or a .keras file."
)


def _sentence(error: Exception) -> str:
    """Its first line, with a full stop."""
    line = _first_line(error)
    return line if line.endswith((".", "!", "?")) else f"{line}."


def _first_line(error: Exception) -> str:
    """Of errors of converters, whose other lines are graphs."""
    return f"{str(error).strip().partition(chr(10))[0]:.300}"


@contextlib.contextmanager
def writing_folder(target: Path) -> Iterator[Path]:
    """Write a folder beside its place, and rename it at the end.

    Args:
        target: The folder; it must not exist, or be empty.

    Yields:
        A temporary folder.

    Raises:
        OutputError: ``target`` has contents, or cannot be written.
    """
    with explained(target):
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise OutputError(
                f"{target} exists and is not an empty folder. Choose a new folder, or delete it."
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        name = f".tmp-{os.getpid()}-{secrets.token_hex(4)}-{target.name}"
        temporary = target.with_name(name)
        try:
            temporary.mkdir()
            yield temporary
            if target.exists():
                target.rmdir()
            os.replace(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
