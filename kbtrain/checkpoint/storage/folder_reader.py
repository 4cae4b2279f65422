"""Reads one checkpoint folder; everything is verified before a value of it is used."""

from __future__ import annotations

import io
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kbtrain.checkpoint.storage.array_index import (
    ArrayLocation,
    ArrayOutline,
    find_arrays,
    has_trailer,
    read_array,
)
from kbtrain.checkpoint.storage.block_index import ArrayEntry, StoredBlock, files_with_blocks
from kbtrain.checkpoint.storage.blocks import StoredArray, damaged_blocks
from kbtrain.checkpoint.storage.dtypes import DTYPES
from kbtrain.checkpoint.storage.faults import exists, is_folder, names_in, reading
from kbtrain.checkpoint.storage.format import parse_json, read_verified_arrays
from kbtrain.checkpoint.storage.manifest import (
    ARRAYS_SUFFIX,
    DOCUMENT_SUFFIX,
    MANIFEST_NAME,
    Manifest,
    check_size,
    open_verified,
    read_manifest,
)
from kbtrain.errors import (
    CheckpointDamagedError,
    CheckpointError,
    CheckpointFormatError,
    CheckpointNotFoundError,
    CheckpointUnreadableError,
)
from kbtrain.utils.files import filesystem


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint, verified, in memory or with its arrays on the disk.

    Attributes:
        path: The folder it came from.
        step: Optimizer updates done when it was saved.
        arrays: Group (``"model"``, ``"optimizer"``, ...) -> variable name -> array; a
            ``StoredArray`` if it was opened with ``lazy``.
        documents: Document (``"trainer_state"``, ...) -> its JSON value.
        manifest: Format version, file sizes and checksums, and the writer's ``info``.
    """

    path: Path
    step: int
    arrays: dict[str, dict[str, Any]]
    documents: dict[str, Any]
    manifest: Manifest


def everything(index: int) -> bool:
    """Verify all files of blocks."""
    return True


def nothing(index: int) -> bool:
    """Verify no files of blocks, as the processes have just done so together."""
    return False


def read_checkpoint(
    path: Path, lazy: bool = False, verifies: Callable[[int], bool] = everything
) -> Checkpoint:
    """Read a checkpoint and verify sizes and checksums of all its files.

    Args:
        path: The checkpoint's folder.
        lazy: Whether to leave the arrays on the disk, as ``StoredArray``. Blocks that several
            processes wrote are then verified again when they are read.
        verifies: With ``lazy``: which files of blocks to verify, by their index; of the others,
            which other processes verify, only the size is compared.

    Raises:
        CheckpointNotFoundError: If there is no such folder.
        CheckpointDamagedError: If a file is missing, truncated or altered.
        CheckpointFormatError: If it has a newer format, or belongs to another program.
        CheckpointUnreadableError: If it cannot be read now.
    """
    manifest = manifest_of(path)
    arrays: dict[str, dict[str, Any]] = {}
    documents: dict[str, Any] = {}
    in_blocks = files_with_blocks(manifest.arrays)
    divided = _Divided(path, manifest, lazy)
    with naming(path):
        for name, entry in manifest.files.items():
            if name in in_blocks and lazy and not verifies(list(in_blocks).index(name)):
                check_size(path, name, entry)
                continue
            with (
                naming_blocks(path, name, in_blocks),
                reading(path / name, name),
                open_verified(path, name, entry) as file,
            ):
                if entry.group is None:
                    documents[stem(name)] = parse_json(name, file.read())
                elif name in in_blocks:
                    divided.add(name, file, in_blocks[name])
                else:
                    group = arrays.setdefault(entry.group, {})
                    _add_shard(group, _arrays_in(path, name, file, lazy), name)
        for name, entry in manifest.other_files.items():
            with open_verified(path, name, entry):
                pass
        divided.complete(arrays)
    return Checkpoint(path, manifest.step, arrays, documents, manifest)


def verify_blocks(path: Path, verifies: Callable[[int], bool]) -> None:
    """Verify some of the files that hold blocks, for the other processes.

    Args:
        path: The checkpoint's folder.
        verifies: Which of them, by their index.

    Raises:
        CheckpointError: As for ``read_checkpoint``.
    """
    manifest = manifest_of(path)
    in_blocks = files_with_blocks(manifest.arrays)
    with naming(path):
        for index, name in enumerate(in_blocks):
            if verifies(index):
                with (
                    naming_blocks(path, name, in_blocks),
                    open_verified(path, name, manifest.files[name]),
                ):
                    pass


def _arrays_in(path: Path, name: str, file: io.FileIO, lazy: bool) -> Mapping[str, Any]:
    """The arrays of a verified file."""
    places = find_arrays(file, name) if lazy else None
    if places is None:
        return read_verified_arrays(file, name)
    return {
        outline.name: StoredArray(
            path,
            outline,
            [StoredBlock(name, (0,) * len(outline.shape), outline.shape, offset, 0)],
            verify=False,
        )
        for outline, offset in places
    }


class _Divided:
    """Puts arrays together from blocks in several files."""

    def __init__(self, path: Path, manifest: Manifest, lazy: bool) -> None:
        self._path, self._manifest, self._lazy = path, manifest, lazy
        self._arrays: dict[tuple[str, str], np.ndarray] = {}

    def add(
        self, name: str, file: io.FileIO, blocks: Iterable[tuple[ArrayEntry, StoredBlock]]
    ) -> None:
        """Copy the blocks of a verified file to their places."""
        if self._lazy:
            return
        group = str(self._manifest.files[name].group)
        for (array, dtype, shape), block in ((entry.outline, block) for entry, block in blocks):
            place = ArrayLocation(ArrayOutline(array, dtype, block.shape), block.offset)
            values = read_array(file, place, name)
            # Blocks make up their array and fit into their files, so it is no larger than those.
            if (group, array) not in self._arrays:
                self._arrays[group, array] = np.empty(shape, DTYPES[dtype])
            ends = zip(block.start, block.shape, strict=True)
            where = tuple(slice(start, start + size) for start, size in ends)
            self._arrays[group, array][where] = values

    def complete(self, arrays: dict[str, dict[str, Any]]) -> None:
        """Add the arrays to those in the files of the groups, in the order of the manifest."""
        for group, entries in self._manifest.arrays.items():
            whole, arrays[group] = arrays.get(group, {}), {}
            for outline, blocks in entries:
                if blocks is None:
                    found = whole.pop(outline.name, None)
                    if found is None or tuple(found.shape) != outline.shape:
                        raise CheckpointDamagedError(
                            f"{MANIFEST_NAME}: no file of {group!r} holds {outline.name!r} of "
                            f"shape {outline.shape}"
                        )
                elif self._lazy:
                    found = StoredArray(self._path, outline, blocks)
                else:
                    empty = np.empty(outline.shape, DTYPES[outline.dtype])
                    found = self._arrays.pop((group, outline.name), empty)
                arrays[group][outline.name] = found
            if whole:
                raise CheckpointDamagedError(
                    f"{MANIFEST_NAME}: {next(iter(whole))!r} of {group!r} is not listed"
                )


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the checkpoint's path to errors about damaged files."""
    try:
        yield
    except CheckpointDamagedError as error:
        raise _damaged_checkpoint(path, str(error)) from error


