"""What is in the folder of a checkpoint: files of arrays, documents, and the manifest."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from kbtrain.checkpoint import disk
from kbtrain.checkpoint.format import write_json
from kbtrain.checkpoint.manifest import (
    DOCUMENT_SUFFIX,
    Manifest,
    arrays_file,
    write_manifest,
)
from kbtrain.checkpoint.writing import write_arrays

SHARD_BYTES = 4 * 2**30


class Places(Protocol):
    """Where other readers look for the arrays of a group (``layout.KerasLayout`` is one)."""

    @property
    def links(self) -> Mapping[str, str]:
        """HDF5 path -> name of the array."""

    @property
    def values(self) -> Mapping[str, np.ndarray]:
        """HDF5 path -> what is there besides."""


def write_contents(
    folder: Path,
    step: int,
    arrays: Mapping[str, Mapping[str, np.ndarray]],
    documents: Mapping[str, Any],
    info: Mapping[str, Any],
    places: Mapping[str, Places],
    shard_bytes: int,
) -> None:
    """Fill an empty folder: arrays, documents, and the manifest last; all flushed to the disk.

    Args:
        folder: Where to; it exists.
        step: Optimizer updates done.
        arrays: Group -> name -> array.
        documents: Name -> JSON value.
        info: Noted in the manifest.
        places: Group -> where other readers look for its arrays.
        shard_bytes: A group that takes more is spread over several files.

    Raises:
        CheckpointError: Something cannot be stored.
        OSError: The disk refuses.
    """
    files = {}
    for group, values in arrays.items():
        parts = _shards(values, shard_bytes)
        shards = {arrays_file(group, n, len(parts)): part for n, part in enumerate(parts, 1)}
        others, first = places.get(group), next(iter(shards))
        for name, shard in shards.items():
            links = others.links if others else {}
            extra = others.values if others and name == first else {}
            entry = write_arrays(folder / name, shard, links, extra)
            files[name] = entry._replace(group=group)
        if others and len(shards) > 1:
            name = f"{group}.weights{DOCUMENT_SUFFIX}"
            files[name] = write_json(folder / name, _weight_map(shards, others))
    for stem, value in documents.items():
        name = stem + DOCUMENT_SUFFIX
        files[name] = write_json(folder / name, value)
    write_manifest(folder, Manifest(step=step, files=files, info=info))
    disk.fsync_directory(folder)


def _shards(values: Mapping[str, np.ndarray], limit: int) -> list[dict[str, np.ndarray]]:
    """Divide arrays, in their order, into files of at most ``limit`` bytes or one array each."""
    shards: list[dict[str, np.ndarray]] = [{}]
    size = 0
    for name, array in values.items():
        bytes_of_one = np.asarray(array).nbytes
        if shards[-1] and size + bytes_of_one > limit:
            shards.append({})
            size = 0
        shards[-1][name] = array
        size += bytes_of_one
    return shards


def _weight_map(shards: Mapping[str, Mapping[str, np.ndarray]], places: Places) -> dict[str, Any]:
    """Return what Keras reads to find the file of a layer's values: ``model.weights.json``."""
    files_of: dict[str, list[str]] = {}
    found = [
        (place, file)
        for file, arrays in shards.items()
        for place, name in places.links.items()
        if name in arrays
    ]
    for place, file in [*found, *((place, next(iter(shards))) for place in places.values)]:
        files = files_of.setdefault("/" + place.rpartition("/")[0], [])
        if file not in files:
            files.append(file)
    total = sum(np.asarray(array).nbytes for part in shards.values() for array in part.values())
    return {"metadata": {"total_size": total}, "weight_map": files_of}
