"""Which checkpoint a run resumes from: the requested one, or the newest intact one.

Only checkpoints known to be damaged are skipped. One that cannot be read now, or that this version
of kbtrain cannot read, ends the search with an error: starting over would lose it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

from kbtrain.checkpoint.storage.faults import exists, is_folder, names_in
from kbtrain.checkpoint.storage.folder_reader import Checkpoint, read_checkpoint
from kbtrain.checkpoint.storage.manifest import MANIFEST_NAME
from kbtrain.checkpoint.storage.run_folder import list_checkpoints
from kbtrain.errors import (
    CheckpointDamagedError,
    CheckpointError,
    CheckpointNotFoundError,
    ConfigurationError,
)
from kbtrain.utils.files import filesystem
from kbtrain.utils.files.addresses import check_local

Log = Callable[[str], None]
Read = Callable[[Path], Checkpoint]


def newest_intact(
    directory: Path, damaged: set[Path], log: Log | None, read: Read = read_checkpoint
) -> tuple[Checkpoint | None, list[str]]:
    """Read the newest checkpoint of a folder that is intact.

    Args:
        directory: The folder of a run.
        damaged: The checkpoints found damaged so far; updated in place.
        log: Called with a message for each one that is skipped; a warning by default.
        read: Reads and verifies one.

    Returns:
        The checkpoint, or None if there is none, and the messages about the damaged ones.

    Raises:
        CheckpointFormatError: The newest candidate was written by a newer kbtrain or another
            program.
        CheckpointUnreadableError: It cannot be read now, or the folder cannot be listed.
    """
    reports = []
    for _, path in reversed(list_checkpoints(directory)):
        try:
            checkpoint = read(path)
        except (CheckpointDamagedError, CheckpointNotFoundError) as error:
            reports.append(str(error))
            damaged.add(path)
            _log(log, f"{error} Trying the next older one.")
        else:
            damaged.discard(path)
            return checkpoint, reports
    return None, reports


def find_checkpoint(
    directory: Path,
    resume: bool | str | os.PathLike[str] | None,
    damaged: set[Path],
    log: Log | None,
    read: Read = read_checkpoint,
) -> Checkpoint | None:
    """Find the checkpoint for ``resume_from_checkpoint``; see ``CheckpointStore.resolve``."""
    if resume is None or resume is False:
        return None
    if resume is True:
        return _newest_or_raise(directory, damaged, log, read)
    if resume == "auto":
        checkpoint, reports = newest_intact(directory, damaged, log, read)
        if checkpoint is None and reports:
            _log(
                log,
                f"FRESH START: all {len(reports)} checkpoints in {directory} are damaged; "
                "training starts over at step 0. They are left unchanged.",
            )
        return checkpoint
    if not isinstance(resume, str | os.PathLike) or not os.fspath(resume):
        raise ConfigurationError(
            "`resume_from_checkpoint` must be None, True, False, 'auto' or the path of a "
            f"checkpoint. Received: resume_from_checkpoint={resume!r}"
        )
    check_local("resume_from_checkpoint", resume)
    return _checkpoint_at(Path(resume), directory, damaged, log, read)


def _newest_or_raise(
    directory: Path, damaged: set[Path], log: Log | None, read: Read
) -> Checkpoint:
    checkpoint, reports = newest_intact(directory, damaged, log, read)
    if checkpoint is not None:
        return checkpoint
    if reports:
        raise CheckpointNotFoundError(
            f"No intact checkpoint to resume from: all {len(reports)} in {directory} are "
            "damaged.\n" + "\n".join(f"- {report}" for report in reports)
        )
    state = "holds no checkpoint" if is_folder(directory) else "does not exist"
    raise CheckpointNotFoundError(
        f"No checkpoint to resume from: the folder {directory} {state}. Expected folders "
        "named checkpoint-{step}. Start without resuming, with resume_from_checkpoint='auto', "
        "or give the path of a checkpoint."
    )


def _checkpoint_at(
    path: Path, directory: Path, damaged: set[Path], log: Log | None, read: Read
) -> Checkpoint:
    """The checkpoint at a path, or the newest intact one if the path is a run's folder."""
    if not exists(path):
        here = ", ".join(found.name for _, found in list_checkpoints(directory)) or "none"
        raise CheckpointNotFoundError(f"There is no {path}. Checkpoints in {directory}: {here}.")
    names = names_in(path)
    if MANIFEST_NAME not in names and list_checkpoints(path):
        return _newest_or_raise(path.absolute(), damaged, log, read)
    if MANIFEST_NAME in names or filesystem.parse_checkpoint_name(path.name) is not None:
        return read(path)
    if is_folder(path) and not names:
        return _newest_or_raise(path.absolute(), damaged, log, read)
    found = f"a folder with {', '.join(names[:8])}" if is_folder(path) else "a file"
    raise CheckpointError(
        f"{path} is not a checkpoint. Expected a checkpoint folder (with a {MANIFEST_NAME}) or "
        f"a run folder that holds folders named checkpoint-{{step}}. Received: {found}"
    )


def _log(log: Log | None, message: str) -> None:
    (log or logging.getLogger("kbtrain").warning)(message)
