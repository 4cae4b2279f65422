"""Infers the kind of data a user passed, and rejects what only looks like data."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from kbtrain.data.batch import LabelNames
from kbtrain.data.ragged import is_ragged
from kbtrain.data.sources.base import ArraySource, IterableSource, MapSource, Source, failed
from kbtrain.data.sources.interop import derives_from, yields_batches
from kbtrain.data.tree import has_array, is_sparse_matrix
from kbtrain.errors import DataError


def as_source(data: Any, *, name: str = "train_dataset", label_names: LabelNames = None) -> Source:
    """Infer the kind of data a user passed.

    ==============================================  ==================  ===================
    data                                            source              a sample is
    ==============================================  ==================  ===================
    array, ``(x, y)``, ``(x, y, w)``, dict of them  ``ArraySource``     a row of all arrays
    ``__len__`` and ``__getitem__``, a list         ``MapSource``       ``data[i]``
    iterable, generator, generator function         ``IterableSource``  an item
    ==============================================  ==================  ===================

    A tuple is always the arrays, a list always the samples. An array is anything with
    ``__array__``: NumPy, torch CPU tensors, TensorFlow and JAX arrays, pandas objects, memory maps,
    HDF5 datasets; also sparse matrices of SciPy, whose rows become dense batch by batch, and lists
    of numbers inside a tuple or dict.

    Args:
        data: The data, or a ``Source``, which is returned unchanged.
        name: Its name in error messages.
        label_names: Which keys of a dict hold targets, see ``kbtrain.data.unpack``.

    Returns:
        The source.

    Raises:
        DataError: The data is none of these, is empty, or its arrays differ in length.

    Example:
        >>> import numpy as np
        >>> source = as_source((np.zeros((10, 3)), np.arange(10)))
        >>> len(source), source.gather(range(4, 6))[1]
        (10, array([4, 5]))
    """
    if isinstance(data, Source):
        return data
    _reject(data, name)
    source = _infer(data, name, label_names)
    if source.sized and _length(source) == 0:
        raise DataError(f"{name} is empty: at least one sample is needed. Received: length 0")
    return source


def _infer(data: Any, name: str, label_names: LabelNames) -> Source:
    kind = type(data)
    if isinstance(data, tuple) and data and data[0] is None:
        raise DataError(
            f"{name} is (x, y) or (x, y, sample_weight), and x, the inputs, cannot be None. "
            "Received: a tuple that begins with None"
        )
    if (
        isinstance(data, (tuple, Mapping))
        or has_array(data)
        or is_sparse_matrix(data)
        or is_ragged(data)
    ):
        return ArraySource(data, name, label_names)
    if derives_from(data, "IterableDataset"):  # torch's inherits an unusable __getitem__
        return IterableSource(data, name)
    if hasattr(data, "__len__") and hasattr(data, "__getitem__"):
        return MapSource(data, name)
    if isinstance(data, Iterable) or callable(data):
        return IterableSource(data, name)
    missing = "" if not hasattr(data, "__getitem__") else " It has __getitem__ but no __len__."
    raise DataError(
        f"{name} is not a supported kind of data. Expected arrays such as (x, y), a dict of "
        "arrays, an object with __len__ and __getitem__, an iterable, or a generator function."
        f"{missing} "
        f"Received: a value of type {kind.__name__}"
    )


def _reject(data: Any, name: str) -> None:
    """Raise an error for values that look like data but are not."""
    if data is None:
        raise DataError(
            f"No data: {name} is None. Pass arrays such as (x, y), a dataset or a generator."
        )
    if isinstance(data, (str, bytes, os.PathLike)):
        raise DataError(
            f"{name} must be the data itself, not a path or a string. Load the file, and tokenize "
            f"or encode text, first. Received: {data!r}"
        )
    if isinstance(data, type):
        raise DataError(f"{name} is a class; pass an instance of it. Received: {data.__name__}")
    if isinstance(data, (bool, int, float, complex)):
        raise DataError(f"{name} must hold samples, not a single number. Received: {data!r}")
    if yields_batches(data):
        raise DataError(
            f"{name} yields batches, but samples are expected. Pass the samples (a torch "
            "DataLoader has them as `.dataset`), or convert it with kbtrain.data.as_loader. "
            f"Received: {type(data).__name__}"
        )


def _length(source: Source) -> int:
    try:
        return len(source)
    except Exception as error:
        raise failed(f"len({source.name})", error) from error
