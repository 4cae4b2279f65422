"""Worker processes for data that runs user code, through Grain.

A worker produces whole batches. The samples in batch ``number`` of an epoch are a function of
(seed, epoch), so workers need only that number, and a position in the data is still the two numbers
in a checkpoint.
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
from kbtrain.utils.packages.optional_imports import require

ENDLESS = 2**62
"""Number of batches for workers that persist across epochs."""


class WorkerLoader:
    """The batches of a loader, produced by worker processes.

    Python's and NumPy's global generators are seeded before each batch with the seed, the epoch and
    the number of the batch, so random augmentation is the same for any number of workers, and after
    a resume.

    Args:
        loader: A loader of samples that can be read by index. A copy is sent to the workers.
        workers: Number of processes, at least 1. They are started by ``spawn``, so a script that
            uses them needs ``if __name__ == "__main__":``.
        prefetch: Batches that each worker keeps ready.
        persistent: Whether to keep the processes between epochs.

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
        # The running workers, and the number (counted from epoch 0) of their next batch.
        self._live: tuple[Any, int] | None = None

    @property
    def name(self) -> str:
        """The name of the data in messages."""
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
        """The first batch, produced in this process, so that no worker is started for it."""
        with _seeded_generators(self.loader.seed, 0, 0):
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
                'started the training again. Put it under `if __name__ == "__main__":`. '
                f"Received: dataloader_num_workers={self._workers}."
            )
        # Grain reads an absl flag, which fails in a program that does not parse absl flags.
        flags = require("absl.flags", "grain", "dataloader_num_workers").FLAGS
        if not flags.is_parsed():
            flags.mark_as_parsed()
        # Ended workers leave their queues to the garbage collector, with 25 semaphores each. These
        # must not be released while others are started (Python 3.13.0 warns about it). `close` has
        # collected them, unless an exception kept them alive.
        gc.collect()
        made = _batches_dataset(self._grain, self.loader, first, batches)
        options = self._grain.MultiprocessingOptions(self._workers, self._prefetch)
        # One thread per worker, because the global generators are seeded for the current batch.
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
                "copy of the data set, so it must be possible to pickle it. "
                "dataloader_num_workers=0 produces the batches in this process."
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
    """Produce one batch with seeded generators; an error carries its traceback as a note.

    (The cause of an exception and its frames cannot be sent to another process.)
    """
    try:
        with _seeded_generators(loader.seed, epoch, number):
            return next(loader.epoch(epoch, number))
    except DataError as error:
        if error.__cause__ is not None:
            error.add_note("".join(traceback.format_exception(error.__cause__)))
        raise


@contextlib.contextmanager
def _seeded_generators(seed: int, epoch: int, number: int) -> Iterator[None]:
    """Seed Python's and NumPy's global generators for a batch, and restore them afterwards."""
    before = random.getstate(), np.random.get_state()
    words = np.random.SeedSequence(seed, spawn_key=(epoch, number)).generate_state(8)
    random.seed(words.tobytes())
    np.random.seed(words)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
