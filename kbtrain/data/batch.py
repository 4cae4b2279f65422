"""Batches: their structure, parts, sizes and signatures.

A batch is the user's data with a leading batch dimension: ``(x,)``, ``(x, y)``,
``(x, y, sample_weight)``, a dict of arrays, or a bare array. ``x`` and ``y`` may be nested.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from kbtrain.data.ragged import Ragged, as_ragged, has_ragged, is_ragged
from kbtrain.data.tree import (
    as_array,
    cast,
    is_list_of_numbers,
    leaves_with_paths,
    map_raw,
    map_structure,
    to_numpy,
)
from kbtrain.errors import DataError

LABEL_KEYS = ("labels", "label", "label_ids")
"""The keys under which a dict may hold its targets, as in Transformers."""

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


@dataclass(frozen=True)
class LabelKeys:
    """Which keys of a dict are targets and sample weights rather than inputs.

    Attributes:
        names: Keys that hold targets, in place of the usual ones; several become a dict. An empty
            tuple means that a dict has inputs only. None for the usual keys.
        inputs: Names of the model's inputs. Values with these names are always inputs, and also
            targets if they are among ``names``.
        strings: Whether inputs may be strings or ragged tensors, as in models on TensorFlow.
    """

    names: tuple[str, ...] | None = None
    inputs: frozenset[str] = frozenset()
    strings: bool = False

    def of(self, batch: Mapping[Any, Any]) -> list[str]:
        """The keys of ``batch`` that hold targets.

        Raises:
            DataError: Only some of the ``names`` are there, or several of the usual keys.
        """
        named = [key for key in self.names or () if key in batch]
        if named and len(named) < len(self.names or ()):
            raise DataError(
                f"label_names={list(self.names or ())} are the targets of a batch, but it has only "
                f"some of them. Give all or none. Received: keys {list(batch)}"
            )
        if named or self.names == ():
            return named
        usual = [key for key in LABEL_KEYS if key in batch and key not in self.inputs]
        if len(usual) > 1:
            raise DataError(
                f"A batch may hold its targets under one of the keys {LABEL_KEYS}, not under "
                f"several. Remove or rename the others. Received: {usual}"
            )
        return usual

    def weight_of(self, batch: Mapping[Any, Any]) -> str | None:
        """The key of ``batch`` that holds sample weights; None if there is none."""
        is_input = self.names == () or SAMPLE_WEIGHT_KEY in self.inputs
        return None if is_input or SAMPLE_WEIGHT_KEY not in batch else SAMPLE_WEIGHT_KEY

    def taken(self, batch: Any) -> list[str]:
        """The keys that are removed from the inputs."""
        if not isinstance(batch, Mapping):
            return []
        keys = [*self.of(batch), *filter(None, [self.weight_of(batch)])]
        return [key for key in keys if key not in self.inputs]


LabelNames = LabelKeys | Sequence[str] | None
"""Which keys hold targets; functions also accept only the names."""


def label_keys(label_names: LabelNames) -> LabelKeys:
    """``label_names`` as ``LabelKeys``."""
    if isinstance(label_names, LabelKeys):
        return label_names
    return LabelKeys(None if label_names is None else tuple(label_names))


def unpack(batch: Any, label_names: LabelNames = None) -> Batch:
    """Split a batch into inputs, targets and sample weights.

    Nothing is converted, so this works for both arrays and tensors.

    Args:
        batch: ``(x,)``, ``(x, y)`` or ``(x, y, sample_weight)`` as a tuple or list; a dict, whose
            key ``"labels"`` (or ``"label"``, ``"label_ids"``) holds the targets and
            ``"sample_weight"`` the weights; or a bare array, which is ``x``.
        label_names: Keys of a dict that hold targets, in place of those; several become a dict. If
            a dict has none of them, the argument is ignored. An empty list means that a dict has
            inputs only. ``LabelKeys`` also has the names of the model's inputs.

    Returns:
        The parts; missing ones are ``None``.

    Raises:
        DataError: The tuple has no or more than three parts, or the dict has several label keys,
            only some of the ``label_names``, or only labels.

    Example:
        >>> import numpy as np
        >>> parts = unpack({"tokens": np.zeros((2, 3)), "labels": np.array([0, 1])})
        >>> sorted(parts.x), parts.y, parts.sample_weight
        (['tokens'], array([0, 1]), None)
    """
    if isinstance(batch, Mapping):
        return _unpack_dict(batch, label_keys(label_names))
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


def _unpack_dict(batch: Mapping[Any, Any], keys: LabelKeys) -> Batch:
    labels, weight, taken = keys.of(batch), keys.weight_of(batch), keys.taken(batch)
    inputs = {key: value for key, value in batch.items() if key not in taken}
    if not inputs:
        raise DataError(
            "A batch needs at least one input besides targets and sample weights. "
            f"Received: keys {list(batch)}"
        )
    y = {key: batch[key] for key in labels}
    return Batch(
        inputs,
        y if len(y) > 1 else next(iter(y.values()), None),
        None if weight is None else batch[weight],
    )


def nesting_hint(batch: Any) -> str:
    """A hint on how a batch of three parts was interpreted, for messages about a mismatch."""
    if not isinstance(batch, tuple) or len(batch) != 3 or batch[2] is None:
        return ""
    return (
        " A batch of three is read as (x, y, sample_weight). Two inputs and labels are nested: "
        "((x1, x2), y)."
    )


def to_batch(value: Any, name: str = "batch", label_names: LabelNames = None) -> Any:
    """Convert the output of a collator or a user's own loader to a batch of NumPy arrays.

    Args:
        value: A batch of arrays, tensors or lists of numbers. A list of parts, as torch's default
            collation returns for tuples, becomes a tuple.
        name: Its name in error messages.
        label_names: Which keys of a dict hold targets, see ``unpack``.

    Returns:
        The batch; every array has at least one dimension, and ``count_samples`` accepts it.

    Raises:
        DataError: ``value`` is not a valid batch.
    """
    strings = label_keys(label_names).strings
    convert = _to_arrays if strings else to_numpy
    if isinstance(value, tuple):
        batch = tuple(convert(part, f"{name}[{i}]") for i, part in enumerate(value))
    elif isinstance(value, list) and not is_list_of_numbers(value):
        return to_batch(tuple(value), name, label_names)
    else:
        batch = convert(value, name)
    batch = with_ragged_inputs(batch, name, label_names)
    count_samples(batch, label_names)
    return batch


def _to_arrays(value: Any, name: str) -> Any:
    """Like ``to_numpy``, but also accepts strings and ragged tensors of TensorFlow."""

    def convert(leaf: Any, path: str) -> Any:
        return as_ragged(leaf) if is_ragged(leaf) else cast(as_array(leaf, path, strings=True))

    return map_raw(convert, value, name)


def with_ragged_inputs(batch: Any, name: str, label_names: LabelNames = None) -> Any:
    """Prepare a batch, or all data, with ragged tensors for ``unpack``.

    Raises:
        DataError: Labels or sample weights are ragged.
    """
    if not has_ragged(batch):
        return batch
    if isinstance(batch, Ragged):
        return (batch,)
    parts = unpack(batch, label_names)
    for part, value in zip(_PARTS[1:], parts[1:], strict=True):
        if has_ragged(value):
            raise DataError(
                f"{name}: {part} is a RaggedTensor, but losses and metrics need arrays. Only "
                "inputs may be ragged: pad it (to_tensor()), and pass sample weights of 0 for the "
                "padding."
            )
    return batch


def named_leaves(batch: Any) -> Iterator[tuple[str, Any]]:
    """Yield ``(name, leaf)`` for every array of a batch, with names such as ``x['tokens']``."""
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
        DataError: There is no array, one is a scalar, or the lengths differ; the message has the
            names and shapes of the arrays.
    """
    return common_length(list(named_leaves(batch)), "The arrays of a batch")


