"""Which checkpoints of a folder a run may delete: its own, and no others.

A folder may hold checkpoints of a former run, of a newer kbtrain or of another program. A run has
an identity, drawn at its beginning, noted in the manifest of each checkpoint and taken over by
whoever resumes from one. Its own are those that it has written itself, the one that it was resumed
from and has verified, and those whose intact manifest bears its identity.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from kbtrain.checkpoint.storage.folder_reader import Checkpoint, manifest_of
from kbtrain.checkpoint.storage.manifest import MANIFEST_NAME
from kbtrain.errors import CheckpointError

_Identity = tuple[int, ...]


class Ownership:
    """What one run may delete.

    Attributes:
        run: The run's identity.
    """

    def __init__(self) -> None:
        self.run = secrets.token_hex(8)
        self._own: dict[Path, _Identity] = {}
        # What was found in manifests, so that a folder with many checkpoints of others is not read
        # again at each save.
        self._found: dict[Path, tuple[_Identity, bool]] = {}

    def wrote(self, path: Path) -> None:
        """Note that the run has written a checkpoint."""
        self._note(path)

    def resumed_from(self, checkpoint: Checkpoint) -> None:
        """Go on as the run that wrote a checkpoint, which has been read and verified."""
        if checkpoint.manifest.run is not None:
            self.run = checkpoint.manifest.run
        self._note(checkpoint.path)

    def __contains__(self, path: Path) -> bool:
        """Whether a folder is one of the run's own checkpoints; no, if that cannot be told."""
        identity = _identity(path)
        if identity is None:
            return False
        if self._own.get(path) == identity:
            return True
        found = _identity(path / MANIFEST_NAME)
        if found is None:
            return False
        known = self._found.get(path)
        if known is None or known[0] != found:
            known = self._found[path] = found, self._was_written_by_this_run(path)
        return known[1]

    def _note(self, path: Path) -> None:
        if (identity := _identity(path)) is not None:
            self._own[path] = identity

    def _was_written_by_this_run(self, path: Path) -> bool:
        try:
            return manifest_of(path).run == self.run
        except CheckpointError:
            return False


def _identity(path: Path) -> _Identity | None:
    """What tells a folder or file from another one of its name."""
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_ctime_ns
