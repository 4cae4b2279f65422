"""The checkpoints of a run whose ``output_dir`` is an address.

They are written into a folder on this machine (``local_folder``) as those of any run, and uploaded
from there. What is at the address counts: the folder may be lost at any time, and holds no more
than the newest checkpoint, the best one, and what has not been uploaded yet.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from kbtrain.checkpoint import resuming
from kbtrain.checkpoint.remote.files import RemoteFiles
from kbtrain.checkpoint.remote.mirror import Mirror
from kbtrain.checkpoint.remote.transfer import committed, download, left_by, remove, upload
from kbtrain.checkpoint.resuming import Log
from kbtrain.checkpoint.storage import run_folder
from kbtrain.checkpoint.storage.folder_reader import Checkpoint, find_problems, manifest_of
from kbtrain.checkpoint.storage.folder_writer import SHARD_BYTES
from kbtrain.checkpoint.storage.format import parse_json
from kbtrain.checkpoint.storage.manifest import MANIFEST_NAME, parse_manifest
from kbtrain.checkpoint.storage.run_folder import Listing
from kbtrain.checkpoint.store import CheckpointStore, Paths
from kbtrain.errors import (
    CheckpointDamagedError,
    CheckpointError,
    CheckpointNotFoundError,
    CheckpointUnreadableError,
)
from kbtrain.utils.files.addresses import check_address, local_folder, normalised, scheme_of
from kbtrain.utils.files.filesystem import checkpoint_name, parse_checkpoint_name

logger = logging.getLogger("kbtrain")

UPLOADED = ".uploaded"
"""A file in a local checkpoint: it is at the address, or was."""

TRAINER_STATE = "trainer_state.json"


class RemoteStore(CheckpointStore):
    """The checkpoints of a run at an address; ``directory`` is where they are written first.

    Args:
        address: ``scheme://place``, of a file system of fsspec.
        shard_bytes: As for ``CheckpointStore``.

    Raises:
        ConfigurationError: fsspec, or its package for this address, is missing.
    """

    is_remote = True

    def __init__(self, address: str, shard_bytes: int = SHARD_BYTES) -> None:
        super().__init__(local_folder(address), shard_bytes)
        self.files = RemoteFiles(address)
        self.place = self.files.address
        self._runs: dict[str, str | None] = {}  # checkpoints there -> the run that wrote them
        self._broken: set[str] = set()  # checkpoints there that were found damaged
        self._refused: set[Path] = set()  # checkpoints here whose place there is taken
        self._shared = False  # whether another run was found to write there
        self._mirror = Mirror(RemoteFiles(address), self.directory)

    # --- from the address -------------------------------------------------------------------------

    def resolve(
        self,
        resume: bool | str | os.PathLike[str] | None,
        log: Log | None = None,
        lazy: bool = False,
        read: resuming.Read | None = None,
    ) -> Checkpoint | None:
        """Find the checkpoint for ``resume_from_checkpoint`` and download it.

        As ``CheckpointStore.resolve``, with the checkpoints at the address; ``resume`` may also be
        the address of a checkpoint or of another run. One that this machine had written but not
        uploaded when its process ended is uploaded now.
        """
        self._begin()
        self._runs.clear()
        if resume is None or resume is False:
            self._mirror.begin(bring=False)
            return super().resolve(resume)
        found, unfinished = None, list[int]()
        if resume is True or resume == "auto":
            found, unfinished = self._newest(log, must=resume is True)
            resume = found
        elif scheme_of(resume) is not None:
            resume = found = staged(os.fspath(resume), log, self)
        damaged = self._damaged
        checkpoint = super().resolve(resume, log, lazy, read)
        self._damaged |= damaged
        if found is not None and found.parent == self.directory:
            self._continue_here(found, unfinished)
        else:
            self._mirror.begin(bring=False)
        return checkpoint

    def _newest(self, log: Log | None, must: bool) -> tuple[Path | None, list[int]]:
        """The newest intact checkpoint, brought here, and steps whose upload was not completed."""
        reports: list[str] = []
        unfinished: list[int] = []
        found: Path | None = None
        for step, _ in reversed(self.kept()):
            try:
                found = self.fetch(step)
            except CheckpointDamagedError as error:
                reports.append(str(error))
                self._damaged.add(self.path(step))
                self._broken.add(checkpoint_name(step))
                (log or logger.warning)(f"{error} Trying the next older one.")
                continue
            if found is not None:
                break
            unfinished.append(step)
        found = self._newer_here(found) or found
        if found is None and must:
            raise CheckpointNotFoundError(
                f"No checkpoint to resume from: {self.place} holds no complete one. Start without "
                "resuming, with resume_from_checkpoint='auto', or give the path of a checkpoint."
                + "".join(f"\n- {report}" for report in reports)
            )
        if found is None and reports:
            (log or logger.warning)(
                f"FRESH START: all {len(reports)} checkpoints in {self.place} are damaged; "
                "training starts over at step 0. They are left unchanged."
            )
        return found, unfinished

    def fetch(self, step: int) -> Path | None:
        """Download a checkpoint, unless this machine has the same one.

        Returns:
            Its folder on this machine, verified; None if it is not at the address, or not complete.

        Raises:
            CheckpointDamagedError: It is damaged.
            CheckpointFormatError: It was written by a newer kbtrain or by another program.
            CheckpointUnreadableError: It cannot be read now.
        """
        name, local = checkpoint_name(step), self.path(step)
        try:
            data = committed(self.files, name)
            if data is None:
                return None
            with suppress(OSError, CheckpointError):
                if (local / MANIFEST_NAME).read_bytes() == data and not find_problems(local):
                    (local / UPLOADED).touch()
                    return local
            logger.info("Downloading %s/%s.", self.place, name)
            with self.temporary_folder(step) as folder:
                download(self.files, name, data, folder)
                (folder / UPLOADED).touch()
                run_folder.publish(folder, local, step)
        except OSError as error:
            raise self.unreadable(f"{self.place}/{name}", error) from error
        return local

    def bring(self, place: str) -> None:
        """Download a checkpoint that process 0 has found, if it is not on this machine."""
        step = parse_checkpoint_name(place)
        if step is not None and not self.path(step).exists():
            self.fetch(step)

    def kept(self) -> Listing:
        """(step, local path) of all that is named like a checkpoint at the address, by step."""
        try:
            names = self.files.names()
        except OSError as error:
            raise self.unreadable(self.place, error) from error
        steps = [parse_checkpoint_name(name) for name, size in names.items() if size is None]
        return [(step, self.path(step)) for step in sorted(s for s in steps if s is not None)]

    def _newer_here(self, found: Path | None) -> Path | None:
        """A checkpoint that could not be uploaded before the process ended, of the run found."""
        for step, path in reversed(self.list()):
            newest = -1 if found is None else parse_checkpoint_name(found.name)
            if path.name != checkpoint_name(step) or newest is None or step <= newest:
                break
            with suppress(CheckpointError):
                run = None if found is None else manifest_of(found).run
                same = found is None or manifest_of(path).run == run
                if same and not (path / UPLOADED).exists() and not find_problems(path):
                    logger.warning("%s was not uploaded when its process ended.", path)
                    return path
        return None

    def _continue_here(self, found: Path, unfinished: list[int]) -> None:
        """Make the folder that of the run found at the address."""
        if (found / UPLOADED).exists():
            try:
                self._mirror.begin(bring=True)
            except OSError as error:
                raise self.unreadable(self.place, error) from error
        else:
            self._mirror.begin(bring=False)
            try:
                self.send()
            except CheckpointError as error:
                logger.warning("%s", error)
        self._bring_best(found)
        with suppress(OSError):
            for step in unfinished:
                self._run_of(step)

    def _bring_best(self, found: Path) -> None:
        state = parse_json(TRAINER_STATE, (found / TRAINER_STATE).read_bytes())
        best = state.get("best_model_checkpoint") if isinstance(state, dict) else None
        step = parse_checkpoint_name(Path(best).name) if isinstance(best, str) else None
        if step is None or checkpoint_name(step) == found.name:
            return
        try:
            if self.fetch(step) is None and not self.path(step).is_dir():
                logger.warning(
                    "%s, which held the best model, is no longer in %s. The best of those that "
                    "are left counts as the best from now on.",
                    checkpoint_name(step),
                    self.place,
                )
        except CheckpointDamagedError as error:
            logger.warning("%s It held the best model.", error)

    # --- to the address ---------------------------------------------------------------------------

    def check_access(self) -> None:
        """Write a file there and delete it, before hours of training.

        Raises:
            CheckpointError: That is not possible; its cause is the ``OSError``.
        """
        try:
            self.files.write(".kbtrain-write-test", b"kbtrain")
            self.files.remove(".kbtrain-write-test")
        except OSError as error:
            raise CheckpointError(
                f"Could not write to {self.place}: {error.strerror or error}. Check the address, "
                "the credentials and the connection."
            ) from error

    def send(self) -> None:
        """Upload what this run has saved and is not there yet, oldest first, and its logs.

        Raises:
            CheckpointError: Something could not be uploaded, and is not there.
        """
        refused: CheckpointError | None = None
        self._refused.clear()
        for step, path in self._unsent():
            name = checkpoint_name(step)
            try:
                self._runs[name] = upload(self.files, path, name, name in self._broken).run
                self._broken.discard(name)
                (path / UPLOADED).touch()
            except CheckpointDamagedError as error:
                logger.warning("%s was not uploaded, as it is damaged: %s", path, error)
            except CheckpointError as error:  # the place is taken; other steps are uploaded
                refused = refused or error
                self._refused.add(path)
            except OSError as error:
                raise CheckpointError(
                    f"Could not upload {name} to {self.place}: {error.strerror or error}. As many "
                    f"as save_total_limit are kept in {self.directory}, the newest at least, and "
                    "uploaded with the next one."
                ) from error
        self.send_files()
        if refused is not None:
            raise refused

    def bring_files(self) -> None:
        """Before files are written outside of a training: download those that are continued."""
        if not self._mirror.has_begun:
            try:
                self._mirror.begin(bring=True)
            except OSError as error:
                logger.warning(
                    "The files in %s cannot be read now (%s): what is written stays in %s.",
                    self.place,
                    error.strerror or error,
                    self.directory,
                )

    def send_files(self, once: bool = False) -> None:
        """Upload the logs and other files that have changed; a failure is a warning.

        Args:
            once: Whether to try only once.
        """
        if not self._mirror.has_begun:
            return
        try:
            self._mirror.send(once)
        except OSError as error:
            logger.warning(
                "The logs in %s were not uploaded to %s: %s.",
                self.directory,
                self.place,
                error.strerror or error,
            )

    def _unsent(self) -> Listing:
        own = super().own_checkpoints()
        named = [(step, path) for step, path in own if path.name == checkpoint_name(step)]
        return [item for item in named if not (item[1] / UPLOADED).exists()]

    def _waiting(self) -> Listing:
        return [item for item in self._unsent() if item[1] not in self._refused]

    # --- deleting ---------------------------------------------------------------------------------

    def own_checkpoints(self) -> Listing:
        """(step, local path) of what this run may delete, here and at the address."""
        found = dict(super().own_checkpoints())
        if not self._waiting():  # until then, those there are the newest that are safe
            for step, path in self.kept():
                if self._run_of(step) == self._own.run:
                    found[step] = path
        return sorted(found.items())

    def _run_of(self, step: int) -> str | None:
        """The run that wrote a checkpoint there; removes what an upload of this run has left."""
        name = checkpoint_name(step)
        if name not in self._runs:
            data, run = committed(self.files, name), None
            if data is None and left_by(self.files, name) == self._own.run:
                remove(self.files, name, self._own.run)
            elif data is not None:
                with suppress(CheckpointError):
                    run = parse_manifest(data, name).run
            self._runs[name] = run
        return self._runs[name]

    def delete(self, doomed: Listing) -> Paths:
        """Delete checkpoints at the address, what makes them one first, and on this machine."""
        here = [item for item in doomed if item[1] in self._own or (item[1] / UPLOADED).exists()]
        deleted = super().delete(here)
        if not self._waiting():
            for step, path in doomed:
                name = checkpoint_name(step)
                if self._runs.get(name) == self._own.run and self._is_still_own(name):
                    remove(self.files, name, self._own.run)
                    del self._runs[name]
                    deleted += [] if path in deleted else [path]
        return deleted

    def _is_still_own(self, name: str) -> bool:
        """Read again whose a checkpoint there is: another machine may have replaced it."""
        data = committed(self.files, name)
        if data is None:
            run = left_by(self.files, name)
        else:
            try:
                run = parse_manifest(data, name).run
            except CheckpointDamagedError:
                run = left_by(self.files, name)
            except CheckpointError:
                run = None
        if run == self._own.run:
            return True
        self._runs[name] = run
        if not self._shared and (data is not None or run is not None):
            self._shared = True
            logger.warning(
                "Another run writes to %s: %s there is no longer that of this run, and is left. "
                "Give each run an output_dir of its own.",
                self.place,
                name,
            )
        return False

    def rotate(self, limit: int | None, protect: Collection[int | str | Path] = ()) -> Paths:
        """Delete the oldest checkpoints of this run beyond a number, and copies of older ones."""
        deleted = super().rotate(limit, protect)
        named = {Path(item).name if not isinstance(item, int) else "" for item in protect}
        copies = [item for item in self.list()[:-1] if (item[1] / UPLOADED).exists()]
        run_folder.delete([item for item in copies if item[1].name not in named])
        return deleted

    def keep_only(self, best: Path) -> Paths:
        """As for a folder; what cannot be deleted now is reported and left."""
        try:
            return super().keep_only(best)
        except (CheckpointError, OSError) as error:
            logger.warning("Old checkpoints were not deleted: %s", error)
            return []

    def unreadable(self, what: str, error: OSError) -> CheckpointUnreadableError:
        """The error of something at the address that cannot be read now."""
        return CheckpointUnreadableError(
            f"{what} cannot be read at the moment: {error.strerror or error}. Nothing was changed "
            "and training does not start over. Check the credentials and the connection, and start "
            "again."
        )


def run_and_step(address: str) -> tuple[str, int | None]:
    """The address of a run, and the step if it was that of one of its checkpoints."""
    check_address("address", address)
    run, _, name = normalised(address).rpartition("/")
    step = parse_checkpoint_name(name)
    return (address if step is None else run), step


def staged(address: str, log: Log | None = None, own: RemoteStore | None = None) -> Path:
    """Download the checkpoint at an address, or the newest of the run there.

    Args:
        address: Of a checkpoint, or of a run.
        log: As for ``CheckpointStore.resolve``.
        own: The store of the run, which may be the one at the address.

    Returns:
        Its folder on this machine.

    Raises:
        CheckpointError: As for ``RemoteStore.fetch``, or there is none.
    """
    run, step = run_and_step(address)
    is_own = own is not None and own.directory == local_folder(run).absolute()
    store = own if own is not None and is_own else RemoteStore(run)
    found = store._newest(log, must=True)[0] if step is None else store.fetch(step)
    if found is None:
        raise CheckpointNotFoundError(
            f"There is no complete checkpoint {address}: it has no {MANIFEST_NAME}."
        )
    return found
