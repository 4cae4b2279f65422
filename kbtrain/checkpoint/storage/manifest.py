"""The list of a checkpoint's files; it is written last and makes a folder a checkpoint.

The manifest has the size and SHA-256 of every other file and a SHA-256 of its own bytes, so that a
changed byte in any file is detected before its values are used.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kbtrain.checkpoint.storage.array_index import is_count
from kbtrain.checkpoint.storage.block_index import Arrays, dump_arrays, parse_arrays
from kbtrain.checkpoint.storage.faults import reading
from kbtrain.checkpoint.storage.format import dump_json, parse_json
from kbtrain.errors import CheckpointDamagedError, CheckpointError, CheckpointFormatError
from kbtrain.utils.files.filesystem import FileEntry, open_regular, write_bytes

MANIFEST_NAME = "manifest.json"
FORMAT = "kbtrain-checkpoint"
FORMAT_VERSION = 2
SHARDED_FORMAT_VERSION = 3
"""Version of checkpoints with arrays in blocks, which earlier versions of kbtrain cannot read."""
ARRAYS_SUFFIX = ".h5"
DOCUMENT_SUFFIX = ".json"

_MAX_MANIFEST_BYTES = 2**28
_STEM = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}", re.ASCII)
_SHARD = re.compile(
    r".*-[0-9]{5}-of-[0-9]{5}(\.weights)?\.h5|model_[0-9]+\.weights\.h5|model\.weights\.json"
    r"|.*-p[0-9]{5,}\.h5",
    re.ASCII | re.IGNORECASE,
)
_PART = re.compile(r"[^/\\:\x00-\x1f]+")
_RUN = re.compile(r"[0-9a-f]{1,64}", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)
_OWN_CHECKSUM = re.compile(rb'"checksum": "([0-9a-f]{64})"')
_NO_CHECKSUM = b'"checksum": "' + b"0" * 64 + b'"'


@dataclass(frozen=True)
class Manifest:
    """The contents of ``manifest.json``.

    Attributes:
        step: Optimizer updates done when the checkpoint was saved.
        files: File name -> size and checksum.
        info: Recorded by the writer: backend, package versions, ...
        format_version: Version of the checkpoint format.
        other_files: Path in the folder, with ``/`` -> size and checksum of a file that is neither
            arrays nor a document.
        run: Identity of the run that wrote it, inherited on resume; None if it has none.
        arrays: Group -> its arrays, for groups with arrays in blocks; the files of other groups
            have their own lists.
    """

    step: int
    files: Mapping[str, FileEntry]
    info: Mapping[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION
    other_files: Mapping[str, FileEntry] = field(default_factory=dict)
    run: str | None = None
    arrays: Arrays = field(default_factory=dict)

    @property
    def all_files(self) -> list[tuple[str, FileEntry]]:
        """``files`` and ``other_files``."""
        return [*self.files.items(), *self.other_files.items()]


def arrays_file(group: str, shard: int = 1, shards: int = 1, for_keras: bool = True) -> str:
    """Return the name of the file, or of one of several, that holds a group of arrays.

    Args:
        group: The group.
        shard: Number of the file, from 1.
        shards: Number of files.
        for_keras: Whether they hold all that Keras looks for in them.

    Example:
        >>> arrays_file("model"), arrays_file("model", 1, 3), arrays_file("optimizer", 2, 3)
        ('model.weights.h5', 'model_00000.weights.h5', 'optimizer-00002-of-00003.h5')
    """
    if group == "model" and for_keras:  # the names that Keras' load_weights expects
        return f"model_{shard - 1:05d}.weights.h5" if shards > 1 else "model.weights.h5"
    part = f"-{shard:05d}-of-{shards:05d}" if shards > 1 else ""
    return group + part + ARRAYS_SUFFIX


def block_file(group: str, rank: int) -> str:
    """Return the name of the file with the blocks of a group that one process owns.

    Example:
        >>> block_file("optimizer", 1)
        'optimizer-p00001.h5'
    """
    return f"{group}-p{rank:05d}{ARRAYS_SUFFIX}"


def check_stems(arrays: Iterable[str], documents: Iterable[str]) -> None:
    """Check the names of array groups and documents, which become file names.

    Raises:
        CheckpointError: If a name is not a plain file name on every system, is reserved, or differs
            from another one only in case.
    """
    groups = list(arrays)
    names = [arrays_file(group) for group in groups]
    names += [stem + DOCUMENT_SUFFIX for stem in documents]
    for name in names:
        if not is_file_name(name) or _SHARD.fullmatch(name):
            raise CheckpointError(
                "The name of an array group or document must consist of letters, digits, '_', '-' "
                "and '.', not begin with '.' or '-', have 100 characters at most, not be "
                "'manifest' or 'model.weights' and not end like '-00001-of-00002' or '-p00001'. "
                f"Received: {name.rpartition('.')[0]!r}"
            )
    folded = [name.casefold() for name in names]
    if twice := sorted({name for name in names if folded.count(name.casefold()) > 1}):
        raise CheckpointError(
            "Names of array groups and documents must differ in more than case. "
            f"Received: {', '.join(twice)}"
        )


def check_other_files(paths: Iterable[str], documents: Iterable[str]) -> None:
    """Check the paths of files that are neither arrays nor documents.

    Args:
        paths: Relative to the checkpoint's folder, with ``/``.
        documents: Names of the documents beside them.

    Raises:
        CheckpointError: A path is not allowed in a checkpoint, or is reserved for its own files.
    """
    taken = {stem.casefold() + DOCUMENT_SUFFIX for stem in documents} | {MANIFEST_NAME}
    for path in paths:
        first = path.partition("/")[0].casefold()
        own = first in taken or first.endswith((ARRAYS_SUFFIX, ".weights" + DOCUMENT_SUFFIX))
        if own or not is_other_path(path):
            raise CheckpointError(
                "An additional file of a checkpoint must have a plain relative path, with / "
                "between folders, and a name that the checkpoint itself does not use. "
                f"Received: {path!r} beside {', '.join(sorted(taken))} and arrays in *.h5"
            )


def is_other_path(path: str) -> bool:
    """Return whether a file that is neither arrays nor a document may have this path."""
    parts = path.split("/")
    return len(path) <= 1000 and all(_PART.fullmatch(p) and p not in (".", "..") for p in parts)


def is_file_name(name: str) -> bool:
    """Return whether a checkpoint of this format may contain a file of this name."""
    stem, dot, suffix = name.rpartition(".")
    return (
        dot + suffix in (ARRAYS_SUFFIX, DOCUMENT_SUFFIX)
        and _STEM.fullmatch(stem) is not None
        and name.casefold() != MANIFEST_NAME
    )


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``manifest.json`` and flush it to the disk.

    Raises:
        CheckpointError: If ``info`` cannot be written as JSON.
        OSError: If writing fails.
    """
    value = {
        "checksum": "0" * 64,
        "files": _as_json(manifest.files),
        "format": FORMAT,
        "format_version": manifest.format_version,
        "info": manifest.info,
        "step": manifest.step,
    }
    if manifest.other_files:
        value["other_files"] = _as_json(manifest.other_files)
    if manifest.run is not None:
        value["run"] = manifest.run
    if manifest.arrays:
        value["arrays"] = {}
    data = dump_json("manifest", value)
    if manifest.arrays:  # the first key
        data = data.replace(b'"arrays": {}', b'"arrays": ' + dump_arrays(manifest.arrays), 1)
    # Keys are sorted, so the first occurrence is the manifest's own field, whatever is in `info`.
    own = b'"checksum": "' + hashlib.sha256(data).hexdigest().encode() + b'"'
    write_bytes(folder / MANIFEST_NAME, data.replace(_NO_CHECKSUM, own, 1))