@contextmanager
def naming_blocks(
    path: Path, name: str, blocks: Mapping[str, Collection[tuple[ArrayEntry, StoredBlock]]]
) -> Iterator[None]:
    """Add the blocks that are damaged to an error about a damaged file.

    Args:
        path: The checkpoint's folder.
        name: The file.
        blocks: File -> its blocks.
    """
    try:
        yield
    except CheckpointDamagedError as error:
        if found := damaged_blocks(path, blocks.get(name, ())):
            raise CheckpointDamagedError(f"{error}; damaged: {', '.join(found)}") from error
        raise


def _add_shard(arrays: dict[str, Any], found: Mapping[str, Any], name: str) -> None:
    for array_name, array in found.items():
        if array_name in arrays:
            raise CheckpointDamagedError(f"{name}: {array_name!r} is in another file as well")
        arrays[array_name] = array


def stem(name: str) -> str:
    """The name of a document, of which the file is ``{name}.json``."""
    return name.removesuffix(DOCUMENT_SUFFIX)


def find_problems(path: Path, files: Collection[str] | None = None) -> list[str]:
    """Return descriptions of what is wrong with a checkpoint; an empty list if it is intact.

    Args:
        path: The checkpoint's folder.
        files: The files to read; of others the sizes are compared. All by default.

    Raises:
        CheckpointFormatError: If it has a newer format, or belongs to another program.
        CheckpointUnreadableError: If a file cannot be read now.
    """
    try:
        manifest = manifest_of(path)
    except (CheckpointFormatError, CheckpointUnreadableError):
        raise
    except CheckpointError as error:
        return [str(error)]
    problems, in_blocks = [], files_with_blocks(manifest.arrays)
    for name, entry in manifest.all_files:
        try:
            if files is not None and name not in files:
                check_size(path, name, entry)
                continue
            with naming_blocks(path, name, in_blocks), open_verified(path, name, entry):
                pass
        except CheckpointDamagedError as error:
            problems.append(str(error))
    return problems


