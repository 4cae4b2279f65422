"""Writes the folder of a checkpoint: array files, documents, and the manifest."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from kbtrain.checkpoint.storage.array_writer import write_arrays
from kbtrain.checkpoint.storage.format import write_json
from kbtrain.checkpoint.storage.manifest import (
    DOCUMENT_SUFFIX,
    Manifest,
    arrays_file,
    check_other_files,
    check_stems,
    write_manifest,
)
from kbtrain.utils.files import filesystem

SHARD_BYTES = 4 * 2**30

Files = dict[str, filesystem.FileEntry]


class ExternalLayout(Protocol):
    """Where Keras looks for the arrays of a group (``keras_layout.KerasLayout`` implements it)."""

    @property
    def links(self) -> Mapping[str, str]:
        """HDF5 path -> name of the array."""

    @property
    def values(self) -> Mapping[str, np.ndarray]:
        """HDF5 path -> further data stored there."""


class Contents(NamedTuple):
    """What a checkpoint holds besides blocks of arrays.

    Attributes:
        arrays: Group -> name -> array.
        documents: Name -> JSON value.
        info: Recorded in the manifest.
        places: Group -> where Keras looks for its arrays.
        other_files: Path in the folder -> content.
    """

    arrays: Mapping[str, Mapping[str, Any]]
    documents: Mapping[str, Any]
    info: Mapping[str, Any]
    places: Mapping[str, ExternalLayout]
    other_files: Mapping[str, bytes]

    def check_names(self) -> None:
        """Check the names of array groups, documents and other files.

        Raises:
            CheckpointError: One is not allowed in a checkpoint, or used twice.
        """
        check_stems(self.arrays, self.documents)
        check_other_files(self.other_files, self.documents)


def write_contents(
    folder: Path, step: int, contents: Contents, shard_bytes: int, run: str | None = None
) -> None:
    """Fill an empty folder and flush all files to the disk; the manifest is written last.

    Args:
        folder: The folder, which must exist.
        step: Optimizer updates done.
        contents: What to write.
        shard_bytes: A larger group is split over several files.
        run: Identity of the run that writes.

    Raises:
        CheckpointError: A value cannot be stored.
        OSError: Writing failed.
    """
    files, others = write_files(folder, contents, shard_bytes)
    write_manifest(folder, Manifest(step, files, contents.info, other_files=others, run=run))
    filesystem.fsync_directory(folder)


def write_files(
    folder: Path, contents: Contents, shard_bytes: int, divided: Collection[str] = ()
) -> tuple[Files, Files]:
    """Write all files but the manifest.

    Args:
        folder: As in ``write_contents``.
        contents: As in ``write_contents``.
        shard_bytes: As in ``write_contents``.
        divided: Groups of which some arrays are written as blocks, in other files.

    Returns:
        The files, and those that are neither arrays nor documents.

    Raises:
        CheckpointError: A value cannot be stored.
        OSError: Writing failed.
    """
    files = {}
    for group, values in contents.arrays.items():
        whole, layout = group not in divided, contents.places.get(group)
        parts = _shards(values, shard_bytes)
        shards = {arrays_file(group, n, len(parts), whole): p for n, p in enumerate(parts, 1)}
        first = next(iter(shards))
        for name, shard in shards.items():
            links = layout.links if layout else {}
            extra = layout.values if layout and name == first else {}
            entry = write_arrays(folder / name, shard, links, extra)
            files[name] = entry._replace(group=group)
        if layout and whole and len(shards) > 1:
            name = f"{group}.weights{DOCUMENT_SUFFIX}"
            files[name] = write_json(folder / name, _weight_map(shards, layout))
    for stem, value in contents.documents.items():
        name = stem + DOCUMENT_SUFFIX
        files[name] = write_json(folder / name, value)
    return files, _write_others(folder, contents.other_files)


def _write_others(folder: Path, other_files: Mapping[str, bytes]) -> Files:
    entries = {}
    for path, data in other_files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        entries[path] = filesystem.write_bytes(folder / path, data)
    for below in sorted({p for path in entries for p in Path(path).parents[:-1]}):
        filesystem.fsync_directory(folder / below)
    return entries


def _shards(values: Mapping[str, np.ndarray], limit: int) -> list[dict[str, np.ndarray]]:
    """Split arrays, in their order, into files of at most ``limit`` bytes or one array each."""
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


def _weight_map(
    shards: Mapping[str, Mapping[str, np.ndarray]], places: ExternalLayout
) -> dict[str, Any]:
    """Return the index that tells Keras which file holds a layer: ``model.weights.json``."""
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