def _as_json(files: Mapping[str, FileEntry]) -> dict[str, Any]:
    return {
        name: {"sha256": entry.sha256, "size": entry.size}
        | ({"group": entry.group} if entry.group is not None else {})
        for name, entry in files.items()
    }


def read_manifest(folder: Path) -> Manifest:
    """Read and check ``manifest.json``, but not the files it lists.

    Raises:
        CheckpointDamagedError: If it is missing, altered or inconsistent.
        CheckpointFormatError: If it is intact but has a newer format, or belongs to another
            program.
        CheckpointUnreadableError: If it cannot be read now.
    """
    return parse_manifest(_read_manifest_bytes(folder / MANIFEST_NAME), str(folder))


def parse_manifest(data: bytes, folder: str) -> Manifest:
    """Check the bytes of a ``manifest.json`` and convert them.

    Args:
        data: The bytes.
        folder: Where they are from, for messages.

    Raises:
        CheckpointError: As for ``read_manifest``.
    """
    # The checksum covers bytes, so it works for manifests of any version and any JSON writer.
    match = _OWN_CHECKSUM.search(data)
    value = parse_json(MANIFEST_NAME, data)
    if not isinstance(value, dict):
        raise _damaged_manifest(f"it is a {type(value).__name__}, not a mapping")
    if "checksum" not in value and value.get("format") != FORMAT:
        raise CheckpointFormatError(
            f"{MANIFEST_NAME} in {folder} was not written by kbtrain: expected a field 'format' "
            f"with the value {FORMAT!r}. Received: fields {sorted(value)[:8]}. It is left "
            "unchanged; to train there, move it elsewhere or choose another output_dir."
        )
    blank = data[: match.start()] + _NO_CHECKSUM + data[match.end() :] if match else b""
    if match is None or hashlib.sha256(blank).hexdigest().encode() != match[1]:
        raise _damaged_manifest("its bytes are not those that were written (checksum)")
    return _parse_manifest(value)


