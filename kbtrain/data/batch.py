"""What a batch is, and the few questions asked of one.

A batch is the user's data with a leading batch dimension: ``(x,)``, ``(x, y)``,
``(x, y, sample_weight)``, a dict of arrays, or a bare array. ``x`` and ``y`` may be nested.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from kbtrain.data.structure import (
    is_list_of_numbers,
    leaves_with_paths,
    map_structure,
    to_numpy,
)
from kbtrain.errors import DataError

LABEL_KEYS = ("labels", "label", "label_ids")
"""The keys under which a dict may hold its targets, as in the reference."""

SAMPLE_WEIGHT_KEY = "sample_weight"
_PARTS = ("x", "y", "sample_weight")


class Batch(NamedTuple):
    """The three parts of a batch.

    Attributes:
        x: Inputs of the model.
        y: Targets, or ``None``.
        sample_weight: Weights of the samples (or of their elements), or ``None``.
    """

    x: Any
    y: Any = None
    sample_weight: Any = None


def unpack(batch: Any, label_names: Sequence[str] | None = None) -> Batch:
    """Split a batch into inputs, targets and sample weights.

    Nothing is converted, so this works on arrays and on tensors alike.

    Args:
        batch: ``(x,)``, ``(x, y)`` or ``(x, y, sample_weight)`` as a tuple or list; a dict, whose
            key ``"labels"`` (or ``"label"``, ``"label_ids"``) holds the targets and
            ``"sample_weight"`` the weights; or a bare array, which is ``x``.
        label_names: Keys of a dict that hold targets in place of those; several become a dict. A
            dict with none of them is read as without this argument.

    Returns:
        The parts; those that are absent are ``None``.

    Raises:
        DataError: The tuple has no or more than three parts, or the dict has several label keys,
            some of the ``label_names`` only, or nothing but labels.

    Example:
        >>> import numpy as np
        >>> parts = unpack({"tokens": np.zeros((2, 3)), "labels": np.array([0, 1])})
        >>> sorted(parts.x), parts.y, parts.sample_weight
        (['tokens'], array([0, 1]), None)
    """
    if isinstance(batch, Mapping):
        return _unpack_dict(batch, label_names or ())
    if isinstance(batch, (tuple, list)):
        if not 1 <= len(batch) <= 3:
            raise DataError(
                "A batch that is a tuple is read as (x,), (x, y) or (x, y, sample_weight). Nest "
                f"several inputs, as in ((x1, x2), y), or use a dict. Received: {len(batch)} parts"
            )
        return Batch(*batch)
    if batch is None:
        raise DataError("Expected a batch of arrays. Received: None")
    return Batch(batch)


def _unpack_dict(batch: Mapping[Any, Any], label_names: Sequence[str]) -> Batch:
    named = {key: batch[key] for key in label_names if key in batch}
    label_keys = list(named) or [key for key in LABEL_KEYS if key in batch]
    if named and len(named) < len(label_names):
        raise DataError(
            f"label_names={list(label_names)} are the targets of a batch, but it has only some of "
            f"them. Give all or none. Received: keys {list(batch)}"
        )
    if not named and len(label_keys) > 1:
        raise DataError(
            f"A batch may hold its targets under one of the keys {LABEL_KEYS}, not under several. "
            f"Remove or rename the others. Received: {label_keys}"
        )
    taken = {*label_keys, SAMPLE_WEIGHT_KEY}
    inputs = {key: value for key, value in batch.items() if key not in taken}
    if not inputs:
        raise DataError(
            "A batch needs at least one input besides targets and sample weights. "
            f"Received: keys {list(batch)}"
        )
    labels = batch[label_keys[0]] if label_keys else None
    if len(named) > 1:
        labels = named
    return Batch(inputs, labels, batch.get(SAMPLE_WEIGHT_KEY))


def to_batch(value: Any, name: str = "batch") -> Any:
    """Normalise what a collator or a user's own loader returned into a batch of NumPy arrays.

    Args:
        value: A batch of arrays, tensors or lists of numbers. A list of parts, which is what
            torch's default collation returns for tuples, becomes a tuple.
        name: How error messages call it.

    Returns:
        The batch; every array has at least one dimension and all have the same first one.

    Raises:
        DataError: ``value`` is no batch.
    """
    if isinstance(value, tuple):
        batch = tuple(to_numpy(part, f"{name}[{i}]") for i, part in enumerate(value))
    elif isinstance(value, list) and not is_list_of_numbers(value):
        return to_batch(tuple(value), name)
    else:
        batch = to_numpy(value, name)
    batch_size(batch)
    return batch


def named_leaves(batch: Any) -> Iterator[tuple[str, Any]]:
    """Yield ``(name, leaf)`` for every array of a batch, named as a user thinks of it."""
    if isinstance(batch, (tuple, list)):
        for part, value in zip(_PARTS, unpack(batch), strict=True):
            yield from leaves_with_paths(value, part)
    else:
        yield from leaves_with_paths(batch, "" if isinstance(batch, Mapping) else "x")


def batch_size(batch: Any) -> int:
    """Return the number of samples in a batch.

    Args:
        batch: A batch of arrays or tensors.

    Returns:
        The length of the first dimension, which all arrays share.

    Raises:
        DataError: There is no array, one has no dimension, or the lengths differ; the message
            names the arrays and their shapes.
    """
    return common_length(list(named_leaves(batch)), "The arrays of a batch")


def common_length(leaves: list[tuple[str, Any]], subject: str) -> int:
    """Return the first dimension that all ``(name, array)`` pairs share, or raise a DataError."""
    shapes = {leaf.shape[0] if leaf.shape else None for _, leaf in leaves}
    if len(shapes) == 1:
        (length,) = shapes
        if length is not None:
            return int(length)
    if not leaves:
        raise DataError(f"{subject} were expected, and there is none. Received: an empty structure")
    listing = ", ".join(f"{name}: {tuple(leaf.shape)}" for name, leaf in leaves)
    if None in shapes:
        raise DataError(
            f"{subject} need a first dimension that counts the samples, and a scalar has none. "
            f"Received: shapes {listing}"
        )
    raise DataError(
        f"{subject} must have the same length: their first dimension counts the samples. (Several "
        f"inputs of a model are nested, as in ((x1, x2), y).) Received: shapes {listing}"
    )


def signature(batch: Any) -> Hashable:
    """Return what a compiled step depends on: structure, shapes and dtypes, never values.

    Args:
        batch: A batch of arrays or tensors.

    Returns:
        A hashable value, equal for two batches exactly when the same compiled step serves both. The
        order of a dict's keys does not matter.
    """
    return _outline(batch, 0)


def stack(batches: Sequence[Any]) -> Any:
    """Put equally shaped batches on a new leading axis, as several steps in one call take them.

    Args:
        batches: K batches with the same signature.

    Returns:
        One structure whose arrays have the shape ``(K, batch, ...)``.

    Raises:
        DataError: There are no batches, or their structures, shapes or dtypes differ.
    """
    _check_alike("stack", batches, first_axis=0)
    return map_structure(lambda *arrays: np.stack(arrays), *batches)


def concatenate(batches: Sequence[Any]) -> Any:
    """Join batches along their first axis.

    Args:
        batches: Structures of arrays that differ in the first dimension at most.

    Returns:
        One structure with the samples of all, in order.

    Raises:
        DataError: There are no batches, or something besides the first dimension differs.
    """
    _check_alike("concatenate", batches, first_axis=1)
    return map_structure(lambda *arrays: np.concatenate(arrays), *batches)


def _outline(batch: Any, first_axis: int) -> Hashable:
    """Return structure, dtypes, and shapes from ``first_axis`` on."""
    if isinstance(batch, Mapping):
        keys = sorted(batch, key=str)
        return ("dict", *[(key, _outline(batch[key], first_axis)) for key in keys])
    if isinstance(batch, (tuple, list)):
        kind = "list" if isinstance(batch, list) else "tuple"
        return (kind, *[_outline(value, first_axis) for value in batch])
    return None if batch is None else (tuple(batch.shape[first_axis:]), batch.dtype)


def _check_alike(verb: str, batches: Sequence[Any], first_axis: int) -> None:
    """Raise a DataError unless all batches have one outline."""
    if not batches:
        raise DataError(f"Expected at least one batch to {verb}. Received: none")
    expected = _outline(batches[0], first_axis)
    for position, batch in enumerate(batches):
        if _outline(batch, first_axis) != expected:
            raise DataError(
                f"Batches to {verb} must agree in structure, shapes and dtypes. Batch {position} "
                f"differs from batch 0. Received: {_describe(batches[0])} and {_describe(batch)}"
            )


def _describe(batch: Any) -> str:
    leaves = [
        f"{path or 'x'}: {leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves_with_paths(batch)
    ]
    return "{" + ", ".join(leaves) + "}"
