"""Checkpoints that a repository should have, but does not have yet."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Mapping
from pathlib import Path

from kbtrain.hub.staging import set_aside_checkpoint
from kbtrain.utils.files.filesystem import parse_checkpoint_name


class UnpushedCheckpoints:
    """Complete checkpoints whose push failed or was skipped, until a later push has them.

    They are known by their folder in the repository: of ``last-checkpoint`` only the newest is
    missing, of ``checkpoint-N`` each that still exists. Any thread may call the methods.
    """

    def __init__(self) -> None:
        self._paths: dict[str, Path] = {}
        self._guard = threading.Lock()

    def add(self, checkpoints: Mapping[str, Path]) -> None:
        """Add checkpoints that did not arrive.

        Args:
            checkpoints: Folder in the repository -> the checkpoint.
        """
        with self._guard:
            for folder, path in checkpoints.items():
                known = self._paths.get(folder)
                if known is None or _step(known) < _step(path):
                    self._paths[folder] = path

    def remove(self, checkpoints: Mapping[str, Path]) -> None:
        """Remove checkpoints that have arrived, and older ones of the same folder."""
        with self._guard:
            for folder, path in checkpoints.items():
                known = self._paths.get(folder)
                if known is not None and _step(known) <= _step(path):
                    del self._paths[folder]

    def names(self) -> list[str]:
        """The names of those that still exist; the others need not be pushed any more."""
        with self._guard:
            self._paths = {f: path for f, path in self._paths.items() if path.is_dir()}
            return [path.name for path in sorted(self._paths.values(), key=_step)]

    def set_aside(self, stage: Path, others: Mapping[str, Path]) -> dict[str, Path]:
        """Add their files to a push, without those that are deleted meanwhile.

        Args:
            stage: The folder of the push.
            others: What it has already.

        Returns:
            Folder in the repository -> the checkpoint.

        Raises:
            OSError: The files cannot be set aside.
        """
        self.names()
        with self._guard:
            wanted = {f: path for f, path in self._paths.items() if f not in others}
        added = {}
        for folder, path in wanted.items():
            try:
                set_aside_checkpoint(path, stage / folder)
            except OSError:
                if path.is_dir():
                    raise
            if path.is_dir():
                added[folder] = path
            else:  # deleted by save_total_limit at this moment
                shutil.rmtree(stage / folder, ignore_errors=True)
        return added


def _step(path: Path) -> int:
    return parse_checkpoint_name(path.name) or 0
