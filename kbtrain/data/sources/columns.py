"""One array of a data set, read a few rows at a time.

A column is an ndarray in memory (a memory map counts: the operating system reads its pages when
they are touched), an array on disk that must be asked in sorted order, or a sparse matrix.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from kbtrain.data.tree import as_array, cast, check_dtype, is_sparse_matrix, map_structure


class DiskColumn:
    """An HDF5 dataset (or one that behaves like it), which stays on disk.

    Args:
        dataset: Object with ``shape``, ``dtype`` and slicing; index lists must be increasing.
        name: How error messages call it.
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
        """Some rows, which stay on disk."""
        part = copy.copy(self)
        part._first, part.shape = self._first + start, (stop - start, *self.shape[1:])
        return part

    def take(self, indices: np.ndarray, axis: int = 0) -> np.ndarray:
        """Return the rows at ``indices`` in their order; repeated ones are read once."""
        increasing, back = np.unique(indices, return_inverse=True)
        return np.asarray(self._dataset[self._first + increasing]).take(back, axis=axis)


class SparseColumn:
    """A sparse matrix of SciPy's; rows become dense when they are read.

    Args:
        matrix: Of any of SciPy's formats.
        name: How error messages call it.
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
        """Some rows."""
        part = copy.copy(self)
        part._rows, part.shape = self._rows[start:stop], (stop - start, *self.shape[1:])
        return part

    def take(self, indices: np.ndarray, axis: int = 0) -> np.ndarray:
        """Return the rows at ``indices`` in their order, dense."""
        assert axis == 0
        result: np.ndarray = self._rows[indices].toarray()
        return result


Column = np.ndarray | DiskColumn | SparseColumn


def as_column(value: Any, name: str, strings: bool = False) -> Column:
    """Make a column of an array, a tensor, an HDF5 dataset, a sparse matrix or a list of numbers.

    Raises:
        DataError: ``value`` is none of these, or its dtype is of no use to a model.
    """
    if hasattr(value, "read_direct"):  # what an h5py.Dataset has and arrays in memory have not
        return DiskColumn(value, name)
    if is_sparse_matrix(value):
        return SparseColumn(value, name)
    return as_array(value, name, strings)


def take(column: Column, indices: np.ndarray | range) -> np.ndarray:
    """Return the rows at ``indices``, float64 as float32.

    A ``range`` gives a view where that is possible. What is returned is always contiguous and
    writeable: torch warns about read-only memory and refuses negative strides.
    """
    if isinstance(indices, range):
        block = cast(column[indices.start : indices.stop])
        return block if block.flags.carray else block.copy()
    return cast(column.take(indices, axis=0))


def cut(column: Column, start: int, stop: int) -> Column:
    """The rows from ``start`` up to ``stop``, not read yet where the column is on disk."""
    return column[start:stop] if isinstance(column, np.ndarray) else column.part(start, stop)


def rows(batch: Any, count: int) -> list[Any]:
    """Split a batch into its samples, each in the structure of the batch.

    Every field is an array, 0-d if need be, so that ``default_collate`` can tell a list of scalar
    fields from one field that is a list of numbers.
    """
    return [map_structure(lambda array, i=i: array[i, ...], batch) for i in range(count)]