@contextmanager
def open_verified(folder: Path, name: str, entry: FileEntry) -> Iterator[io.FileIO]:
    """Open a file of a checkpoint after checking its kind, size and checksum.

    The same open file is hashed and then read by the caller, from its beginning, so the file cannot
    be replaced in between, and the second read comes from the system's cache.

    Raises:
        CheckpointDamagedError: If it is missing or not what the manifest says.
        CheckpointUnreadableError: If it cannot be read now.
    """
    with _open_file(folder, name) as file:
        with reading(folder / name, name):
            size = os.fstat(file.fileno()).st_size
            digest = hashlib.file_digest(file, "sha256").hexdigest() if size == entry.size else ""
            file.seek(0)
        if size != entry.size:
            raise CheckpointDamagedError(f"{name}: {size} bytes instead of {entry.size}")
        if digest != entry.sha256:
            raise CheckpointDamagedError(f"{name}: contents altered (SHA-256 differs)")
        yield file


def check_size(folder: Path, name: str, entry: FileEntry) -> None:
    """Compare kind and size of a file with the manifest, without reading it.

    Raises:
        CheckpointDamagedError: If it is missing, not a regular file, or has a different size.
        CheckpointUnreadableError: If it cannot be opened now.
    """
    with _open_file(folder, name) as file:
        with reading(folder / name, name):
            size = os.fstat(file.fileno()).st_size
        if size != entry.size:
            raise CheckpointDamagedError(f"{name}: {size} bytes instead of {entry.size}")


def _open_file(folder: Path, name: str) -> io.FileIO:
    with reading(folder / name, name):
        for parent in Path(name).parents[:-1]:  # a link there would lead out of the folder
            if stat.S_ISLNK(os.lstat(folder / parent).st_mode):
                raise CheckpointDamagedError(f"{name}: {parent} is a symbolic link")
        return open_regular(folder / name)


def _read_manifest_bytes(path: Path) -> bytes:
    with reading(path, MANIFEST_NAME):
        try:
            with open_regular(path) as file:
                if (size := os.fstat(file.fileno()).st_size) > _MAX_MANIFEST_BYTES:
                    raise _damaged_manifest(f"{size} bytes are more than it can have")
                return file.read()
        except FileNotFoundError as error:
            raise CheckpointDamagedError(
                f"{MANIFEST_NAME}: missing. It is written last: without it the checkpoint is "
                "incomplete"
            ) from error


def _parse_manifest(value: Mapping[str, Any]) -> Manifest:
    """Convert an intact manifest; strict, because any program may have written it."""
    version = value.get("format_version")
    if value.get("format") != FORMAT or not is_count(version) or version == 0:
        raise _damaged_manifest(f"format={value.get('format')!r}, format_version={version!r}")
    if version > SHARDED_FORMAT_VERSION:
        raise CheckpointFormatError(
            f"The checkpoint has format version {version}; this kbtrain reads version "
            f"{SHARDED_FORMAT_VERSION} and older. Update kbtrain to use it. It is left unchanged; "
            "to start over without it, choose another output_dir."
        )
    files, info, step = value.get("files"), value.get("info"), value.get("step")
    others, run = value.get("other_files", {}), value.get("run")
    if run is not None and not (isinstance(run, str) and _RUN.fullmatch(run)):
        raise _damaged_manifest(f"'run' is {run!r}")
    if not is_count(step) or not isinstance(files, dict) or not isinstance(info, dict):
        raise _damaged_manifest("'step', 'files' or 'info' is missing or has a wrong type")
    if not isinstance(others, dict):
        raise _damaged_manifest("'other_files' has a wrong type")
    entries: dict[str, FileEntry] = {}
    for name, entry in files.items():
        if not is_file_name(name):
            raise _damaged_manifest(f"{name!r} cannot be a file of a checkpoint")
        noted = _parse_entry(name, entry)
        entries[name] = noted._replace(group=_group_of(name, entry, version))
    for name in others:
        if not is_other_path(name):
            raise _damaged_manifest(f"{name!r} cannot be a file of a checkpoint")
    noted_others = {name: _parse_entry(name, entry) for name, entry in others.items()}
    try:
        arrays = parse_arrays(value.get("arrays", {}), entries) if version > FORMAT_VERSION else {}
    except ValueError as error:
        raise _damaged_manifest(str(error)) from error
    return Manifest(step, entries, info, version, noted_others, run, arrays)


def _parse_entry(name: str, entry: Any) -> FileEntry:
    size = entry.get("size") if isinstance(entry, dict) else None
    digest = entry.get("sha256") if isinstance(entry, dict) else None
    if not is_count(size) or not isinstance(digest, str) or not _SHA256.fullmatch(digest):
        raise _damaged_manifest(f"the size or checksum of {name!r} is not valid")
    return FileEntry(size, digest)


def _group_of(name: str, entry: Mapping[str, Any], version: int) -> str | None:
    """The array group a file belongs to; None for a document."""
    if not name.endswith(ARRAYS_SUFFIX):
        return None
    group = name.removesuffix(ARRAYS_SUFFIX) if version == 1 else entry.get("group")
    if not isinstance(group, str) or not _STEM.fullmatch(group):
        raise _damaged_manifest(f"the group of {name!r} is not valid")
    return group


def _damaged_manifest(problem: str) -> CheckpointDamagedError:
    return CheckpointDamagedError(f"{MANIFEST_NAME}: {problem}")