def count_samples(batch: Any, label_names: LabelNames = None) -> int:
    """Return the number of samples in a batch made by a collator or a user's loader.

    Several inputs may differ in length, like the nodes and edges of a batch of graphs. Then the
    labels (or sample weights) count the samples, or without them the first input.

    Args:
        batch: A batch of arrays or tensors.
        label_names: Which keys of a dict hold targets, see ``unpack``.

    Raises:
        DataError: See ``batch_size``; or the labels and weights differ in length, or differ from a
            single input.
    """
    leaves = list(named_leaves(batch))
    if len({leaf.shape[:1] for _, leaf in leaves}) > 1 and all(leaf.shape for _, leaf in leaves):
        parts = unpack(batch, label_names)
        inputs = list(leaves_with_paths(parts.x, "x"))
        counted = [*leaves_with_paths(parts.y, "y")]
        counted += leaves_with_paths(parts.sample_weight, "sample_weight")
        if len(inputs) > 1:
            return common_length(counted or inputs[:1], "The labels and weights of a batch")
    return common_length(leaves, "The arrays of a batch")


def counting_leaf(x: Any, y: Any = None, sample_weight: Any = None) -> Any:
    """The array of a batch whose first dimension counts the samples, see ``count_samples``."""
    return next(leaf for part in (y, sample_weight, x) for _, leaf in leaves_with_paths(part))


