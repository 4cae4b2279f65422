"""Exports a model, or that of a checkpoint, to files that other programs read."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np

from kbtrain.checkpoint import validated_json
from kbtrain.checkpoint.distributed import KERAS_LAYOUT
from kbtrain.checkpoint.formats import adapters, safetensors_file
from kbtrain.checkpoint.storage.block_index import files_with_blocks
from kbtrain.checkpoint.storage.dtypes import NATIVE
from kbtrain.checkpoint.storage.faults import reading
from kbtrain.checkpoint.storage.folder_reader import read_checkpoint
from kbtrain.checkpoint.storage.hdf5_files import (
    DeferredErrorFile,
    open_for_reading,
    open_for_writing,
)
from kbtrain.checkpoint.storage.manifest import open_verified, read_manifest
from kbtrain.errors import (
    CheckpointDamagedError,
    CheckpointError,
    ConfigurationError,
    concise,
    first_lines,
)
from kbtrain.utils.files.addresses import check_local
from kbtrain.utils.files.output_files import writing
from kbtrain.utils.packages.tensorflow_import import not_imported

if TYPE_CHECKING:
    import keras

_OWN = ("arrays", "index")


@concise
def export(
    source: str | os.PathLike[str] | keras.Model,
    target: str | os.PathLike[str],
    format: str | None = None,
    *,
    modules: Sequence[str] = (),
    **options: Any,
) -> Path:
    """Write a model to a file or folder that other programs read, complete or not at all.

    | format | the target | what reads it |
    |---|---|---|
    | `keras` | `.keras` | `keras.saving.load_model` |
    | `weights` | `.weights.h5` | `model.load_weights` |
    | `safetensors` | `.safetensors` | `kbtrain.load_weights`, safetensors; named by variable path |
    | `adapters` | `.safetensors`, `.weights.h5` | `kbtrain.load_adapters`, of a model with LoRA |
    | `onnx` | `.onnx` | ONNX Runtime |
    | `litert` | `.tflite` | LiteRT (TensorFlow Lite) |
    | `saved_model` | a folder | TensorFlow, TensorFlow Serving |
    | `transformers` | a folder | `from_pretrained` of Transformers |

    Of a checkpoint, `weights` has the weights in training and all others those used for evaluation.
    The adapters of a model with LoRA are added to the kernels, except in `adapters`.

    Args:
        source: A model, or the folder of a checkpoint.
        target: The file or folder.
        format: The format; by default that of the target's ending.
        modules: For a checkpoint: modules to import first, which register the model's own classes.
        **options: Arguments of ``keras.Model.export`` for `onnx`, `litert` and `saved_model`, such
            as ``input_signature``.

    Returns:
        The target.

    Raises:
        ConfigurationError: The format is unknown, does not fit the target, or cannot be written on
            this backend or without a package.
        CheckpointError: The checkpoint is damaged, or lacks data that the file needs.
        OutputError: The target cannot be written.

    Example:
        >>> import keras
        >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
        >>> export(model, "model.weights.h5").name
        'model.weights.h5'
    """
    check_local("target", target)
    target = Path(target)
    format = _format_of(target, format)
    if options and format not in ("onnx", "litert", "saved_model"):
        raise ConfigurationError(
            f"The format {format!r} takes no options. Received: {', '.join(options)}"
        )
    if isinstance(source, str | os.PathLike):
        check_local("source", source)
        path = Path(source)
        if _of_checkpoint(path, target, format):
            return target
        _import(modules)
        source = rebuild_model(path)
    _of_model(source, target, format, options)
    return target


ENDINGS = {
    "keras": (".keras",),
    "weights": (".weights.h5",),
    "safetensors": (".safetensors",),
    "adapters": (".safetensors", ".weights.h5"),
    "onnx": (".onnx",),
    "litert": (".tflite",),
    "saved_model": (),
    "transformers": (),
}
"""Formats, and the endings of their files; those without are folders."""


def _format_of(target: Path, format: str | None) -> str:
    """The format of a target.

    Raises:
        ConfigurationError: It is unknown, or the target has another ending.
    """
    if format is None:
        fitting = [f for f, endings in ENDINGS.items() if target.name.endswith(endings or "/")]
        if not fitting:
            raise ConfigurationError(
                "The file to write must end in .keras, .weights.h5, .safetensors, .onnx or "
                ".tflite; for a folder, name the format: 'saved_model' or 'transformers'. "
                f"Received: {target}"
            )
        return fitting[0]
    if format not in ENDINGS:
        raise ConfigurationError(
            f"format must be one of {', '.join(ENDINGS)}. Received: {format!r}"
        )
    endings = ENDINGS[format]
    if endings and not target.name.endswith(endings):
        raise ConfigurationError(
            f"A file of the format {format!r} ends in {' or '.join(endings)}. Received: {target}"
        )
    return format


def _of_checkpoint(path: Path, target: Path, format: str) -> bool:
    """Write what needs no model; returns whether that was possible."""
    about = None
    if "frozen_base.json" in read_manifest(path).files:
        about = read_checkpoint(path).documents["frozen_base"]
    if format == "adapters":
        if about is None:
            raise ConfigurationError(
                f"{path} is not of a run with kbtrain.enable_lora: choose another format."
            )
        adapters.write_adapters(target, read_checkpoint(path).arrays["model"], about)
    elif about is not None:
        raise ConfigurationError(
            f"{path} holds LoRA adapters and not the frozen weights. Export the adapters "
            "(format='adapters', --format adapters); or, in Python, build the model with its "
            "pretrained weights, kbtrain.load_adapters(model, checkpoint), and export the model."
        )
    elif format == "weights":
        with writing(target) as temporary:
            _export_weights(path, temporary)
    else:
        return False
    return True


def _of_model(model: Any, target: Path, format: str, options: dict[str, Any]) -> None:
    # Not at the top of the file: they load a framework.
    from kbtrain import backends
    from kbtrain.checkpoint.divided_state import check_whole
    from kbtrain.checkpoint.formats import deployment, keras_file
    from kbtrain.checkpoint.run_state import gather_model
    from kbtrain.model.build import check_model

    check_model(model)
    if not model.built:
        raise ConfigurationError(
            f"The model {model.name!r} has no variables yet. Build it first: call it on a batch, "
            "or give it a keras.Input as its first layer."
        )
    check_whole(backends.load(), model)
    if format == "adapters":
        adapters.save_adapters(model, target)
    elif format == "keras":
        keras_file.save_keras_file(model, target)
    elif format == "weights":
        with writing(target) as temporary:
            model.save_weights(temporary)
    elif format == "safetensors":
        with writing(target) as temporary:
            arrays = gather_model(keras_file.without_adapters(model))
            safetensors_file.write(temporary, arrays, {"format": "kbtrain"})
    elif format == "transformers":
        deployment.write_transformers(keras_file.without_adapters(model), target)
    else:
        deployment.write_serving(keras_file.without_adapters(model), target, format, options)


def rebuild_model(path: Path) -> keras.Model:
    """Build the model of a checkpoint from its saved configuration, and load its weights.

    Raises:
        CheckpointError: The checkpoint has no model configuration, or Keras cannot build the model.
    """
    import keras  # not at the top of the file: it loads a framework

    from kbtrain.checkpoint.variables import restore_model_arrays

    checkpoint = read_checkpoint(path)
    config = checkpoint.documents.get("model_config")
    if config is None:
        raise CheckpointError(
            f"{path} has no model_config.json: the model's class could not describe itself "
            "(get_config), or the checkpoint is of format 1. Build the model in Python and load "
            "the weights with kbtrain.load_weights(model, path)."
        )
    try:
        with not_imported():
            model = keras.saving.deserialize_keras_object(config)
    except Exception as error:
        raise CheckpointError(
            f"Keras cannot build the model of {path}: {first_lines(error)} If it uses custom "
            "classes, register them with keras.saving.register_keras_serializable and name the "
            "module with --import."
        ) from error
    if not isinstance(model, keras.Model):
        raise CheckpointError(
            f"model_config.json of {path} does not describe a model. Received: "
            f"{type(model).__name__}."
        )
    restore_model_arrays(model, checkpoint.arrays)
    return model


def _export_weights(path: Path, target: Path) -> None:
    """Copy only the entries that Keras reads, from all files of the model."""
    copied, manifest = 0, read_manifest(path)
    in_blocks = files_with_blocks(manifest.arrays)
    with DeferredErrorFile(target) as written:
        with open_for_writing(written) as new:
            for name, entry in manifest.files.items():
                if entry.group != "model" or name in in_blocks:
                    continue
                with (
                    open_verified(path, name, entry) as file,
                    reading(path / name, name),
                    _readable(path, name),
                    open_for_reading(file) as old,
                ):
                    copied += _merge_trees(old, new)
            if "model" in manifest.arrays:
                copied += _add_divided(path, new)
        written.sync()
    if not copied:
        raise CheckpointError(
            f"{path} has no weights in Keras' own layout: it has format 1, or a layer could not be "
            "saved. Export it as .keras, or load it with kbtrain.load_weights(model, path) and "
            "save the model's weights."
        )


def _add_divided(path: Path, new: h5py.File) -> int:
    """Add the arrays that are stored in blocks, one at a time, where Keras looks for them."""
    checkpoint = read_checkpoint(path, lazy=True)
    if KERAS_LAYOUT not in checkpoint.documents:
        return 0

    def add() -> int:
        places = checkpoint.documents[KERAS_LAYOUT].get("model", {})
        for place, name in places.items():
            array = np.asarray(checkpoint.arrays["model"][name])
            native = array if array.dtype in NATIVE else array.astype("float32")
            new.create_dataset(place, data=native)
        return len(places)

    return validated_json.attempt(checkpoint, KERAS_LAYOUT, add)


@contextmanager
def _readable(path: Path, name: str) -> Iterator[None]:
    """Report a file as damaged if its checksum is right but kbtrain cannot have written it."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, RecursionError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # from the operating system, not from libhdf5
        raise CheckpointDamagedError(
            f"The checkpoint {path} is damaged: {name} is not as kbtrain wrote it "
            f"({type(error).__name__}: {first_lines(error)})."
        ) from None


def _merge_trees(old: Any, new: Any, top: bool = True) -> int:
    """Copy the tree of ``old`` into ``new``, which may already hold part of it.

    Raises:
        ValueError: A link points outside the file.
    """
    copied = 0
    for name in old:
        if top and name in _OWN:
            continue
        if not isinstance(old.get(name, getlink=True), h5py.HardLink):
            raise ValueError(f"{name!r} is a link to somewhere else")
        if isinstance(old[name], h5py.Group):
            copied += _merge_trees(old[name], new.require_group(name), top=False)
        else:
            old.copy(name, new)
            copied += 1
    return copied


def _import(modules: Sequence[str]) -> None:
    for name in modules:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ConfigurationError(
                f"--import {name}: {error}. Give a module that can be imported from here."
            ) from None
