"""Copies what a run writes besides checkpoints (logs, results, reports) to its address."""

from __future__ import annotations

import os
from pathlib import Path

from kbtrain.checkpoint.remote.files import ATTEMPTS, RemoteFiles
from kbtrain.utils.files.filesystem import parse_checkpoint_name

CONTINUED = (".csv", ".json", ".jsonl")
"""Files that a resumed run keeps writing, or reads to add to them."""


class Mirror:
    """The files of a run's folder, at its address.

    Only what is written from ``begin`` on is uploaded: what was left here before may be older than
    what is at the address, if the run was continued elsewhere.

    Args:
        files: The address.
        folder: The folder.
    """

    def __init__(self, files: RemoteFiles, folder: Path) -> None:
        self._files, self._folder = files, folder
        self._sent: dict[str, tuple[int, int] | None] = {}
        self.has_begun = False

    def begin(self, bring: bool) -> None:
        """Begin to upload what changes from now on.

        Args:
            bring: Whether to download first what will be continued; it replaces what is here.

        Raises:
            OSError: A file cannot be read now.
        """
        if bring:
            self._folder.mkdir(parents=True, exist_ok=True)
            for name, size in self._files.names().items():
                if size is not None and name.endswith(CONTINUED) and not name.startswith("."):
                    beside = self._folder / f".download-{os.getpid()}"
                    self._files.get(name, beside)
                    beside.replace(self._folder / name)
        self._sent.clear()
        self._sent.update({path: self._version(path) for path in self._changed()})
        self.has_begun = True

    def send(self, once: bool) -> None:
        """Upload what has changed; hidden files and checkpoints are left out.

        Args:
            once: Whether to try only once.

        Raises:
            OSError: A file could not be uploaded.
        """
        self._files.tries = 1 if once else ATTEMPTS
        for path in sorted(self._changed()):
            version = self._version(path)
            self._files.put(self._folder / path, path)
            self._sent[path] = version

    def _changed(self) -> list[str]:
        found = []
        for place, folders, names in os.walk(self._folder):
            inside = Path(place).relative_to(self._folder)
            folders[:] = [
                name
                for name in folders
                if not name.startswith(".")
                and (inside.parts or parse_checkpoint_name(name) is None)
            ]
            found += [(inside / name).as_posix() for name in names if not name.startswith(".")]
        return [path for path in found if self._sent.get(path) != self._version(path)]

    def _version(self, path: str) -> tuple[int, int] | None:
        try:
            status = (self._folder / path).stat()
        except FileNotFoundError:  # replaced or removed meanwhile
            return None
        return status.st_size, status.st_mtime_ns
