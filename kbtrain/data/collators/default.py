"""The default collator: stacks samples into a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from kbtrain.data.batch import LABEL_KEYS, LabelKeys, LabelNames, label_keys
from kbtrain.data.tree import as_array, cast, is_list_of_numbers, is_sparse_matrix, rebuild_sequence
from kbtrain.errors import DataError

Collate = Callable[[list[Any]], Any]
"""A collator: takes a list of samples and returns a batch."""


def default_collate(samples: Sequence[Any], label_names: LabelNames = None) -> Any:
    """Stack samples into a batch, field by field.

    Args:
        samples: At least one sample, all of the same structure: dicts, tuples such as ``(x, y)``,
            or single arrays or numbers. Fields may be nested, and may be arrays, tensors, numbers
            or lists of numbers.
        label_names: Which keys of a dict hold targets, see ``unpack``.

    Returns:
        The structure of one sample with arrays of shape ``(len(samples), ...)``. The key
        ``"label"`` or ``"label_ids"`` of a dict becomes ``"labels"``, unless ``label_names`` is
        given or an input of the model has one of these names.

    Raises:
        DataError: Samples differ in their fields or shapes, or a field holds strings or ``None``.

    Example:
        >>> batch = default_collate([{"x": [1, 2], "label": 0}, {"x": [3, 4], "label": 1}])
        >>> batch["x"].shape, batch["labels"]
        ((2, 2), array([0, 1]))
    """
    if not samples:
        raise DataError("Expected at least one sample to collate. Received: none")
    first, keys = samples[0], label_keys(label_names)
    if isinstance(first, Mapping):
        return _rename_labels(_collate(samples, "sample", keys.strings), keys)
    if isinstance(first, tuple):  # including (1.0, 2): the parts of a sample, not one array
        return _collate_parts(samples, "sample", keys.strings, only_first=True)
    return _collate(samples, "sample", keys.strings)


def _rename_labels(batch: dict[Any, Any], keys: LabelKeys) -> dict[Any, Any]:
    """Give the targets the key ``"labels"``, like Transformers' default collator."""
    target, *aliases = LABEL_KEYS
    found = [key for key in aliases if key in batch and key not in keys.inputs]
    if not found or target in batch or len(found) > 1:
        return batch  # `unpack` raises the error for several label keys
    if keys.names is not None or target in keys.inputs:
        return batch
    return {target if key == found[0] else key: value for key, value in batch.items()}


def _collate(values: Sequence[Any], path: str, strings: bool) -> Any:
    """Stack the same field of all samples, recursing into nested ones."""
    first = values[0]
    if isinstance(first, Mapping):
        return _collate_dicts(values, path, strings)
    if isinstance(first, (tuple, list)) and not is_list_of_numbers(first, of_arrays=False):
        return _collate_parts(values, path, strings)
    return _stack_field(values, path, strings)


def _collate_dicts(values: Sequence[Any], path: str, strings: bool) -> dict[Any, Any]:
    keys = values[0].keys()
    for position, value in enumerate(values):
        if not isinstance(value, Mapping) or value.keys() != keys:
            received = list(value) if isinstance(value, Mapping) else type(value).__name__
            raise DataError(
                f"All samples must have the same keys. Sample 0 of the batch has {list(keys)}, "
                f"sample {position} differs. Received: {path}={received}"
            )
    return {
        key: _collate([value[key] for value in values], f"{path}[{key!r}]", strings) for key in keys
    }


def _collate_parts(
    values: Sequence[Any], path: str, strings: bool, only_first: bool = False
) -> Any:
    """Stack the parts of a sequence; with ``only_first`` no other part may hold strings."""
    first = values[0]
    for position, value in enumerate(values):
        is_sequence = isinstance(value, (tuple, list))
        if not is_sequence or len(value) != len(first):
            received = f"{len(value)} parts" if is_sequence else type(value).__name__
            raise DataError(
                "All samples must have the same number of parts. Sample 0 of the batch has "
                f"{len(first)}, sample {position} differs. Received: {path} with {received}"
            )
    columns = enumerate(zip(*values, strict=True))
    return rebuild_sequence(
        first,
        [
            _collate(column, f"{path}[{i}]", strings and not (only_first and i))
            for i, column in columns
        ],
    )


def _row(array: np.ndarray) -> np.ndarray:
    """A row of a sparse matrix, which has two axes in SciPy, as a vector."""
    return array[0] if array.ndim == 2 and len(array) == 1 else array


def _stack_field(values: Sequence[Any], path: str, strings: bool) -> np.ndarray:
    """Stack the arrays of one field, which must have the same shape."""
    if any(value is None for value in values):
        position = next(i for i, value in enumerate(values) if value is None)
        raise DataError(
            f"{path} is None in sample {position} of the batch. Fill missing values or remove the "
            "column."
        )
    whole = [as_array(value, path, strings) for value in values]
    arrays = [
        cast(_row(a) if is_sparse_matrix(v) else a) for a, v in zip(whole, values, strict=True)
    ]
    shape = arrays[0].shape
    for position, array in enumerate(arrays):
        if array.shape != shape:
            raise DataError(
                f"{path} differs in shape from sample to sample: {shape} in sample 0 of the batch, "
                f"{array.shape} in sample {position}. Pad all samples to one length, or pass a "
                "data_collator that pads each batch."
            )
    # int64 stacked with float32 promotes to float64, hence the second cast.
    return cast(np.stack(arrays))


default_data_collator = default_collate
"""Transformers' name of the default collator."""
