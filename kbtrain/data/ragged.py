"""``tf.RaggedTensor`` in a batch: padded arrays and the lengths of their rows.

The processing of batches (order, blocks, the copy to the device) requires arrays of equal shapes.
The step removes the padding before the model gets the batch, so it does not affect results. Its
width is a power of two, because the step is compiled again for each new width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from kbtrain.data.tree import cast, rebuild_sequence


class Ragged(NamedTuple):
    """A ragged tensor as arrays.

    Attributes:
        dense: The values, padded: ``(samples, width, ...)``.
        lengths: The lengths of the rows, ``(samples,)``, and for each further ragged axis the
            padded lengths along it: ``(samples, width)``, ...
    """

    dense: Any
    lengths: tuple[Any, ...]


def is_ragged(value: Any) -> bool:
    """Whether ``value`` is a ``tf.RaggedTensor``, without importing TensorFlow."""
    return type(value).__name__ == "RaggedTensor" and hasattr(value, "row_lengths")


def as_ragged(value: Any) -> Ragged:
    """Convert a ``tf.RaggedTensor`` to arrays."""
    rank = value.ragged_rank
    lengths = [np.asarray(value.row_lengths())]
    for axis in range(2, rank + 1):
        lengths.append(np.asarray(value.row_lengths(axis=axis).to_tensor()))
    widths = [1 << (max(1, int(each.max(initial=0))) - 1).bit_length() for each in lengths]
    inner = [None] * (len(value.shape) - 1 - rank)
    dense = cast(np.asarray(value.to_tensor(shape=[None, *widths, *inner])))
    padded = [
        np.pad(each, [(0, 0), *((0, w - n) for w, n in zip(widths, each.shape[1:], strict=False))])
        for each in lengths
    ]
    return Ragged(dense, tuple(padded))


def has_ragged(structure: Any) -> bool:
    """Whether a structure contains a ``Ragged``."""
    if isinstance(structure, Ragged):
        return True
    if isinstance(structure, dict):
        return any(map(has_ragged, structure.values()))
    return isinstance(structure, (tuple, list)) and any(map(has_ragged, structure))


def map_ragged(function: Any, structure: Any) -> Any:
    """Replace each ``Ragged`` in a structure by ``function(dense, lengths)``."""
    if not has_ragged(structure):
        return structure
    if isinstance(structure, Ragged):
        return function(*structure)
    if isinstance(structure, dict):
        return {key: map_ragged(function, value) for key, value in structure.items()}
    return rebuild_sequence(structure, [map_ragged(function, item) for item in structure])