def read_back(folder: Path, final: Path, files: Collection[str] | None = None) -> None:
    """Verify the files on the disk before the folder becomes a checkpoint.

    Args:
        folder: Where they are.
        final: The checkpoint that it becomes, for the message.
        files: The files to read; of others the sizes are compared. All by default.

    Raises:
        CheckpointDamagedError: A file is not what was written.
    """
    if problems := find_problems(folder, files):
        raise CheckpointDamagedError(
            f"{final} was written and reads back differently: {'; '.join(problems)}. It was "
            "removed; earlier checkpoints are untouched. The disk or the memory of this machine "
            "may be failing: choose another output_dir."
        )


def manifest_of(path: Path) -> Manifest:
    """Read and check the manifest of a checkpoint folder; errors name the checkpoint.

    Raises:
        CheckpointNotFoundError: If there is no such folder.
        CheckpointDamagedError: If the manifest is missing or altered.
        CheckpointFormatError: If the checkpoint has a newer format, or belongs to another program.
        CheckpointUnreadableError: If it cannot be read now.
    """
    if not exists(path):
        raise CheckpointNotFoundError(f"There is no checkpoint {path}.")
    if not is_folder(path):
        raise CheckpointError(f"{path} is not a checkpoint: expected a folder. Received: a file")
    try:
        manifest = read_manifest(path)
    except CheckpointFormatError as error:
        raise CheckpointFormatError(f"{path}: {error}") from None
    except CheckpointDamagedError as error:
        names = names_in(path)
        if names and not _has_own_arrays(path, names):
            raise _not_written_by_kbtrain(path, names) from None
        found = ", ".join(names[:8]) or "nothing"
        raise _damaged_checkpoint(path, f"{error} (found: {found})") from error
    named = filesystem.parse_checkpoint_name(path.name)
    if named is not None and named != manifest.step:
        raise _damaged_checkpoint(path, f"{MANIFEST_NAME} says it is of step {manifest.step}")
    return manifest


def _has_own_arrays(path: Path, names: list[str]) -> bool:
    """Whether a folder without an intact manifest holds arrays that kbtrain wrote."""
    files = [name for name in names if name.endswith(ARRAYS_SUFFIX)]
    if files and MANIFEST_NAME in names:
        return True
    for name in files:
        damage = suppress(CheckpointDamagedError)
        with damage, reading(path / name, name), filesystem.open_regular(path / name) as file:
            if has_trailer(file):
                return True
    return False


_TRANSFORMERS = ("model.safetensors", "pytorch_model.bin", "optimizer.pt", "training_args.bin")


def _not_written_by_kbtrain(path: Path, names: list[str]) -> CheckpointFormatError:
    is_transformers = any(name in _TRANSFORMERS for name in names)
    writer = "written by Transformers' Trainer" if is_transformers else "not written by kbtrain"
    return CheckpointFormatError(
        f"The checkpoint {path} was {writer}: it holds {', '.join(names[:8])} and no intact "
        f"{MANIFEST_NAME}. kbtrain cannot resume from it and leaves it unchanged. Choose another "
        "output_dir, move such folders elsewhere, or give the path of a checkpoint of kbtrain."
    )


def _damaged_checkpoint(path: Path, problem: str) -> CheckpointDamagedError:
    return CheckpointDamagedError(
        f"The checkpoint {path} is damaged: {problem.rstrip('.')}. It cannot be used; resume from "
        "another one (resume_from_checkpoint=True takes the newest intact one)."
    )
