"""Copies one checkpoint to an address or from it.

Object stores cannot rename, so the manifest, which has the size and checksum of every file and of
itself, is what makes a checkpoint exist: it is uploaded when all files are there with the sizes it
lists, and deleted before any of them. A reader that finds none, or one whose checksum is wrong,
finds no checkpoint.
"""

from __future__ import annotations

import errno
import hashlib
import logging
from contextlib import suppress
from pathlib import Path

from kbtrain.checkpoint.remote.files import RemoteFiles
from kbtrain.checkpoint.storage.manifest import (
    MANIFEST_NAME,
    Manifest,
    parse_manifest,
    read_manifest,
)
from kbtrain.errors import CheckpointDamagedError
from kbtrain.utils.filesystem import FileEntry

logger = logging.getLogger("kbtrain")

UPLOADING = ".kbtrain-uploading"
"""Beside the files of an upload in progress: the run, which may remove what is left of it."""


def upload(files: RemoteFiles, folder: Path, name: str, anew: bool = False) -> Manifest:
    """Upload a checkpoint; it is there complete, or not at all.

    Args:
        files: Where to.
        folder: The checkpoint, complete.
        name: Its name there. A checkpoint of that name is deleted first, unless it is this one.
        anew: Whether to delete it even so, as it is known to be damaged.

    Returns:
        Its manifest.

    Raises:
        CheckpointDamagedError: It is damaged.
        OSError: It could not be uploaded, and is not there.
    """
    manifest = read_manifest(folder)
    data = (folder / MANIFEST_NAME).read_bytes()
    if not anew and committed(files, name) == data:
        there = files.sizes(name)
        if all(there.get(path) == entry.size for path, entry in manifest.all_files):
            return manifest  # the process ended before it knew
    remove(files, name)
    files.write(f"{name}/{UPLOADING}", (manifest.run or "").encode())
    missing = dict(manifest.all_files)
    for _ in range(files.tries):
        for path in missing:
            files.put(folder / path, f"{name}/{path}")
        there = files.sizes(name)
        missing = {p: e for p, e in missing.items() if there.get(p) != e.size}
        if not missing:
            break
    else:
        raise OSError(errno.EIO, f"{', '.join(missing)} did not arrive whole")
    for _ in range(files.tries):
        files.write(f"{name}/{MANIFEST_NAME}", data)
        if committed(files, name) == data:
            break
    else:
        raise OSError(errno.EIO, f"{MANIFEST_NAME} did not arrive whole")
    with suppress(OSError):
        files.remove(f"{name}/{UPLOADING}")
    return manifest


def committed(files: RemoteFiles, name: str) -> bytes | None:
    """The manifest of a checkpoint, unverified; None if there is none.

    Raises:
        OSError: It cannot be read now.
    """
    try:
        return files.read(f"{name}/{MANIFEST_NAME}")
    except FileNotFoundError:
        return None


def remove(files: RemoteFiles, name: str) -> None:
    """Delete a checkpoint: first what makes it one.

    Raises:
        OSError: It is not deleted, or not all of it.
    """
    files.remove(f"{name}/{MANIFEST_NAME}")
    files.remove_folder(name)


def left_by(files: RemoteFiles, name: str) -> str | None:
    """The run whose upload ended before it was complete; None if that is not known."""
    try:
        return files.read(f"{name}/{UPLOADING}").decode(errors="replace")
    except OSError:
        return None


def download(files: RemoteFiles, name: str, data: bytes, folder: Path) -> Manifest:
    """Download a checkpoint into an empty folder, and verify it.

    Args:
        files: Where from.
        name: The checkpoint.
        data: Its manifest, from ``committed``.
        folder: Where to.

    Raises:
        CheckpointDamagedError: A file is missing, or not what the manifest says.
        CheckpointFormatError: It was written by a newer kbtrain or by another program.
        OSError: It cannot be read now.
    """
    (folder / MANIFEST_NAME).write_bytes(data)
    try:
        manifest = parse_manifest(data, f"{files.address}/{name}")  # its paths lead nowhere else
        for path, entry in manifest.all_files:
            _fetch(files, f"{name}/{path}", folder / path, entry)
    except CheckpointDamagedError as error:
        raise CheckpointDamagedError(
            f"The checkpoint {files.address}/{name} is damaged: {error}."
        ) from None
    return manifest


def _fetch(files: RemoteFiles, path: str, target: Path, entry: FileEntry) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(2):  # the connection may have been to blame
        try:
            files.get(path, target)
        except FileNotFoundError:
            raise CheckpointDamagedError(f"{target.name}: missing") from None
        with target.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = target.stat().st_size
        if (size, digest) == (entry.size, entry.sha256):
            return
        target.unlink()
    raise CheckpointDamagedError(
        f"{target.name}: {size} bytes instead of {entry.size}"
        if size != entry.size
        else f"{target.name}: contents altered (SHA-256 differs)"
    )
