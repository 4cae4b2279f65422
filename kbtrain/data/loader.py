"""Loaders: batches of an epoch, from any position.

A loader has no mutable state: ``epoch(epoch, start_batch)`` is a function of its arguments, so a
checkpoint needs only these two numbers, and two epochs can be read at the same time.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
from collections.abc import Callable, Collection, Iterator
from typing import Any, Protocol, runtime_checkable

import numpy as np

from kbtrain.data.batch import LabelNames, to_batch
from kbtrain.data.collators.default import Collate, default_collate
from kbtrain.data.sampling.by_length import rebalance
from kbtrain.data.sampling.sampler import NEED_LENGTHS, Order, check_strategy, epoch_order
from kbtrain.data.sources.base import ArraySource, IterableSource, Source, failed
from kbtrain.data.sources.column_filter import ColumnFilter, without_texts
from kbtrain.data.sources.infer import as_source
from kbtrain.errors import ConfigurationError, DataError

logger = logging.getLogger("kbtrain")


@runtime_checkable
class Loader(Protocol):
    """The interface that the training and evaluation loops use.

    Attributes:
        sized: Whether ``len(loader)``, the number of batches, is known.
        num_examples: Number of samples in an epoch, or ``None`` if unknown.
        batch_size: Samples in a full batch, or ``None`` if unknown.
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
    """Batches of a source, in an order that depends only on the seed and the epoch.

    Args:
        source: The samples; anything but a ``Source`` is converted by ``as_source``.
        batch_size: Samples per batch, at least 1.
        strategy: ``"sequential"``, ``"random"``, ``"group_by_length"`` (similar lengths together,
            from long to short) or ``"batch_rebalance"`` (micro-batches of different sizes and about
            equal cost). An iterable keeps its own order with ``"sequential"`` or ``"random"``.
        seed: Seed of the order, an integer >= 0.
        drop_last: Drop the last batch if it is incomplete.
        collate: Collates a list of samples into a batch. The default stacks them, and for arrays
            reads the whole batch at once. If it has a method ``at(epoch, number)``, that returns
            the collator of each batch, so that random choices depend on the position in the data.
        accumulation: Batches of one update, which the strategies by length process together.
        length_column: Column with the lengths of samples, for the strategies by length.
        columns: Removes unused columns: after a user's collator, and before one that has an
            attribute ``takes`` with the names of the columns it uses.
        read_ahead: Batches that a thread prefetches in training; None leaves the decision to
            ``kbtrain.data.Batches``.
        label_names: Which keys of a dict hold targets, see ``kbtrain.data.unpack``.

    Raises:
        ConfigurationError: ``batch_size``, ``strategy`` or ``seed`` is invalid, or the lengths of
            the samples cannot be determined.

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
        columns: ColumnFilter | None = None,
        read_ahead: int | None = None,
        label_names: LabelNames = None,
    ) -> None:
        check_strategy(strategy)
        check_count("batch_size", batch_size, 1)
        check_count("seed", seed, 0)
        check_count("accumulation", accumulation, 1)
        self.source = as_source(source, label_names=label_names)
        self._label_names = label_names
        self.accumulation = int(accumulation)
        self.read_ahead = read_ahead
        self.batch_size = int(batch_size)
        self.strategy = strategy
        self.seed = int(seed)
        self.drop_last = drop_last
        self._collate: Any = _bound(collate, label_names, columns)
        self._positioned = callable(getattr(collate, "at", None))
        self._said_skipping = False
        # Called with the first sample, if there is no user's collator.
        self.look: Callable[[Any], None] | None = None
        self._filters_first: bool | None = None  # unknown before the first batch
        by_length = strategy in NEED_LENGTHS
        self._lengths = self.source.lengths(length_column) if by_length else None
        self._columns = columns
        if columns is not None and collate is None and isinstance(self.source, ArraySource):
            self.source = self.source.keeping(columns)

    @property
    def name(self) -> str:
        """The name of the data in messages."""
        return self.source.name

    @property
    def sized(self) -> bool:
        """Whether the number of batches is known and seeking is free."""
        return self.source.sized

    @property
    def num_examples(self) -> int | None:
        """Number of samples in the source, or ``None`` for an iterable.

        Samples dropped by ``drop_last`` are counted.
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
    def resume_caveat(self) -> str | None:
        """Why a resumed run may see other data; None if it does not."""
        return self.source.resume_caveat

    @property
    def endless(self) -> bool:
        """Whether the data is known to have no end."""
        return self.source.endless

    @property
    def vectorised(self) -> bool:
        """Whether several batches can be read at once: arrays without a user's collator."""
        even = self.strategy != "batch_rebalance"
        return even and self._collate is None and isinstance(self.source, ArraySource)

    @property
    def full_batches(self) -> int:
        """Number of complete batches in an epoch."""
        return len(self.source) // self.batch_size

    def reader(self, epoch: int) -> Callable[[int, int], Any]:
        """``read(number, count)``: the rows of full batches of an epoch, all at once.

        Args:
            epoch: Number of the epoch, from 0; it selects the random order.

        Returns:
            A function of the first batch's number and the number of batches. Its result has the
            structure of a batch with ``count * batch_size`` rows.
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
            start_batch: Number of the first batch to yield. Sized data is read from there; the
                earlier samples of an iterable are read and discarded.

        Returns:
            An iterator over batches of NumPy arrays. It is empty if ``start_batch`` is not below
            the number of batches, or if a one-shot iterator is exhausted.

        Raises:
            ConfigurationError: A number is negative.
            DataError: While iterating: the data, or the collator, failed; the message says where.
        """
        check_count("epoch", epoch, 0)
        check_count("start_batch", start_batch, 0)
        self.source.set_epoch(epoch)
        if isinstance(self.source, IterableSource):
            return self.batches_of(self.source.stream(), epoch, start_batch)
        return self._by_index(epoch, start_batch)

    def _by_index(self, epoch: int, start_batch: int) -> Iterator[Any]:
        order = self._order(epoch)
        for number in range(start_batch, len(self)):
            indices = self._indices(order, number)
            try:
                if self._collate is None and isinstance(self.source, ArraySource):
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
        """The indices of the samples in one batch of an epoch."""
        size = self.batch_size
        if self.strategy != "batch_rebalance":
            return order[number * size : (number + 1) * size]
        assert self._lengths is not None
        first = number - number % self.accumulation
        end = min(first + self.accumulation, len(self))
        update = np.asarray(order[first * size : end * size])
        result: np.ndarray | range = update[
            rebalance(self._lengths[update], end - first)[number - first]
        ]
        return result

    def batches_of(self, samples: Iterator[Any], epoch: int, start_batch: int = 0) -> Iterator[Any]:
        """Collate the given samples of an epoch into batches.

        Args:
            samples: All samples of the epoch, in order.
            epoch: Number of the epoch.
            start_batch: Number of the first batch to yield.
        """
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
                "%s has no random access: reading and skipping %d samples to reach the position.",
                self.source.name,
                count,
            )
            self._said_skipping = True
        for _ in itertools.islice(samples, count):
            pass

    def _apply_collate(self, samples: list[Any], epoch: int, number: int) -> Any:
        columns = self._columns or every_column
        if self._collate is None:
            if self.look is not None:
                look, self.look = self.look, None
                look(samples[0])
            # Filter before collating, because unused columns may hold anything.
            kept = [columns(sample, self.name) for sample in samples]
            return default_collate(kept, self._label_names)
        if (taken := getattr(self._collate, "takes", None)) is not None:
            # A collator of kbtrain that declares its columns: here too others may hold anything.
            samples = [columns(sample, self.name, taken) for sample in samples]
        # A collator that draws random numbers depends on its position, see its class.
        collate = self._collate.at(epoch, number) if self._positioned else self._collate
        if self._filters_first is None:
            self._filters_first, batch = self._first_collation(collate, samples)
            return batch
        if self._filters_first:
            samples = [self._reduced(sample) for sample in samples]
        return self._collated(collate, samples)

    def _first_collation(self, collate: Collate, samples: list[Any]) -> tuple[bool, Any]:
        """Whether the collator needs samples without unused columns, and the batch.

        A user's collator may use any column, so it gets all of them if it can handle them.
        """
        copies = [dict(s) if type(s) is dict else s for s in samples]  # it may modify them
        try:
            return False, self._collated(collate, copies)
        except DataError:
            reduced = [self._reduced(sample) for sample in samples]
            if all(one is other for one, other in zip(reduced, samples, strict=True)):
                raise
            with contextlib.suppress(DataError):
                return True, self._collated(collate, reduced)
            raise

    def _reduced(self, sample: Any) -> Any:
        """A sample without unused columns, or without text columns if the model is unknown."""
        if self._columns is None:
            return without_texts(sample, self.name)
        return self._columns(sample, self.name)

    def _collated(self, collate: Collate, samples: list[Any]) -> Any:
        """Collate samples with the user's collator and convert the result to a batch."""
        try:
            batch = collate(samples)
        except MemoryError:
            raise
        except Exception as error:
            raise failed("the data_collator", error) from error
        batch = (self._columns or every_column)(batch, self.name)
        return to_batch(batch, "the result of the data_collator", self._label_names)

    def _in_batch(self, number: int, error: DataError) -> DataError:
        return DataError(f"Batch {number} of {self.source.name}: {error}")


def _bound(
    collate: Collate | None, names: LabelNames, columns: ColumnFilter | None
) -> Collate | None:
    """A collator of kbtrain with what is known: names of the labels, inputs of the model."""
    if collate is default_collate:
        return functools.partial(default_collate, label_names=names)
    if (bind := getattr(collate, "with_label_names", None)) is not None:
        collate = bind(names)
    if columns is not None and (bind := getattr(collate, "with_inputs", None)) is not None:
        collate = bind(columns.inputs)
    return collate


def every_column(batch: Any, name: str, taken: Collection[str] = ()) -> Any:
    """A ``ColumnFilter`` that keeps everything."""
    return batch


def check_count(name: str, value: Any, minimum: int) -> None:
    """Raise a ``ConfigurationError`` unless ``value`` is an integer >= ``minimum``."""
    is_integer = hasattr(value, "__index__") and not isinstance(value, bool)
    if not is_integer or value < minimum:
        raise ConfigurationError(
            f"{name} must be an integer >= {minimum}. Received: {name}={value!r}"
        )
