"""Helpers of the sequence collators: fields, lengths and padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kbtrain.data.batch import LABEL_KEYS, LabelKeys, LabelNames, label_keys
from kbtrain.data.tree import as_array, cast
from kbtrain.errors import ConfigurationError, DataError

IGNORED = -100
"""The label that losses of kbtrain ignore, as in Transformers."""


def fields(samples: Sequence[Any], label_names: LabelNames = None) -> dict[str, list[np.ndarray]]:
    """The samples' fields, each as a list of arrays; labels under the key ``"labels"``.

    Args:
        samples: Dicts with the same keys, or sequences of token ids (``"input_ids"``).
        label_names: Which keys hold targets, see ``kbtrain.data.unpack``: an input of the model
            keeps its name.

    Raises:
        DataError: There is no sample, their keys differ, or a value is not an array.
    """
    if not samples:
        raise DataError("Expected at least one sample to collate. Received: none")
    if not isinstance(samples[0], Mapping):
        if isinstance(samples[0], tuple):
            raise DataError(
                "This collator accepts dicts such as {'input_ids': [...], 'labels': ...}, or lists "
                "of token ids. Received: a tuple"
            )
        samples = [{"input_ids": sample} for sample in samples]
    keys = list(samples[0])
    for position, sample in enumerate(samples):
        if not isinstance(sample, Mapping) or sample.keys() != samples[0].keys():
            received = list(sample) if isinstance(sample, Mapping) else type(sample).__name__
            raise DataError(
                f"All samples must have the same keys. Sample 0 of the batch has {keys}, sample "
                f"{position} differs. Received: {received}"
            )
    columns = {}
    known = label_keys(label_names)
    for key in keys:
        name = LABEL_KEYS[0] if _is_alias(key, known) else str(key)
        if name in columns:
            raise DataError(f"A sample may have one of the keys {LABEL_KEYS}. Received: {keys}")
        columns[name] = _alike([as_array(sample[key], f"sample[{key!r}]") for sample in samples])
    if "input_ids" in columns:
        columns["input_ids"] = widened(columns["input_ids"])
    return columns


def widened(arrays: list[np.ndarray]) -> list[np.ndarray]:
    """Token ids or labels in int32, or int64 where they are wider, so that -100 can be stored."""
    dtype = arrays[0].dtype
    if dtype.kind not in "biu" or dtype in (np.int32, np.int64):
        return arrays
    wide = np.int32 if np.can_cast(dtype, np.int32) else np.int64
    return [array.astype(wide) for array in arrays]


def _is_alias(key: Any, known: LabelKeys) -> bool:
    """Whether a key is one of the usual names of the labels."""
    return (
        key in LABEL_KEYS
        and known.names != ()  # an empty tuple means that a dict has inputs only
        and known.inputs.isdisjoint((key, LABEL_KEYS[0]))
    )


def _alike(arrays: list[np.ndarray]) -> list[np.ndarray]:
    """Cast arrays to a common dtype; empty ones are ignored, because NumPy makes them float64."""
    kinds = {array.dtype for array in arrays if array.size} or {np.dtype(np.int64)}
    common = kinds.pop() if len(kinds) == 1 else np.result_type(*kinds)
    return [cast(array.astype(common, copy=False)) for array in arrays]


def lengths(columns: Mapping[str, Sequence[np.ndarray]]) -> list[int]:
    """The number of tokens in each sample.

    Raises:
        DataError: ``"input_ids"`` is missing, or is a number instead of a list.
    """
    if "input_ids" not in columns:
        raise DataError(
            "Samples need the field 'input_ids', whose length is that of the sample. "
            f"Received: {list(columns)}"
        )
    for position, ids in enumerate(columns["input_ids"]):
        if ids.ndim == 0:
            raise DataError(
                f"'input_ids' of each sample must be a list of token ids. Received: {ids} in "
                f"sample {position} of the batch"
            )
    return [len(ids) for ids in columns["input_ids"]]


def stack_field(name: str, arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Stack arrays of equal shapes.

    Raises:
        DataError: The shapes differ; the message says how to pad them.
    """
    if len({array.shape for array in arrays}) > 1:
        shapes = sorted({array.shape for array in arrays})
        raise DataError(
            f"{name!r} differs in shape from sample to sample, and this collator has no padding "
            f"value for it. Pass padding_values={{{name!r}: ...}}, or remove the column. "
            f"Received: shapes {shapes[:4]}"
        )
    return cast(np.stack(arrays))


def pad(arrays: Sequence[np.ndarray], value: float, length: int, side: str = "right") -> np.ndarray:
    """Pad arrays of different lengths on one side and stack them.

    Args:
        arrays: Arrays of shape ``(n, ...)`` that differ only in ``n``.
        value: The padding value.
        length: The common length, at least the largest ``n``.
        side: ``"right"`` or ``"left"``.

    Returns:
        An array of shape ``(len(arrays), length, ...)``, of a wider dtype if that of the arrays
        cannot hold the padding value.

    Raises:
        DataError: The arrays hold integers, and the padding value is none.

    Example:
        >>> pad([np.array([1, 2]), np.array([3])], value=0, length=3).tolist()
        [[1, 2, 0], [3, 0, 0]]
    """
    arrays = _with_room_for(value, list(arrays))
    result = np.full((len(arrays), length, *arrays[0].shape[1:]), value, arrays[0].dtype)
    for row, array in zip(result, arrays, strict=True):
        if side == "right":
            row[: len(array)] = array
        else:
            row[length - len(array) :] = array
    return result


def _with_room_for(value: float, arrays: list[np.ndarray]) -> list[np.ndarray]:
    """The arrays in a dtype that can hold a padding value."""
    dtype = arrays[0].dtype
    if dtype.kind not in "biu":
        return arrays
    if not float(value).is_integer():
        raise DataError(f"Integers ({dtype}) cannot be padded with {value!r}: pass an integer.")
    low, high = (0, 1) if dtype.kind == "b" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    return arrays if low <= value <= high else widened(arrays)


def round_up(length: int, multiple: int | None) -> int:
    """Round up to a multiple of ``multiple``; None returns ``length``."""
    return length if multiple is None else -(-length // multiple) * multiple


def check_positive(name: str, value: int | None) -> None:
    """Raise a ``ConfigurationError`` unless ``value`` is None or an integer of at least 1."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ConfigurationError(
            f"{name} must be an integer of at least 1, or None. Received: {name}={value!r}"
        )


def token_id(name: str, given: int | None, tokenizer: Any) -> int:
    """A token id: the given one, or the tokenizer's attribute of that name.

    Raises:
        ConfigurationError: Neither is available.
    """
    value = getattr(tokenizer, name, None) if given is None else given
    if value is None:
        missing = "" if tokenizer is None else f" {type(tokenizer).__name__} has none."
        raise ConfigurationError(
            f"This collator needs {name}. Pass it, or a tokenizer that has it.{missing} "
            f"Received: {name}=None"
        )
    return int(value)
