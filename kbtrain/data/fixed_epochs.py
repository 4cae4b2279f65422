"""Epochs of a fixed length, independent of the length of the data."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator
from typing import Any

from kbtrain.data.loader import Loader, check_count


class FixedEpochs:
    """A stream of batches divided into epochs: each continues where the previous one ended.

    When the data ends, it is read again from its beginning, unless it is an iterator. Each pass has
    its own order, like an epoch. To reach a position in data without a length, the batches before
    it are read and discarded.

    Args:
        loader: Any loader.
        batches: Batches per epoch, at least 1.

    Example:
        >>> from kbtrain.data import as_loader
        >>> stream = as_loader(([[float(i)]] for i in range(5)))
        >>> epochs = FixedEpochs(stream, batches=2)
        >>> [[batch[0].item() for batch in epochs.epoch(n)] for n in range(3)]
        [[0.0, 1.0], [2.0, 3.0], [4.0]]
    """

    sized = True
    num_examples = None

    def __init__(self, loader: Loader, batches: int) -> None:
        check_count("batches", batches, 1)
        self._loader = loader
        self._batches = batches
        self._running: Iterator[Any] | None = None
        self._position = 0

    @property
    def name(self) -> str:
        """The name of the data in messages."""
        return str(getattr(self._loader, "name", "the data"))

    @property
    def batch_size(self) -> int | None:
        """Samples in a full batch, if known."""
        return self._loader.batch_size

    @property
    def read_ahead(self) -> int | None:
        """Number of batches that a thread prefetches."""
        return getattr(self._loader, "read_ahead", None)

    @property
    def resume_caveat(self) -> str | None:
        """Why a resumed run may see other data; None if it does not."""
        return getattr(self._loader, "resume_caveat", None)

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        return self._batches

    def __iter__(self) -> Iterator[Any]:
        return self.epoch(0)

    def epoch(self, epoch: int, start_batch: int = 0) -> Generator[Any, None, None]:
        """Yield the batches of an epoch; fewer if an iterator is exhausted.

        Args:
            epoch: Number of the epoch.
            start_batch: Number of the first batch to yield.
        """
        check_count("epoch", epoch, 0)
        check_count("start_batch", start_batch, 0)
        return self._read(epoch * self._batches + start_batch, self._batches - start_batch)

    def close(self) -> None:
        """Release the resources of the data."""
        self._running = None
        close = getattr(self._loader, "close", None)
        if callable(close):
            close()

    def _read(self, first: int, count: int) -> Generator[Any, None, None]:
        sized = self._loader.sized
        if self._running is None or self._position > first or (sized and self._position != first):
            self._position = first if sized else 0
            passes, start = divmod(first, len(self._loader)) if sized else (0, 0)
            self._running = self._endless(passes, start)
        running = self._running
        while self._position < first + count:
            batch = next(running, None)
            if batch is None:
                return
            self._position += 1
            if self._position > first:
                yield batch

    def _endless(self, first: int, start: int) -> Iterator[Any]:
        """Pass after pass over the data."""
        for number in itertools.count(first):
            empty = True
            for batch in self._loader.epoch(number, start if number == first else 0):
                empty = False
                yield batch
            if empty:
                return
