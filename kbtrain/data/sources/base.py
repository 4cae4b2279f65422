"""Sources of samples: arrays, map-style datasets and iterables behind one interface.

A loader needs three things from a source: whether its length is known, the batch at given indices,
and the samples at given indices (for a user's collator). ``infer.as_source`` creates a source from
a user's data.
"""

from __future__ import annotations

import abc
import copy
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from kbtrain.data.batch import (
    LabelNames,
    common_length,
    label_keys,
    named_leaves,
    unpack,
    with_ragged_inputs,
)
from kbtrain.data.collators.default import default_collate
from kbtrain.data.ragged import Ragged, as_ragged, is_ragged
from kbtrain.data.sampling.by_length import checked_lengths, no_lengths
from kbtrain.data.sources.column_filter import ColumnFilter
from kbtrain.data.sources.columns import Column, as_column, cut, rows, take_rows
from kbtrain.data.sources.interop import is_endless, resume_caveat
from kbtrain.data.tree import map_raw, map_structure
from kbtrain.errors import DataError

logger = logging.getLogger("kbtrain")

_ROWS = 1 << 16
"""Number of mask rows read at once to compute lengths."""

Indices = np.ndarray | range
"""Sample indices; a ``range`` (step 1) promises that they are consecutive."""


class UnsizedDataError(DataError, TypeError):
    """The length of data without a length was requested.

    It is also a ``TypeError``, which ``len`` raises by convention: ``list(loader)`` asks for a
    length first and ignores only this error.
    """


class Source(abc.ABC):
    """Samples with or without a known number.

    Attributes:
        name: The name of the data in error messages, such as ``"train_dataset"``.
        sized: Whether ``len`` works and samples can be read by index.
    """

    sized = True

    def __init__(self, data: Any, name: str) -> None:
        self._data = data
        self.name = name

    @abc.abstractmethod
    def __len__(self) -> int:
        """Return the number of samples.

        Raises:
            UnsizedDataError: It is not known.
        """

    def gather(self, indices: Indices) -> Any:
        """Return the batch of the samples at ``indices``."""
        return default_collate(self.samples(indices))

    @abc.abstractmethod
    def samples(self, indices: Indices) -> list[Any]:
        """Return the samples at ``indices``, one by one, for a user's collator."""

    def lengths(self, column: str) -> np.ndarray:
        """Return the length of each sample, for orders that depend on it.

        Args:
            column: Column with the lengths.

        Raises:
            ConfigurationError: The lengths cannot be determined.
        """
        raise no_lengths(self.name, column, "it cannot be read by index")

    @property
    def resume_caveat(self) -> str | None:
        """Why a resumed run may see different data from an uninterrupted one; None if not.

        The data's own code is assumed to depend only on the index and the epoch.
        """
        return None

    @property
    def data(self) -> Any:
        """The user's data."""
        return self._data

    @property
    def endless(self) -> bool:
        """Whether the data is known to have no end."""
        return is_endless(self._data)

    def set_epoch(self, epoch: int) -> None:
        """Call the data's ``set_epoch``, if it has one as in torch."""
        hook = getattr(self._data, "set_epoch", None)
        if callable(hook):
            hook(epoch)


