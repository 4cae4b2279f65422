"""Worker processes for data with code of the user's, through Grain.

A worker makes whole batches. Which samples are in batch ``number`` of an epoch is a function of
(seed, epoch) as ever, so workers need nothing but the number, and a position in the data is still
the two numbers that a checkpoint holds.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import random
import traceback
from collections.abc import Generator, Iterator
from typing import Any

import numpy as np

from kbtrain.data import DataLoader
from kbtrain.data.tree import keeping_float64, keeps_float64
from kbtrain.errors import ConfigurationError, DataError
from kbtrain.utils.optional_imports import require

ENDLESS = 2**62
"""Batches of a run whose workers go on from epoch to epoch."""


class WorkerLoader:
    """The batches of a loader, made by worker processes.

    Python's and NumPy's global generators are seeded before each batch, from the seed, the epoch
    and the number of the batch: random augmentation is the same for any number of workers, and
    after a resume.

    Args:
        loader: Samples that can be read by index. It is sent to the workers, as a copy.
        workers: Processes, at least 1. They are started by ``spawn``, so a script that uses them
            needs ``if __name__ == "__main__":``.
        prefetch: Batches that each worker keeps ready.
        persistent: Keep the processes from one epoch to the next.

    Raises:
        ConfigurationError: Grain is not installed.
    """

    sized = True

    def __init__(
        self, loader: DataLoader, workers: int, prefetch: int = 2, persistent: bool = False
    ) -> None:
        self._grain = require("grain", "grain", "dataloader_num_workers")
        self.loader = loader
        self._workers = workers
        self._prefetch = prefetch
        self._persistent = persistent
        # The running workers, and the number of the batch (counted from epoch 0) they give next.
        self._live: tuple[Any, int] | None = None

    @property
    def name(self) -> str:
        """How messages call the data."""
        return self.loader.name

    @property
    def num_examples(self) -> int | None:
        """Number of samples in an epoch."""
        return self.loader.num_examples

    @property
    def batch_size(self) -> int:
        """Samples in a full batch."""
        return self.loader.batch_size

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        return self.epoch(0)

    def peek(self) -> Any:
        """The first batch, made in this process: to look at its shapes no worker is started."""
        with _seeded(self.loader.seed, 0, 0):
            return next(self.loader.epoch(0), None)

    def epoch(self, epoch: int, start_batch: int = 0) -> Generator[Any, None, None]:
        """Yield the batches of an epoch; see ``DataLoader.epoch``. Close it when leaving it early.

        Raises:
            DataError: While iterating: the data failed in a worker, or a worker died.
        """
        self.loader.epoch(epoch, start_batch)  # checks the numbers
        return self._read(epoch, start_batch)

    def _read(self, epoch: int, start_batch: int) -> Generator[Any, None, None]:
        first = epoch * len(self) + start_batch
        if self._live is None or self._live[1] != first:
            self.close()
            batches = ENDLESS if self._persistent else len(self) - start_batch
            if batches <= 0:
                return
            self._live = (self._start(first, batches), first)
        try:
            for number in range(start_batch, len(self)):
                yield self._next(number)
        finally:
            if not self._persistent:
                self.close()

    def _start(self, first: int, batches: int) -> Iterator[Any]:
        if getattr(multiprocessing.current_process(), "_inheriting", False):
            raise ConfigurationError(
                "dataloader_num_workers starts processes that import this program, and one of them "
                'came to the training again. Put the training under `if __name__ == "__main__":`. '
                f"Received: dataloader_num_workers={self._workers}."
            )
        # Grain reads an absl flag, which is an error in a program that parses none.
        flags = require("absl.flags", "grain", "dataloader_num_workers").FLAGS
        if not flags.is_parsed():
            flags.mark_as_parsed()
        # Workers that ended leave their queues to the garbage collector: 25 semaphores each, whose
        # release must not come in the middle of the start of others (Python 3.13.0 warns of it).
        # `close` has collected them, unless an exception held on to them.
        gc.collect()
        made = _batches_dataset(self._grain, self.loader, first, batches)
        options = self._grain.MultiprocessingOptions(self._workers, self._prefetch)
        # One thread in each worker, because the global generators belong to the batch being made.
        one = self._grain.ReadOptions(num_threads=0, prefetch_buffer_size=1)
        return iter(made.to_iter_dataset(one).mp_prefetch(options))

    def _next(self, number: int) -> Any:
        assert self._live is not None
        try:
            batch = next(self._live[0])
            self._live = (self._live[0], self._live[1] + 1)
            return batch
        except BaseException as error:
            self.close()
            if isinstance(error, (DataError, MemoryError)) or not isinstance(error, Exception):
                raise
            raise DataError(
                f"Batch {number} of {self.name}: the worker processes failed: {error}. They get a "
                "copy of the data set, so it must be possible to pickle it; "
                "dataloader_num_workers=0 makes the batches in this process."
            ) from error

    def close(self) -> None:
        """End the worker processes."""
        live, self._live = self._live, None
        if live is not None:
            live[0].close()
            del live
            gc.collect()  # see `_start`


def _batches_dataset(grain: Any, loader: DataLoader, first: int, count: int) -> Any:
    """A ``grain.MapDataset`` of batches ``first``, ``first + 1``, ... counted from epoch 0."""
    float64 = keeps_float64()

    class Batches(grain.MapDataset):  # type: ignore[misc]
        def __len__(self) -> int:
            return count

        def __getitem__(self, index: Any) -> Any:
            if isinstance(index, slice):
                return self.slice(index)
            with keeping_float64(float64):
                return make_batch(loader, *divmod(first + index, len(loader)))

    return Batches()


def make_batch(loader: DataLoader, epoch: int, number: int) -> Any:
    """One batch, with the generators seeded for it; an error takes its traceback along as a note.

    (The cause of an exception, and its frames, stay behind in the process where it was raised.)
    """
    try:
        with _seeded(loader.seed, epoch, number):
            return next(loader.epoch(epoch, number))
    except DataError as error:
        if error.__cause__ is not None:
            error.add_note("".join(traceback.format_exception(error.__cause__)))
        raise


@contextlib.contextmanager
def _seeded(seed: int, epoch: int, number: int) -> Iterator[None]:
    """Python's and NumPy's global generators at the start of a batch, and back afterwards."""
    before = random.getstate(), np.random.get_state()
    words = np.random.SeedSequence(seed, spawn_key=(epoch, number)).generate_state(8)
    random.seed(words.tobytes())
    np.random.seed(words)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
