"""Adapts an iterable of batches, such as a torch ``DataLoader``, to the loader interface."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from typing import Any

from kbtrain.data.batch import LabelNames, to_batch
from kbtrain.data.loader import Loader, check_count, every_column
from kbtrain.data.sources.base import UnsizedDataError, failed
from kbtrain.data.sources.column_filter import ColumnFilter
from kbtrain.data.sources.interop import (
    check_batched,
    derives_from,
    ends_epochs,
    is_endless,
    resume_caveat,
)
from kbtrain.errors import DataError

logger = logging.getLogger("kbtrain")


class BatchLoader:
    """A user's own iterable of batches with the interface of a loader.

    Args:
        batches: An iterable of batches (a torch ``DataLoader``, a batched ``tf.data.Dataset``), or
            an object with ``__len__`` and ``__getitem__`` that returns batches (a Keras
            ``PyDataset``), or a generator function, called at the start of each epoch. It decides
            its order; ``set_epoch`` is called if it has one, and ``on_epoch_end`` of a
            ``PyDataset`` once for each epoch before the one that is read.
        name: Its name in error messages.
        columns: Removes unused columns.
        label_names: Which keys of a dict hold targets, see ``kbtrain.data.unpack``.
    """

    def __init__(
        self,
        batches: Any,
        name: str = "the dataloader",
        columns: ColumnFilter | None = None,
        label_names: LabelNames = None,
    ) -> None:
        check_batched(batches, name)
        self._batches = batches
        self._label_names = label_names
        self.name = name
        self._columns = columns or every_column
        self._ends_epochs = ends_epochs(batches)
        self._epochs_ended = 0
        # Lists and Keras' PyDatasets are iterable too, but reading by index makes seeking free.
        self._indexed = (
            isinstance(batches, Sequence)
            or derives_from(batches, "PyDataset")
            or not (hasattr(batches, "__iter__") or callable(batches))
        )
        self._said_skipping = False

    @property
    def resume_caveat(self) -> str | None:
        """Why a resumed run may see other data; None if it does not."""
        return resume_caveat(self._batches)

    @property
    def sized(self) -> bool:
        """Whether the number of batches is known."""
        return self._known_length() is not None

    @property
    def endless(self) -> bool:
        """Whether the data is known to have no end."""
        return is_endless(self._batches)

    @property
    def num_examples(self) -> int | None:
        """Length of the iterable's ``dataset``, if it has one."""
        try:
            return len(self._batches.dataset)
        except (AttributeError, TypeError, NotImplementedError):
            return None

    @property
    def batch_size(self) -> int | None:
        """The iterable's own ``batch_size``, if it has one."""
        size = getattr(self._batches, "batch_size", None)
        return size if isinstance(size, int) else None

    def __len__(self) -> int:
        """Return the number of batches.

        Raises:
            UnsizedDataError: It is not known.
        """
        length = self._known_length()
        if length is None:
            raise UnsizedDataError(f"{self.name} has no length. Set max_steps, or give it __len__.")
        return length

    def __iter__(self) -> Iterator[Any]:
        return self.epoch(0)

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Any]:
        """Yield the batches of an epoch, as NumPy arrays.

        Args:
            epoch: Number of the epoch, passed to ``set_epoch``.
            start_batch: Number of the first batch to yield; those before it are read and discarded
                unless the batches can be read by index.

        Returns:
            An iterator over batches.

        Raises:
            ConfigurationError: A number is negative.
            DataError: While iterating: the iterable failed, or yielded an invalid batch.
        """
        check_count("epoch", epoch, 0)
        check_count("start_batch", start_batch, 0)
        for owner in (self._batches, getattr(self._batches, "sampler", None)):
            hook = getattr(owner, "set_epoch", None)
            if callable(hook):
                hook(epoch)
        while self._ends_epochs and self._epochs_ended < epoch:
            self._epochs_ended += 1
            self._batches.on_epoch_end()
        return self._read(start_batch)

    def _read(self, start_batch: int) -> Iterator[Any]:
        batches = self._raw_batches(start_batch)
        for number in itertools.count(start_batch):
            where = f"Batch {number} of {self.name}"
            try:
                batch = next(batches)
            except StopIteration:
                return
            except MemoryError:
                raise
            except Exception as error:
                raise failed(where, error) from error
            yield to_batch(self._columns(batch, self.name), where, self._label_names)

    def _raw_batches(self, start_batch: int) -> Iterator[Any]:
        """Yield the raw batches; a generator, so that errors of ``iter`` occur at a batch too."""
        if self._indexed:
            numbers = range(start_batch, len(self)) if self.sized else itertools.count(start_batch)
            for number in numbers:
                yield self._batches[number]
            return
        if start_batch and not self._said_skipping:
            logger.info("%s: reading and skipping %d batches.", self.name, start_batch)
            self._said_skipping = True
        made = self._batches if hasattr(self._batches, "__iter__") else self._batches()
        yield from itertools.islice(made, start_batch, None)

    def _known_length(self) -> int | None:
        try:
            return len(self._batches)
        except (TypeError, NotImplementedError):
            return None


def as_loader(obj: Any, *, name: str = "the dataloader", label_names: LabelNames = None) -> Loader:
    """Return ``obj`` if it is a loader; wrap an iterable of batches as one.

    Args:
        obj: A loader, an iterable of batches, a function that returns one, or an object with
            ``__len__`` and ``__getitem__`` that returns batches.
        name: Its name in error messages.
        label_names: Which keys of a dict hold targets, see ``kbtrain.data.unpack``.

    Returns:
        A loader.

    Raises:
        DataError: ``obj`` is none of these.

    Example:
        >>> loader = as_loader([([[1.0, 2.0]], [0])])
        >>> len(loader), next(iter(loader))[0].dtype
        (1, dtype('float32'))
    """
    if isinstance(obj, Loader):
        return obj
    indexed = hasattr(obj, "__len__") and hasattr(obj, "__getitem__")
    readable = hasattr(obj, "__iter__") or indexed or callable(obj)
    if isinstance(obj, (str, bytes, dict, type)) or not readable:
        raise DataError(
            f"{name} must be an iterable of batches, such as a kbtrain.data.DataLoader or a torch "
            f"DataLoader. Received: a value of type {type(obj).__name__}"
        )
    return BatchLoader(obj, name, label_names=label_names)
