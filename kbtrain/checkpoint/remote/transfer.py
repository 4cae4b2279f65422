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
import os
from contextlib import suppress
from pathlib import Path

from kbtrain.checkpoint.remote.files import RemoteFiles
from kbtrain.checkpoint.storage.manifest import (
    ARRAYS_SUFFIX,
    MANIFEST_NAME,
    Manifest,
    parse_manifest,
    read_manifest,
)
from kbtrain.errors import CheckpointDamagedError, CheckpointError, CheckpointFormatError
from kbtrain.utils.files.filesystem import FileEntry

logger = logging.getLogger("kbtrain")

UPLOADING = ".kbtrain-uploading"
"""In a folder that is being uploaded or deleted: the run, which may remove what is left of it."""


def upload(files: RemoteFiles, folder: Path, name: str, anew: bool = False) -> Manifest:
    """Upload a checkpoint; it is there complete, or not at all.

    Args:
        files: Where to.
        folder: The checkpoint, complete.
        name: Its name there. A checkpoint of that name is replaced, unless it is this one.
        anew: Whether to replace it even so, as it is known to be damaged.

    Returns:
        Its manifest.

    Raises:
        CheckpointDamagedError: It is damaged.
        CheckpointError: What has that name there was not written by kbtrain, or by a newer one; its
            cause is a ``FileExistsError``.
        OSError: It could not be uploaded, and is not there.
    """
    manifest = read_manifest(folder)
    data = (folder / MANIFEST_NAME).read_bytes()
    former = committed(files, name)
    if not anew and former == data:
        there = files.sizes(name)
        if all(there.get(path) == entry.size for path, entry in manifest.all_files):
            return manifest  # the process ended before it knew
    _check_place(files, name, former)
    files.write(f"{name}/{UPLOADING}", (manifest.run or "").encode())
    files.remove(f"{name}/{MANIFEST_NAME}")
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
    for path in there.keys() - dict(manifest.all_files).keys() - {UPLOADING}:
        files.remove(f"{name}/{path}")  # of the checkpoint that was replaced
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


def _check_place(files: RemoteFiles, name: str, data: bytes | None) -> None:
    """Check that an upload would replace nothing but a checkpoint, or what is left of one.

    Args:
        files: The address.
        name: The checkpoint.
        data: The manifest there, from ``committed``.
    """
    why = ""
    try:
        if data is not None:
            parse_manifest(data, f"{files.address}/{name}")
            return
    except CheckpointFormatError as error:
        why = f"{error} "
    except CheckpointDamagedError:
        if any(path.endswith(ARRAYS_SUFFIX) for path in files.sizes(name)):
            return
    if not why:
        found = sorted(files.sizes(name))
        if not found or UPLOADING in found:
            return
        why = f"It holds {', '.join(found[:8])} and no intact {MANIFEST_NAME}. "
    raise CheckpointError(
        f"Could not upload {name} to {files.address}: a folder has that name, and this kbtrain "
        f"must not replace it. {why}It was left unchanged; move it elsewhere, or choose another "
        "output_dir."
    ) from FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), f"{files.address}/{name}")


def remove(files: RemoteFiles, name: str, run: str) -> None:
    """Delete a checkpoint, or what is left of one: first what makes it one.

    Args:
        files: The address.
        name: The checkpoint, which the caller knows to be of this run.
        run: The run, which can tell what is left if this ends early.

    Raises:
        OSError: It is not deleted, or not all of it.
    """
    files.write(f"{name}/{UPLOADING}", run.encode())
    files.remove(f"{name}/{MANIFEST_NAME}")
    for path in files.sizes(name):
        if path != UPLOADING:  # which goes last
            files.remove(f"{name}/{path}")
    files.remove_folder(name)


def left_by(files: RemoteFiles, name: str) -> str | None:
    """The run that has not completed an upload or a deletion; None if that is not known.

    Raises:
        OSError: It cannot be read now.
    """
    try:
        return files.read(f"{name}/{UPLOADING}").decode(errors="replace")
    except FileNotFoundError:
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