def common_length(leaves: list[tuple[str, Any]], subject: str) -> int:
    """Return the first dimension that all ``(name, array)`` pairs share, or raise a DataError."""
    shapes = {leaf.shape[0] if leaf.shape else None for _, leaf in leaves}
    if len(shapes) == 1:
        (length,) = shapes
        if length is not None:
            return int(length)
    if not leaves:
        raise DataError(f"{subject} are missing. Received: an empty structure")
    listing = ", ".join(f"{name}: {tuple(leaf.shape)}" for name, leaf in leaves)
    if None in shapes:
        raise DataError(
            f"{subject} need a first dimension that counts the samples, but a scalar has none. "
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
        A hashable value that is equal for two batches if and only if they can use the same compiled
        step. The order of a dict's keys does not matter.
    """
    return _outline(batch, 0)


def stack(batches: Sequence[Any]) -> Any:
    """Stack equally shaped batches along a new leading axis, for several steps in one call.

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
        batches: Structures of arrays that differ at most in the first dimension.

    Returns:
        One structure with all samples, in order.

    Raises:
        DataError: There are no batches, or they differ in more than the first dimension.
    """
    _check_alike("concatenate", batches, first_axis=1)
    return map_structure(lambda *arrays: np.concatenate(arrays), *batches)


def _outline(batch: Any, first_axis: int) -> Hashable:
    """Return structure, dtypes, and shapes starting at ``first_axis``."""
    if isinstance(batch, Mapping):
        keys = sorted(batch, key=str)
        return ("dict", *[(key, _outline(batch[key], first_axis)) for key in keys])
    if isinstance(batch, (tuple, list)):
        kind = "list" if isinstance(batch, list) else "tuple"
        return (kind, *[_outline(value, first_axis) for value in batch])
    return None if batch is None else (tuple(batch.shape[first_axis:]), batch.dtype)


def _check_alike(verb: str, batches: Sequence[Any], first_axis: int) -> None:
    """Raise a ``DataError`` unless all batches have the same outline."""
    if not batches:
        raise DataError(f"Expected at least one batch to {verb}. Received: none")
    expected = _outline(batches[0], first_axis)
    for position, batch in enumerate(batches):
        if _outline(batch, first_axis) != expected:
            raise DataError(
                f"Batches to {verb} must agree in structure, shapes and dtypes. Batch {position} "
                f"differs from batch 0. Received: {_describe_leaves(batches[0])} and "
                f"{_describe_leaves(batch)}"
            )


def _describe_leaves(batch: Any) -> str:
    leaves = [
        f"{path or 'x'}: {leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves_with_paths(batch)
    ]
    return "{" + ", ".join(leaves) + "}"
