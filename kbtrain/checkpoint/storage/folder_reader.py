"""Reads one checkpoint folder; everything is verified before a value of it is used."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kbtrain.checkpoint.storage.array_index import ArrayOutline, has_trailer
from kbtrain.checkpoint.storage.faults import exists, is_folder, names_in, reading
from kbtrain.checkpoint.storage.format import (
    parse_json,
    read_verified_arrays,
    read_verified_outline,
)
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
from kbtrain.utils import filesystem


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory, verified.

    Attributes:
        path: The folder it came from.
        step: Optimizer updates done when it was saved.
        arrays: Group (``"model"``, ``"optimizer"``, ...) -> variable name -> array.
        documents: Document (``"trainer_state"``, ...) -> its JSON value.
        manifest: Format version, file sizes and checksums, and the writer's ``info``.
    """

    path: Path
    step: int
    arrays: dict[str, dict[str, np.ndarray]]
    documents: dict[str, Any]
    manifest: Manifest


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint and verify sizes and checksums of all its files.

    Raises:
        CheckpointNotFoundError: If there is no such folder.
        CheckpointDamagedError: If a file is missing, truncated or altered.
        CheckpointFormatError: If it has a newer format, or belongs to another program.
        CheckpointUnreadableError: If it cannot be read now.
    """
    manifest = manifest_of(path)
    arrays: dict[str, dict[str, np.ndarray]] = {}
    documents: dict[str, Any] = {}
    with _naming(path):
        for name, entry in manifest.files.items():
            with reading(path / name, name), open_verified(path, name, entry) as file:
                if entry.group is not None:
                    _add_shard(arrays.setdefault(entry.group, {}), file, name)
                else:
                    documents[_stem(name)] = parse_json(name, file.read())
        for name, entry in manifest.other_files.items():
            with open_verified(path, name, entry):
                pass
    return Checkpoint(path, manifest.step, arrays, documents, manifest)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Add the checkpoint's path to errors about damaged files."""
    try:
        yield
    except CheckpointDamagedError as error:
        raise _damaged_checkpoint(path, str(error)) from error


def _add_shard(arrays: dict[str, np.ndarray], file: io.FileIO, name: str) -> None:
    for array_name, array in read_verified_arrays(file, name).items():
        if array_name in arrays:
            raise CheckpointDamagedError(f"{name}: {array_name!r} is in another file as well")
        arrays[array_name] = array


def _stem(name: str) -> str:
    return name.removesuffix(DOCUMENT_SUFFIX)


@dataclass(frozen=True)
class CheckpointOutline:
    """The contents of a checkpoint, without the values of its arrays.

    Attributes:
        path: The folder.
        step: Optimizer updates done when it was saved.
        format_version: Version of its format.
        info: Recorded by its writer: backend, package versions, ...
        size: Total bytes of the files listed in the manifest.
        state: ``trainer_state.json``, empty if there is none.
        progress: ``progress.json``, empty if there is none.
        arrays: Group -> its arrays; empty if they were not requested.
        other_files: Path -> size of each file that is neither arrays nor a document.
    """

    path: Path
    step: int
    format_version: int
    info: Mapping[str, Any]
    size: int
    state: Mapping[str, Any]
    progress: Mapping[str, Any]
    arrays: Mapping[str, list[ArrayOutline]]
    other_files: Mapping[str, int]


def read_outline(path: Path, arrays: bool = True) -> CheckpointOutline:
    """Read the outline of a checkpoint; every file that is opened is verified first.

    Args:
        path: The checkpoint's folder.
        arrays: Whether to list the arrays, which reads all files once. If False, only the manifest
            and two small documents are read, and the sizes of the other files are compared.

    Raises:
        CheckpointNotFoundError: If there is no such folder.
        CheckpointDamagedError: If a file that was checked is missing, truncated or altered.
        CheckpointFormatError: If it has a newer format, or belongs to another program.
        CheckpointUnreadableError: If it cannot be read now.
    """
    manifest = manifest_of(path)
    documents: dict[str, Any] = {"trainer_state": {}, "progress": {}}
    found: dict[str, list[ArrayOutline]] = {}
    with _naming(path):
        for name, entry in manifest.files.items():
            document = entry.group is None and _stem(name) in documents
            if not document and not (arrays and entry.group is not None):
                check_size(path, name, entry)
                continue
            with reading(path / name, name), open_verified(path, name, entry) as file:
                if document:
                    documents[_stem(name)] = parse_json(name, file.read())
                else:
                    outlines = read_verified_outline(file, name)
                    found.setdefault(str(entry.group), []).extend(outlines)
        for name, entry in manifest.other_files.items():
            check_size(path, name, entry)
    state, progress = (_mapping(documents[name]) for name in ("trainer_state", "progress"))
    size = sum(entry.size for _, entry in manifest.all_files)
    others = {name: entry.size for name, entry in manifest.other_files.items()}
    return CheckpointOutline(
        path=path,
        step=manifest.step,
        format_version=manifest.format_version,
        info=manifest.info,
        size=size,
        state=state,
        progress=progress,
        arrays=found,
        other_files=others,
    )


def _mapping(value: Any) -> Mapping[str, Any]:
    """The document if it is a mapping, else an empty one: an outline must not fail here."""
    return value if isinstance(value, dict) else {}


def find_problems(path: Path) -> list[str]:
    """Return descriptions of what is wrong with a checkpoint; an empty list if it is intact.

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
    problems = []
    for name, entry in manifest.all_files:
        try:
            with open_verified(path, name, entry):
                pass
        except CheckpointDamagedError as error:
            problems.append(str(error))
    return problems


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
