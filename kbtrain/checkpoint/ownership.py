"""Which checkpoints in a folder a run may delete: only its own.

A folder may also hold checkpoints of an earlier run, of a newer kbtrain or of another program. A
run has a random identity, which is recorded in the manifest of each checkpoint and inherited by a
run that resumes from one. A run owns the checkpoints it wrote itself, the one it resumed from and
verified, and those whose intact manifest has its identity.
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
        # Cache of the manifests read, so that a folder with many checkpoints of other runs is not
        # read again at each save.
        self._found: dict[Path, tuple[_Identity, bool]] = {}

    def wrote(self, path: Path) -> None:
        """Record that the run has written a checkpoint."""
        self._note(path)

    def resumed_from(self, checkpoint: Checkpoint) -> None:
        """Continue as the run that wrote a checkpoint, which has been read and verified."""
        if checkpoint.manifest.run is not None:
            self.run = checkpoint.manifest.run
        self._note(checkpoint.path)

    def __contains__(self, path: Path) -> bool:
        """Whether the run owns a checkpoint folder; False if that cannot be determined."""
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
    """Distinguishes a file or folder from a later one of the same name."""
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_ctime_ns
