"""Loaders: batches of an epoch, from any position.

A loader has no state that moves: ``epoch(epoch, start_batch)`` is a function of its arguments, so
the two numbers are all a checkpoint needs, and two epochs may be read at the same time.
"""

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from kbtrain.data.batch import to_batch
from kbtrain.data.collate import Collate, default_collate
from kbtrain.data.lengths import rebalance
from kbtrain.data.sampling import NEED_LENGTHS, Order, check_strategy, epoch_order
from kbtrain.data.sources import (
    ArraySource,
    IterableSource,
    Source,
    UnsizedDataError,
    as_source,
    derives_from,
    failed,
)
from kbtrain.errors import ConfigurationError, DataError

logger = logging.getLogger("kbtrain")


@runtime_checkable
class Loader(Protocol):
    """What the training and evaluation loops ask of a loader.

    Attributes:
        sized: Whether ``len(loader)``, the number of batches, is known.
        num_examples: Number of samples in an epoch, or ``None`` if it is not known.
        batch_size: Samples in a full batch, or ``None`` if it is not known.
    """

    @property
    def sized(self) -> bool:
        """Whether ``len(loader)`` is known."""

    @property
    def num_examples(self) -> int | None:
        """Number of samples in an epoch, if known."""

    @property
    def batch_size(self) -> int | None:
        """Samples in a full batch, if known."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Any]: ...

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Any]:
        """Yield the batches of an epoch from number ``start_batch`` on."""


class DataLoader:
    """Batches of a source, in an order that depends on the seed and the epoch only.

    Args:
        source: The samples; anything else goes through ``as_source`` first.
        batch_size: Samples per batch, at least 1.
        strategy: ``"sequential"``, ``"random"``, ``"group_by_length"`` (similar lengths together,
            from long to short) or ``"batch_rebalance"`` (micro-batches of different sizes and about
            equal cost). An iterable has its own order, which is ``"sequential"`` or ``"random"``.
        seed: Seed of the order, an integer >= 0.
        drop_last: Leave out the last batch if it is short.
        collate: Makes a batch of a list of samples. The default stacks them, and for arrays reads
            the whole batch at once. One with a method ``at(epoch, number)`` is asked by it for the
            collator of each batch, so that random choices belong to the position in the data.
        accumulation: Batches of one update; the strategies by length look at whole updates.
        length_column: Where samples say how long they are, for the strategies by length.
        read_ahead: Batches that a thread makes ahead in training; None leaves that to who reads
            (``kbtrain.data.Batches``).

    Raises:
        ConfigurationError: batch_size, strategy or seed is not one of the above, or the lengths of
            the samples cannot be found.

    Example:
        >>> import numpy as np
        >>> loader = DataLoader(as_source(np.arange(5)), batch_size=2)
        >>> [batch.tolist() for batch in loader.epoch(0, start_batch=1)]
        [[2, 3], [4]]
    """

    def __init__(
        self,
        source: Source | Any,
        batch_size: int,
        *,
        strategy: str = "sequential",
        seed: int = 0,
        drop_last: bool = False,
        collate: Collate | None = None,
        accumulation: int = 1,
        length_column: str = "length",
        read_ahead: int | None = None,
    ) -> None:
        check_strategy(strategy)
        _check_count("batch_size", batch_size, 1)
        _check_count("seed", seed, 0)
        _check_count("accumulation", accumulation, 1)
        self.source = as_source(source)
        self.accumulation = int(accumulation)
        self.read_ahead = read_ahead
        self.batch_size = int(batch_size)
        self.strategy = strategy
        self.seed = int(seed)
        self.drop_last = drop_last
        self._collate: Any = collate
        self._positioned = callable(getattr(collate, "at", None))
        self._said_skipping = False
        by_length = strategy in NEED_LENGTHS
        self._lengths = self.source.lengths(length_column) if by_length else None

    @property
    def name(self) -> str:
        """How messages call the data."""
        return self.source.name

    @property
    def sized(self) -> bool:
        """Whether the number of batches is known and seeking is free."""
        return self.source.sized

    @property
    def num_examples(self) -> int | None:
        """Number of samples in the source, or ``None`` for an iterable.

        Those that ``drop_last`` leaves out are counted.
        """
        return len(self.source) if self.sized else None

    def __len__(self) -> int:
        """Return the number of batches in an epoch.

        Raises:
            UnsizedDataError: The source is an iterable.
        """
        full, rest = divmod(len(self.source), self.batch_size)
        return full + bool(rest and not self.drop_last)

    @property
    def vectorised(self) -> bool:
        """Whether several batches can be read at once: arrays, and no collator of the user's."""
        even = self.strategy != "batch_rebalance"
        return even and self._collate is None and isinstance(self.source, ArraySource)

    @property
    def full_batches(self) -> int:
        """Number of batches of an epoch that are not short."""
        return len(self.source) // self.batch_size

    def reader(self, epoch: int) -> Callable[[int, int], Any]:
        """``read(number, count)``: the rows of full batches of an epoch, all at once.

        Args:
            epoch: Number of the epoch, from 0; it selects the random order.

        Returns:
            A function of the first batch's number and of how many there are; its result is in the
            structure of a batch, with ``count * batch_size`` rows.
        """
        order, size = self._order(epoch), self.batch_size
        return lambda number, count: self.source.gather(
            order[number * size : (number + count) * size]
        )

    def __iter__(self) -> Iterator[Any]:
        return self.epoch(0)

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Any]:
        """Yield the batches of an epoch.

        Args:
            epoch: Number of the epoch, from 0; it selects the random order.
            start_batch: Number of the first batch to yield. Of sized data nothing before it is
                touched; of an iterable the samples before it are read and thrown away.

        Returns:
            An iterator over batches of NumPy arrays. It is empty if ``start_batch`` is not below
            the number of batches, and if a one-shot iterator has been used up.

        Raises:
            ConfigurationError: A number is negative.
            DataError: While iterating: the data, or the collator, failed; the message says where.
        """
        _check_count("epoch", epoch, 0)
        _check_count("start_batch", start_batch, 0)
        self.source.set_epoch(epoch)
        if isinstance(self.source, IterableSource):
            return self._stream(self.source, epoch, start_batch)
        return self._by_index(epoch, start_batch)

    def _by_index(self, epoch: int, start_batch: int) -> Iterator[Any]:
        order = self._order(epoch)
        for number in range(start_batch, len(self)):
            indices = self._indices(order, number)
            try:
                if self._collate is None:
                    batch = self.source.gather(indices)
                else:
                    batch = self._apply_collate(self.source.samples(indices), epoch, number)
            except DataError as error:
                raise self._in_batch(number, error) from (error.__cause__ or error)
            yield batch

    def _order(self, epoch: int) -> Order:
        size = self.batch_size * self.accumulation
        return epoch_order(len(self.source), self.seed, epoch, self.strategy, self._lengths, size)

    def _indices(self, order: Order, number: int) -> np.ndarray | range:
        """The samples of one batch of an epoch."""
        size = self.batch_size
        if self.strategy != "batch_rebalance":
            return order[number * size : (number + 1) * size]
        assert self._lengths is not None
        first = number - number % self.accumulation
        end = min(first + self.accumulation, len(self))
        update = np.asarray(order[first * size : end * size])
        return update[rebalance(self._lengths[update], end - first)[number - first]]

    def _stream(self, source: IterableSource, epoch: int, start_batch: int) -> Iterator[Any]:
        samples = source.stream()
        if start_batch:
            self._skip(samples, start_batch * self.batch_size)
        for number in itertools.count(start_batch):
            chunk = list(itertools.islice(samples, self.batch_size))
            if not chunk or (self.drop_last and len(chunk) < self.batch_size):
                return
            try:
                batch = self._apply_collate(chunk, epoch, number)
            except DataError as error:
                raise self._in_batch(number, error) from (error.__cause__ or error)
            yield batch

    def _skip(self, samples: Iterator[Any], count: int) -> None:
        if not self._said_skipping:
            logger.info(
                "%s has no random access: reading and skipping %d samples to get to the position.",
                self.source.name,
                count,
            )
            self._said_skipping = True
        for _ in itertools.islice(samples, count):
            pass

    def _apply_collate(self, samples: list[Any], epoch: int, number: int) -> Any:
        if self._collate is None:
            return default_collate(samples)
        try:
            # A collator that draws random numbers wants to know its place, see its class.
            collate = self._collate.at(epoch, number) if self._positioned else self._collate
            batch = collate(samples)
        except MemoryError:
            raise
        except Exception as error:
            raise failed("the data_collator", error) from error
        return to_batch(batch, "the result of the data_collator")

    def _in_batch(self, number: int, error: DataError) -> DataError:
        return DataError(f"Batch {number} of {self.source.name}: {error}")


