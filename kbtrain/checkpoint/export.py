"""Exports the model of a checkpoint to a plain Keras file: ``.keras`` or ``.weights.h5``."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np

from kbtrain.checkpoint import validated_json
from kbtrain.checkpoint.distributed import KERAS_LAYOUT
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
    first_lines,
)
from kbtrain.utils.addresses import check_local
from kbtrain.utils.filesystem import replacing

if TYPE_CHECKING:
    import keras

_OWN = ("arrays", "index")


def export(path: Path, target: Path, modules: Sequence[str] = ()) -> None:
    """Write the model of a checkpoint to a new file, atomically.

    Args:
        path: A checkpoint's folder.
        target: A file ending in ``.weights.h5`` (the training weights, as ``load_weights`` reads
            them) or in ``.keras`` (the whole model, with the weights used for evaluation).
        modules: For ``.keras``: modules to import first, which register the model's own classes.

    Raises:
        ConfigurationError: The file has a different extension, or a module cannot be imported.
        CheckpointError: The checkpoint is damaged, or lacks data that the file needs.
    """
    check_local("target", target)
    weights = target.name.endswith(".weights.h5")
    if not weights and target.suffix != ".keras":
        raise ConfigurationError(
            f"The file to write must end in .keras or .weights.h5. Received: {target}"
        )
    try:
        with replacing(target) as temporary:
            if weights:
                _export_weights(path, temporary)
            else:
                _import(modules)
                rebuild_model(path).save(temporary)
    except CheckpointError:
        raise  # CheckpointNotFoundError is an OSError too
    except OSError as error:
        raise CheckpointError(
            f"Could not write {target}: {error.strerror or error}. Choose another place."
        ) from error


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
