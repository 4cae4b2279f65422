"""Reading one checkpoint folder: everything is verified before a value of it is used."""

import io
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kbtrain.checkpoint import disk
from kbtrain.checkpoint.format import parse_json, read_verified_arrays, read_verified_outline
from kbtrain.checkpoint.manifest import (
    DOCUMENT_SUFFIX,
    MANIFEST_NAME,
    Manifest,
    check_size,
    open_verified,
    read_manifest,
)
from kbtrain.checkpoint.places import ArrayOutline
from kbtrain.errors import CheckpointDamagedError, CheckpointError, CheckpointNotFoundError


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory, verified.

    Attributes:
        path: The folder it came from.
        step: Optimizer updates done when it was taken.
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
    """Read a checkpoint, verifying sizes and checksums of all its files on the way.

    Raises:
        CheckpointNotFoundError: If there is no such folder.
        CheckpointDamagedError: If a file is missing, truncated or altered.
        CheckpointError: If it has a newer format, or is another program's.
    """
    manifest = _manifest_of(path)
    arrays: dict[str, dict[str, np.ndarray]] = {}
    documents: dict[str, Any] = {}
    try:
        for name, entry in manifest.files.items():
            with open_verified(path, name, entry) as file:
                if entry.group is not None:
                    _add_shard(arrays.setdefault(entry.group, {}), file, name)
                else:
                    documents[_stem(name)] = parse_json(name, file.read())
        for name, entry in manifest.other_files.items():
            with open_verified(path, name, entry):
                pass
    except (CheckpointDamagedError, OSError) as error:
        raise _damaged_checkpoint(path, str(error)) from error
    return Checkpoint(path, manifest.step, arrays, documents, manifest)


def _add_shard(arrays: dict[str, np.ndarray], file: io.FileIO, name: str) -> None:
    for array_name, array in read_verified_arrays(file, name).items():
        if array_name in arrays:
            raise CheckpointDamagedError(f"{name}: {array_name!r} is in another file as well")
        arrays[array_name] = array


def _stem(name: str) -> str:
    return name.removesuffix(DOCUMENT_SUFFIX)


@dataclass(frozen=True)
class CheckpointOutline:
    """What a checkpoint holds, without the values of its arrays.

    Attributes:
        path: The folder.
        step: Optimizer updates done when it was taken.
        format_version: Version of its format.
        info: What its writer noted: backend, package versions, ...
        size: Bytes of all its files that the manifest knows.
        state: ``trainer_state.json``, empty if there is none.
        progress: ``progress.json``, empty if there is none.
        arrays: Group -> its arrays; empty if they were not asked for.
        other_files: Path -> bytes of the files that are neither arrays nor documents.
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
    """Read what a checkpoint holds; every file that is looked into is verified first.

    Args:
        path: The checkpoint's folder.
        arrays: Whether to list the arrays, which reads all files once; without, only the manifest
            and two small documents are read, and of the other files the size is compared.

    Raises:
        CheckpointNotFoundError: If there is no such folder.
        CheckpointDamagedError: If what was looked at is missing, truncated or altered.
        CheckpointError: If it has a newer format, or is another program's.
    """
    manifest = _manifest_of(path)
    documents: dict[str, Any] = {"trainer_state": {}, "progress": {}}
    found: dict[str, list[ArrayOutline]] = {}
    try:
        for name, entry in manifest.files.items():
            if entry.group is not None and arrays:
                with open_verified(path, name, entry) as file:
                    found.setdefault(entry.group, []).extend(read_verified_outline(file, name))
            elif entry.group is None and _stem(name) in documents:
                with open_verified(path, name, entry) as file:
                    documents[_stem(name)] = parse_json(name, file.read())
            else:
                check_size(path, name, entry)
        for name, entry in manifest.other_files.items():
            check_size(path, name, entry)
    except (CheckpointDamagedError, OSError) as error:
        raise _damaged_checkpoint(path, str(error)) from error
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
    """A document is whatever its writer made it; here only mappings are of use."""
    return value if isinstance(value, dict) else {}


def find_problems(path: Path) -> list[str]:
    """Return what is wrong with a checkpoint, in words; an empty list says it is intact."""
    try:
        manifest = _manifest_of(path)
    except CheckpointError as error:
        return [str(error)]
    problems = []
    for name, entry in manifest.all_files:
        try:
            with open_verified(path, name, entry):
                pass
        except CheckpointError as error:
            problems.append(str(error))
    return problems


def _manifest_of(path: Path) -> Manifest:
    """Read and check the manifest of a checkpoint folder; errors name the checkpoint."""
    if not os.path.lexists(path):
        raise CheckpointNotFoundError(f"There is no checkpoint {path}.")
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a checkpoint: expected a folder. Received: a file")
    try:
        manifest = read_manifest(path)
    except CheckpointDamagedError as error:
        raise _damaged_checkpoint(path, f"{error} (found: {_contents(path)})") from error
    named = disk.parse_checkpoint_name(path.name)
    if named is not None and named != manifest.step:
        raise _damaged_checkpoint(path, f"{MANIFEST_NAME} says it is of step {manifest.step}")
    return manifest


def _contents(path: Path) -> str:
    try:
        return ", ".join(disk.entries(path)[:8]) or "nothing"
    except OSError as error:
        return str(error.strerror)


def _damaged_checkpoint(path: Path, problem: str) -> CheckpointDamagedError:
    return CheckpointDamagedError(
        f"The checkpoint {path} is damaged: {problem.rstrip('.')}. It cannot be used; resume from "
        "another one (resume_from_checkpoint=True takes the newest intact one)."
    )
