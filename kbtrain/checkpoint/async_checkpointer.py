"""Saves checkpoints during a run: in the background, one at a time, with a lock on the folder.

In a run of several processes each has an ``AsyncCheckpointer`` and calls its methods alike. State
that is whole on every process is written by one of them; of state that is divided each writes its
blocks. They learn of each other's failures, so that all raise an error or none does.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from kbtrain.checkpoint import CheckpointStore, distributed
from kbtrain.checkpoint.storage.folder_writer import Contents, ExternalLayout
from kbtrain.checkpoint.storage.lock import RunLock
from kbtrain.distributed.control.peers import Peers
from kbtrain.errors import CheckpointError, is_lasting, is_storage_error
from kbtrain.utils.array_blocks import OwnedBlocks
from kbtrain.utils.machine.host_buffers import HostBuffers

logger = logging.getLogger("kbtrain")

OnError = Literal["warn", "raise"]


@dataclass(frozen=True)
class Snapshot:
    """One checkpoint in host memory; shares no memory with the training state.

    Attributes:
        step: Optimizer updates done.
        arrays: Group -> name -> array, or the ``OwnedBlocks`` of an array that is divided among
            processes.
        documents: Name -> JSON value.
        info: Entries for the manifest.
        places: Group -> where Keras looks for its arrays.
        keep: How many checkpoints to keep afterwards; None keeps all.
        protect: Checkpoints that must not be deleted.
        other_files: Path in the folder -> content, besides arrays and documents.
    """

    step: int
    arrays: Mapping[str, Mapping[str, np.ndarray | OwnedBlocks]]
    documents: Mapping[str, Any]
    info: Mapping[str, Any]
    places: Mapping[str, ExternalLayout] = field(default_factory=dict)
    keep: int | None = None
    protect: tuple[Path, ...] = ()
    other_files: Mapping[str, bytes] = field(default_factory=dict)


@dataclass
class _Job:
    """A pending save whose outcome is unchecked."""

    key: str
    snapshot: Snapshot
    on_error: OnError
    failed: Callable[[], None]
    written: Callable[[], None] | None = None
    error: BaseException | None = None
    saved: bool = False
    thread: threading.Thread | None = field(default=None)


def _is_raised(job: _Job, error: BaseException) -> bool:
    return job.on_error == "raise" or not is_storage_error(error)


_asked: weakref.WeakKeyDictionary[Any, Iterator[int]] = weakref.WeakKeyDictionary()


def _new_key(peers: Peers | None) -> str:
    """A key for messages, alike on all processes as they ask for keys in one order."""
    return (
        "" if peers is None else f"checkpoint {next(_asked.setdefault(peers, itertools.count()))}"
    )


class AsyncCheckpointer:
    """Writes the checkpoints of a run, one at a time.

    In the background, ``save`` returns as soon as a thread has the host copy; the thread writes,
    flushes, reads back, renames and only then deletes old checkpoints. An error is raised by the
    next call of ``poll``, ``save`` or ``wait`` in the training thread.

    Args:
        store: Where the checkpoints go.
        writes: Whether this process writes what is whole on every process. Of the processes with
            one folder one does; without ``peers``, every save of the others succeeds without doing
            anything.
        peers: The processes of the run, if they tell each other what became of a save, as they must
            where state is divided among them. Then ``wait`` returns when all have written, so that
            any of them can read the checkpoint.
    """

    def __init__(
        self, store: CheckpointStore, writes: bool = True, peers: Peers | None = None
    ) -> None:
        self.store = store
        self.writes = writes
        self.peers = peers
        self.longest: float | None = None
        """Seconds that the slowest write so far took; None before the first."""
        self.buffers = HostBuffers()
        """Memory for the next snapshot, once the last one has been written (``wait``)."""
        self._lock = RunLock(store.directory)
        self._job: _Job | None = None
        self._guard = threading.Lock()
        self._abandoned = False

    @property
    def _takes_part(self) -> bool:
        return self.writes or self.peers is not None

    @contextmanager
    def running(self, will_save: bool, on_error: OnError) -> Iterator[None]:
        """Lock the folder during a run; at the end, wait for a pending save.

        Args:
            will_save: Whether the run is expected to save; if not, the folder is not touched until
                a first call of ``save``.
            on_error: What to do if the folder cannot be written to.

        Raises:
            FolderInUseError: Another run has locked the folder.
            CheckpointError: The folder is none that this process may write to. Or it cannot be
                written to now, or the last save failed, and ``on_error`` is ``"raise"``.
        """
        if not self._takes_part:
            yield
            return
        self._join()
        self._abandoned = False
        if will_save:
            self._take_folder(on_error)
        try:
            self._clean()
            yield
            self.wait()
            self._send_rest(on_error)
        except KeyboardInterrupt:
            self._abandon()  # without waiting: the write ends by itself, or with the process
            raise
        except BaseException:
            if self._job is not None:
                self._job.on_error = "warn"  # one error at a time
            self.wait()
            raise
        finally:
            # New buffers: an abandoned save may still be reading from the old ones.
            self.buffers = HostBuffers()
            with self._guard:
                if not self._abandoned:
                    self._lock.release()

    def _send_rest(self, on_error: OnError) -> None:
        """At the end of a run: upload what could not be uploaded before."""
        if not self.store.is_remote:
            return
        try:
            self._on_writers(_new_key(self.peers), self.store.send)
        except CheckpointError as error:
            if on_error == "raise" or not is_storage_error(error):
                raise
            logger.warning("The run is over, and not all of it is there. %s", error)

    def _clean(self) -> None:
        if not self.writes:
            return
        try:
            self.store.clean_leftovers(alone=self._lock.is_held)
        except CheckpointError as error:  # a resume reports it again
            logger.warning("Leftovers of earlier runs were not removed: %s", error)

    def save(
        self,
        snapshot: Snapshot,
        background: bool,
        on_error: OnError,
        failed: Callable[[], None] = lambda: None,
        written: Callable[[], None] | None = None,
    ) -> bool:
        """Write a checkpoint, after waiting for a pending save.

        Args:
            snapshot: What to write.
            background: Whether to return before it is written.
            on_error: ``"warn"`` or ``"raise"``, for storage errors; other errors are always raised.
            failed: Called in the training thread if it could not be written.
            written: Called when it is complete, in the thread that has written it.

        Returns:
            Whether it is written (in the background: whether writing has started).

        Raises:
            CheckpointError: This save, or the one before it, failed.
        """
        self.wait()
        if not self._takes_part:
            return True
        job = _Job(_new_key(self.peers), snapshot, on_error, failed, written)
        self._job = job
        if background:
            # A daemon thread: a process that must stop at once does not wait for it, and the next
            # start removes what was left half written.
            job.thread = threading.Thread(target=self._write, args=[job], daemon=True)
            job.thread.start()
            return True
        self._write(job)
        return self._collect()

    def poll(self) -> None:
        """Raise the error of a background save if it has finished; never waits.

        With several processes, one that is only a warning is left to ``wait`` and ``save``: until
        then a save counts as written on all of them, wherever they are.
        """
        job = self._job
        if job is None or (job.thread is not None and job.thread.is_alive()):
            return
        if self.peers is None or (job.error is not None and _is_raised(job, job.error)):
            self._collect()

    def wait(self) -> None:
        """Wait for the background save and raise its error."""
        self._join()
        self._collect()

    def settle(self) -> None:
        """Wait for the background save; its error is kept for the next call."""
        self._join()

    def _join(self) -> None:
        if self._job is not None and self._job.thread is not None:
            self._job.thread.join()

    def _collect(self) -> bool:
        """Handle the outcome of the last save; return whether it was written."""
        job, self._job = self._job, None
        if job is None or job.error is None:
            return True
        if not job.saved:
            job.failed()
        if _is_raised(job, job.error):
            raise job.error
        logger.warning(
            "%s Training continues (on_save_error='warn'); the next checkpoint is tried when it is "
            "due.",
            job.error,
        )
        return job.saved

    def _write(self, job: _Job) -> None:
        """Write, verify, rotate; runs in the thread of a background save."""
        start = time.perf_counter()
        try:
            self._save(job)
            self.longest = max(self.longest or 0.0, time.perf_counter() - start)
        except BaseException as error:
            if job.thread is None and not isinstance(error, Exception):
                self._job = None
                raise  # an interrupt in the training thread
            job.error = error
        finally:
            if job.thread is not None:
                with self._guard:
                    if self._abandoned:
                        self._lock.release()

    def _save(self, job: _Job) -> None:
        one, key = job.snapshot, job.key
        contents = (one.arrays, one.documents, one.info, one.places, one.other_files)
        if self.peers is not None and distributed.is_divided(one.arrays):
            lock, whole = self._lock_folder, Contents(*contents)
            distributed.save(self.store, one.step, whole, self.peers, key, lock)
            rotates = self.peers.rank == 0
        else:

            def write() -> None:
                self._lock_folder()
                self.store.save(one.step, *contents)

            self._on_writers(key, write)
            rotates = self.writes
            if not rotates:
                self.store.written(self.store.path(one.step))
        job.saved = True
        if job.written is not None:
            job.written()
        try:
            if self.store.is_remote:
                self._on_writers(f"{key}/upload", self.store.send)
        finally:
            if rotates:
                self._rotate(one)

    def _on_writers(self, key: str, action: Callable[[], None]) -> None:
        """Call a function on the processes that write, and raise its error on all."""
        problem: Exception | None = None
        try:
            if self.writes:
                action()
        except Exception as error:
            if self.peers is None:
                raise
            problem = error
        if self.peers is not None:
            distributed.agree(self.peers, key, problem)

    def _rotate(self, snapshot: Snapshot) -> None:
        """Delete old checkpoints; the new one counts as saved even if that fails."""
        try:
            self.store.rotate(snapshot.keep, snapshot.protect)
        except (CheckpointError, OSError) as error:
            logger.warning("Old checkpoints were not deleted: %s", error)

    def _take_folder(self, on_error: OnError) -> None:
        try:
            self._on_writers(_new_key(self.peers), self._begin_writing)
        except CheckpointError as error:
            if on_error == "raise" or not is_storage_error(error) or is_lasting(error):
                raise
            logger.warning(
                "%s Training continues (on_save_error='warn'), but nothing can be saved until this "
                "is fixed.",
                error,
            )

    def check_folder(self) -> None:
        """Check that a run may begin to write to the folder, and leave it as it was.

        Raises:
            CheckpointError: As for ``running``.
        """
        folder = self.store.directory
        missing = [one for one in (folder, *folder.parents) if not one.exists()]
        try:
            self._on_writers(_new_key(self.peers), self._begin_writing)
        finally:
            self._lock.release()
            for one in missing:
                with suppress(OSError):  # not made, or another run writes there by now
                    one.rmdir()

    def _begin_writing(self) -> None:
        self._lock_folder()
        self.store.check_access()

    def _lock_folder(self) -> None:
        try:
            self._lock.acquire()
        except OSError as error:
            raise self.store.explain_failure(self.store.directory, error) from error

    def _abandon(self) -> None:
        job = self._job
        with self._guard:
            running = job is not None and job.thread is not None and job.thread.is_alive()
            self._abandoned = running