class ArraySource(Source):
    """Arrays with a common first dimension, read a batch at a time.

    Consecutive samples are a view of the user's array if its dtype allows it; memory maps and HDF5
    datasets are read only when needed.

    Args:
        data: A batch as long as the data set: ``(x, y)``, a dict of arrays, ...
        name: Its name in error messages.
        label_names: Which keys of a dict hold targets, see ``unpack``.

    Raises:
        DataError: A part is not an array, the lengths differ, or there is no sample.
    """

    def __init__(
        self, data: Any, name: str = "train_dataset", label_names: LabelNames = None
    ) -> None:
        super().__init__(data, name)
        self._columns = _columns(data, name, label_names)
        leaves = list(named_leaves(self._columns))
        self._length = common_length(leaves, f"The arrays of {name}")

    def __len__(self) -> int:
        """Return the number of samples."""
        return self._length

    def gather(self, indices: Indices) -> Any:
        """Return the batch of the samples at ``indices``: one read per array."""
        return map_structure(lambda column: take_rows(column, indices), self._columns)

    def keeping(self, columns: ColumnFilter) -> ArraySource:
        """The same rows without unused columns."""
        return self.changed(lambda all_columns: columns(all_columns, self.name))

    def changed(self, function: Callable[[Any], Any]) -> ArraySource:
        """The same rows with the columns returned by ``function``."""
        other = copy.copy(self)
        other._columns = function(self._columns)
        return other

    def part(self, start: int, stop: int, name: str) -> ArraySource:
        """The rows from ``start`` to ``stop``, without copying or reading them."""
        part = self.changed(lambda columns: map_structure(lambda c: cut(c, start, stop), columns))
        part._length, part.name = stop - start, name
        return part

    def lengths(self, column: str) -> np.ndarray:
        """Return the column of lengths, or the sums of an attention mask."""
        columns = self._columns if isinstance(self._columns, Mapping) else {}
        if column in columns:
            return checked_lengths(columns[column][:], self._length, self.name)
        if "attention_mask" not in columns:
            raise no_lengths(self.name, column, "all rows of an array are equally long")
        mask = columns["attention_mask"]
        counts = [
            np.count_nonzero(mask[start : start + _ROWS], axis=-1)
            for start in range(0, self._length, _ROWS)
        ]
        return checked_lengths(np.concatenate(counts), self._length, self.name)

    def samples(self, indices: Indices) -> list[Any]:
        """Return the rows at ``indices``, each in the structure of the data."""
        # By index even if consecutive: a collator may write into its samples, and with views it
        # would modify the user's data.
        return rows(self.gather(np.asarray(indices)), len(indices))

    def set_epoch(self, epoch: int) -> None:
        """Do nothing: arrays have no hooks."""


class MapSource(Source):
    """An object with ``__len__`` and ``__getitem__``, such as a torch ``Dataset`` or a list.

    Args:
        data: The object. Its ``__getitems__(indices)``, if it has one, reads a batch at once.
        name: Its name in error messages.
    """

    def __init__(self, data: Any, name: str = "train_dataset") -> None:
        super().__init__(data, name)
        self._get_many = getattr(data, "__getitems__", None)

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self._data)

    def samples(self, indices: Indices) -> list[Any]:
        """Return the items at ``indices``.

        Raises:
            DataError: The object's own code failed; the message names the index.
        """
        numbers = list(indices) if isinstance(indices, range) else indices.tolist()
        if self._get_many is not None:
            return self._read_together(self._get_many, numbers)
        items = []
        for index in numbers:
            try:
                items.append(self._data[index])
            except MemoryError:
                raise
            except Exception as error:
                raise failed(f"{self.name}[{index}]", error) from error
        return items

    def lengths(self, column: str) -> np.ndarray:
        """Return ``data.lengths``, a column of a table, or the lengths of all samples."""
        known = getattr(self._data, "lengths", None)
        if known is not None and not callable(known):
            return checked_lengths(known, len(self), self.name)
        if column in (getattr(self._data, "column_names", None) or ()):
            return checked_lengths(self._data[column], len(self), self.name)
        logger.info("%s: reading %d samples to get their lengths.", self.name, len(self))
        found = [
            self._length_of(self.samples(range(i, i + 1))[0], column) for i in range(len(self))
        ]
        return checked_lengths(found, len(self), self.name)

    def _length_of(self, sample: Any, column: str) -> int:
        if isinstance(sample, Mapping):
            if column in sample:
                return int(sample[column])
            sample = sample.get("input_ids")
        elif isinstance(sample, tuple):
            sample = sample[0]
        try:
            return len(sample)
        except TypeError:
            raise no_lengths(
                self.name, column, f"a sample has neither {column!r} nor 'input_ids'"
            ) from None

    def _read_together(
        self, get_many: Callable[[list[int]], Iterable[Any]], numbers: list[int]
    ) -> list[Any]:
        where = f"{self.name}.__getitems__({numbers[:3]}...)"
        try:
            items = list(get_many(numbers))
        except MemoryError:
            raise
        except Exception as error:
            raise failed(where, error) from error
        if len(items) != len(numbers):
            raise DataError(
                f"{where} must return one sample for each of the {len(numbers)} indices. "
                f"Received: {len(items)} samples"
            )
        return items