class BatchLoader:
    """A user's own iterable of batches, behind the doors of a loader.

    Args:
        batches: An iterable of batches (a torch ``DataLoader``, a batched ``tf.data.Dataset``), or
            an object with ``__len__`` and ``__getitem__`` that returns batches (a Keras
            ``PyDataset``). Its own order counts; ``set_epoch`` is called if it has one.
        name: How error messages call it.
    """

    def __init__(self, batches: Any, name: str = "the dataloader") -> None:
        self._batches = batches
        self.name = name
        # Lists and Keras' PyDatasets can be iterated too, but reading by index makes seeking free.
        self._indexed = (
            isinstance(batches, Sequence)
            or derives_from(batches, "PyDataset")
            or not hasattr(batches, "__iter__")
        )
        self._said_skipping = False

    @property
    def sized(self) -> bool:
        """Whether the iterable knows its number of batches."""
        return self._known_length() is not None

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
            UnsizedDataError: The iterable does not know it.
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
            epoch: Number of the epoch, handed to ``set_epoch``.
            start_batch: Number of the first batch to yield; those before it are read and thrown
                away unless the batches can be read by index.

        Returns:
            An iterator over batches.

        Raises:
            ConfigurationError: A number is negative.
            DataError: While iterating: the iterable failed, or yielded something that is no batch.
        """
        _check_count("epoch", epoch, 0)
        _check_count("start_batch", start_batch, 0)
        for owner in (self._batches, getattr(self._batches, "sampler", None)):
            hook = getattr(owner, "set_epoch", None)
            if callable(hook):
                hook(epoch)
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
            yield to_batch(batch, where)

    def _raw_batches(self, start_batch: int) -> Iterator[Any]:
        """Yield the raw batches; a generator, so that a failing ``iter`` fails at a batch too."""
        if self._indexed:
            for number in range(start_batch, len(self)):
                yield self._batches[number]
            return
        if start_batch and not self._said_skipping:
            logger.info("%s: reading and skipping %d batches.", self.name, start_batch)
            self._said_skipping = True
        yield from itertools.islice(self._batches, start_batch, None)

    def _known_length(self) -> int | None:
        try:
            return len(self._batches)
        except (TypeError, NotImplementedError):
            return None


def as_loader(obj: Any, *, name: str = "the dataloader") -> Loader:
    """Return ``obj`` if it is a loader, and an iterable of batches wrapped as one.

    Args:
        obj: A loader, an iterable of batches, or an object with ``__len__`` and ``__getitem__``
            that returns batches.
        name: How error messages call it.

    Returns:
        A loader.

    Raises:
        DataError: ``obj`` is nothing of that kind.

    Example:
        >>> loader = as_loader([([[1.0, 2.0]], [0])])
        >>> len(loader), next(iter(loader))[0].dtype
        (1, dtype('float32'))
    """
    if isinstance(obj, Loader):
        return obj
    indexed = hasattr(obj, "__len__") and hasattr(obj, "__getitem__")
    if isinstance(obj, (str, bytes, dict)) or not (hasattr(obj, "__iter__") or indexed):
        raise DataError(
            f"{name} must be an iterable of batches, such as a kbtrain.data.DataLoader or a torch "
            f"DataLoader. Received: a value of type {type(obj).__name__}"
        )
    return BatchLoader(obj, name)


def _check_count(name: str, value: Any, minimum: int) -> None:
    """Raise a ``ConfigurationError`` unless ``value`` is an integer >= ``minimum``."""
    is_integer = hasattr(value, "__index__") and not isinstance(value, bool)
    if not is_integer or value < minimum:
        raise ConfigurationError(
            f"{name} must be an integer >= {minimum}. Received: {name}={value!r}"
        )
