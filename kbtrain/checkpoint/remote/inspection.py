"""Checkpoints at an address, for commands that look at them without resuming."""

from __future__ import annotations

import os
from pathlib import Path

from kbtrain.checkpoint.remote.store import RemoteStore, run_and_step
from kbtrain.checkpoint.remote.transfer import committed, download
from kbtrain.checkpoint.storage.manifest import MANIFEST_NAME
from kbtrain.errors import CheckpointNotFoundError
from kbtrain.utils.files.filesystem import checkpoint_name

DOCUMENTS = ("trainer_state.json", "progress.json")


class RemoteCheckpoints:
    """The checkpoints of a run at an address, or one of them.

    Args:
        address: Of a run, or of a checkpoint.

    Attributes:
        steps: Their steps, ascending.

    Raises:
        CheckpointNotFoundError: There is none.
        CheckpointUnreadableError: The address cannot be read now.
    """

    def __init__(self, address: str) -> None:
        run, step = run_and_step(address)
        self._store = RemoteStore(run)
        self.steps = [one for one, _ in self._store.kept() if step in (None, one)]
        if not self.steps:
            raise CheckpointNotFoundError(f"There is no checkpoint at {address}.")

    def outline(self, folder: Path) -> None:
        """Write what ``read_outline`` needs without arrays, for all complete checkpoints.

        Other files get their sizes and no contents, which takes no space.

        Args:
            folder: An empty folder.

        Raises:
            CheckpointNotFoundError: There is none.
            CheckpointUnreadableError: The address cannot be read now.
        """
        files, found = self._store.files, False
        for step in self.steps:
            name = checkpoint_name(step)
            try:
                sizes = files.sizes(name)
                if MANIFEST_NAME not in sizes:
                    continue  # its upload was not completed
                for path, size in sizes.items():
                    target = folder / name / path
                    target.parent.mkdir(parents=True, exist_ok=True)
                    if path in (MANIFEST_NAME, *DOCUMENTS):
                        target.write_bytes(files.read(f"{name}/{path}"))
                    else:
                        target.touch()
                        os.truncate(target, size)
                written = files.modified(f"{name}/{MANIFEST_NAME}")
            except OSError as error:
                raise self._store.unreadable(f"{self._store.place}/{name}", error) from error
            os.utime(folder / name / MANIFEST_NAME, (written, written))
            found = True
        if not found:
            raise CheckpointNotFoundError(
                f"{self._store.place} has no complete checkpoint: none has a {MANIFEST_NAME}."
            )

    def download(self, step: int, folder: Path) -> None:
        """Download a checkpoint into an empty folder, and verify it.

        Raises:
            CheckpointError: It is not complete, damaged, or cannot be read now.
        """
        name, files = checkpoint_name(step), self._store.files
        try:
            if (data := committed(files, name)) is None:
                raise CheckpointNotFoundError(
                    f"{self._store.place}/{name} is not complete: it has no {MANIFEST_NAME}."
                )
            download(files, name, data, folder)
        except OSError as error:
            raise self._store.unreadable(f"{self._store.place}/{name}", error) from error
