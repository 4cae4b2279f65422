"""One array of a data set, read a few rows at a time.

A column is an ndarray in memory (including memory maps, whose pages the operating system reads on
access), an array on disk that must be read in sorted order, or a sparse matrix.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from kbtrain.data.tree import as_array, cast, check_dtype, is_sparse_matrix, map_structure


class DiskColumn:
    """An HDF5 dataset (or an object with the same interface), which stays on disk.

    Args:
        dataset: Object with ``shape``, ``dtype`` and slicing; index lists must be increasing.
        name: Its name in error messages.
    """

    def __init__(self, dataset: Any, name: str) -> None:
        check_dtype(dataset.dtype, name)
        self._dataset = dataset
        self._first = 0
        self.shape: tuple[int, ...] = tuple(dataset.shape)
        self.dtype: np.dtype = dataset.dtype

    def __getitem__(self, rows: slice) -> np.ndarray:
        start, stop, _ = rows.indices(self.shape[0])
        return np.asarray(self._dataset[self._first + start : self._first + stop])

    def part(self, start: int, stop: int) -> DiskColumn:
        """The rows from ``start`` to ``stop``, without reading them."""
        part = copy.copy(self)
        part._first, part.shape = self._first + start, (stop - start, *self.shape[1:])
        return part

    def take(self, indices: np.ndarray, axis: int = 0) -> np.ndarray:
        """Return the rows at ``indices`` in order; repeated ones are read once."""
        increasing, back = np.unique(indices, return_inverse=True)
        return np.asarray(self._dataset[self._first + increasing]).take(back, axis=axis)


class SparseColumn:
    """A sparse matrix of SciPy; rows become dense when they are read.

    Args:
        matrix: The matrix, in any of SciPy's formats.
        name: Its name in error messages.
    """

    def __init__(self, matrix: Any, name: str) -> None:
        check_dtype(matrix.dtype, name)
        self._rows = matrix.tocsr()
        self.shape: tuple[int, ...] = tuple(matrix.shape)
        self.dtype: np.dtype = matrix.dtype

    def __getitem__(self, rows: slice) -> np.ndarray:
        result: np.ndarray = self._rows[rows].toarray()
        return result

    def part(self, start: int, stop: int) -> SparseColumn:
        """The rows from ``start`` to ``stop``."""
        part = copy.copy(self)
        part._rows, part.shape = self._rows[start:stop], (stop - start, *self.shape[1:])
        return part

    def take(self, indices: np.ndarray, axis: int = 0) -> np.ndarray:
        """Return the rows at ``indices`` in order, as a dense array."""
        assert axis == 0
        result: np.ndarray = self._rows[indices].toarray()
        return result


Column = np.ndarray | DiskColumn | SparseColumn


def as_column(value: Any, name: str, strings: bool = False) -> Column:
    """Create a column from an array, tensor, HDF5 dataset, sparse matrix or list of numbers.

    Raises:
        DataError: ``value`` is none of these, or models do not accept its dtype.
    """
    if hasattr(value, "read_direct"):  # h5py.Dataset has it, arrays in memory do not
        return DiskColumn(value, name)
    if is_sparse_matrix(value):
        return SparseColumn(value, name)
    return as_array(value, name, strings)


def take_rows(column: Column, indices: np.ndarray | range) -> np.ndarray:
    """Return the rows at ``indices``, with float64 converted to float32.

    A ``range`` returns a view if possible. The result is always contiguous and writeable, because
    torch warns about read-only memory and rejects negative strides.
    """
    if isinstance(indices, range):
        block = cast(column[indices.start : indices.stop])
        return block if block.flags.carray else block.copy()
    return cast(column.take(indices, axis=0))


def cut(column: Column, start: int, stop: int) -> Column:
    """The rows from ``start`` to ``stop``; a column on disk is not read yet."""
    return column[start:stop] if isinstance(column, np.ndarray) else column.part(start, stop)


def rows(batch: Any, count: int) -> list[Any]:
    """Split a batch into its samples, each in the structure of the batch.

    Every field is an array, 0-d if necessary, so that ``default_collate`` can distinguish a list of
    scalar fields from a field that is a list of numbers.
    """
    return [map_structure(lambda array, i=i: array[i, ...], batch) for i in range(count)]