class IterableSource(Source):
    """Samples that can only be read in order: an iterable or a generator function.

    Args:
        data: An iterable, an iterator (for a single epoch), or a callable that returns an iterator
            and is called at the start of each epoch.
        name: Its name in error messages.

    Attributes:
        one_shot: Whether the data is an iterator, so that there is no second epoch.
    """

    sized = False

    def __init__(self, data: Any, name: str = "train_dataset") -> None:
        super().__init__(data, name)
        self.one_shot = isinstance(data, Iterator)

    def __len__(self) -> int:
        """Raise an ``UnsizedDataError``: the number of samples is not known."""
        raise UnsizedDataError(
            f"{self.name} is iterable and has no length. Set max_steps, or pass data with "
            "__len__ and __getitem__."
        )

    def gather(self, indices: Indices) -> Any:
        """Raise an ``UnsizedDataError``: there are no indices."""
        raise UnsizedDataError(f"{self.name} is iterable and cannot be read by index.")

    samples = gather

    @property
    def resume_caveat(self) -> str | None:
        """Why a resumed run may see other data; None if it does not."""
        return resume_caveat(self._data)

    def stream(self) -> Iterator[Any]:
        """Yield the samples of one epoch.

        Raises:
            DataError: The user's iterable failed; the message says at which sample.
        """
        iterator = self._start()
        for position in itertools.count():
            try:
                sample = next(iterator)
            except StopIteration:
                return
            except MemoryError:
                raise
            except Exception as error:
                raise failed(f"{self.name}, sample {position} of the epoch", error) from error
            yield sample

    def _start(self) -> Iterator[Any]:
        iterable = isinstance(self._data, Iterable)
        try:
            return iter(self._data if iterable else self._data())
        except MemoryError:
            raise
        except Exception as error:
            raise failed(f"{self.name} could not be iterated", error) from error


def failed(where: str, error: Exception) -> DataError:
    """Return the ``DataError`` for an exception in user code; raise it ``from`` that exception."""
    if isinstance(error, DataError):
        return DataError(f"{where}: {error}")
    return DataError(
        f"{where}: the data's own code raised {type(error).__name__}: {error}. The traceback above "
        "shows where."
    )


def _columns(data: Any, name: str, label_names: LabelNames) -> Any:
    """Convert ``(x, y)``, a dict or an array to the same structure of columns."""
    strings = label_keys(label_names).strings

    def column(value: Any, path: str) -> Column | Ragged:
        if strings and is_ragged(value):  # both only for models on TensorFlow
            return as_ragged(value)
        return as_column(value, path, strings)

    def target(value: Any, path: str) -> Column | Ragged:
        return column(value, path) if is_ragged(value) else as_column(value, path, False)

    if isinstance(data, tuple):
        if not 1 <= len(data) <= 3:
            raise DataError(
                f"{name} is a tuple, which is read as (x,), (x, y) or (x, y, sample_weight). Nest "
                "several inputs, as in ((x1, x2), y), and pass samples as a list. "
                f"Received: a tuple of {len(data)}"
            )
        parts = zip(("x", "y", "sample_weight"), data, strict=False)
        columns = tuple(
            map_raw(column if part_name == "x" else target, part, f"{name}: {part_name}")
            for part_name, part in parts
        )
        return with_ragged_inputs(columns, name, label_names)
    columns = with_ragged_inputs(map_raw(column, data, name), name, label_names)
    # Raises an error for a dict with labels only, or with several label keys.
    unpack(columns, label_names)
    return columns
