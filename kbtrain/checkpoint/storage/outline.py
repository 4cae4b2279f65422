"""What a checkpoint holds, without the values of its arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kbtrain.checkpoint.storage.array_index import ArrayOutline
from kbtrain.checkpoint.storage.block_index import files_with_blocks
from kbtrain.checkpoint.storage.faults import reading
from kbtrain.checkpoint.storage.folder_reader import manifest_of, naming, naming_blocks, stem
from kbtrain.checkpoint.storage.format import parse_json, read_verified_outline
from kbtrain.checkpoint.storage.manifest import check_size, open_verified


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
        blocks: Group -> number of blocks of each array that is stored in blocks.
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
    blocks: Mapping[str, Mapping[str, int]]


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
    in_blocks = files_with_blocks(manifest.arrays)
    with naming(path):
        for name, entry in manifest.files.items():
            document = entry.group is None and stem(name) in documents
            if not document and not (arrays and entry.group is not None):
                check_size(path, name, entry)
                continue
            with (
                naming_blocks(path, name, in_blocks),
                reading(path / name, name),
                open_verified(path, name, entry) as file,
            ):
                if document:
                    documents[stem(name)] = parse_json(name, file.read())
                elif name not in in_blocks:
                    outlines = read_verified_outline(file, name)
                    found.setdefault(str(entry.group), []).extend(outlines)
        for name, entry in manifest.other_files.items():
            check_size(path, name, entry)
    if arrays:
        found |= {g: [entry.outline for entry in listed] for g, listed in manifest.arrays.items()}
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
        blocks={
            group: {e.outline.name: len(e.blocks) for e in listed if e.blocks is not None}
            for group, listed in manifest.arrays.items()
        },
    )


def _mapping(value: Any) -> Mapping[str, Any]:
    """The document if it is a mapping, else an empty one: an outline must not fail here."""
    return value if isinstance(value, dict) else {}
