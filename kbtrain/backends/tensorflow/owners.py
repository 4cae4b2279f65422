"""TensorFlow: sums that one process needs, and values that one process has.

Both go in buckets, so that no process holds a second copy of all gradients or weights. TensorFlow's
reduce-scatter needs NCCL; what its ring of gRPC has is an exchange of rows between all processes,
which sends the same bytes, and each process adds up the rows that it gets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow as tf

from kbtrain.backends.buckets import BUCKET_BYTES, Parts, buckets_of, parts_of
from kbtrain.backends.tensorflow.collectives import Members, flat_of, gather_from, split, summed_in


def reduce_to_owners(members: Members, tensors: Sequence[Any], owners: Sequence[int]) -> list[Any]:
    """The sums over all processes of the tensors that this one owns; None for the others."""
    tensors = [tf.convert_to_tensor(tensor) for tensor in tensors]
    # One without elements is in no bucket, and is its own sum.
    results = [t if o == members.rank else None for t, o in zip(tensors, owners, strict=True)]
    for bucket, parts in _buckets(members, tensors, owners):
        dtype = tensors[bucket[0]].dtype
        if parts.is_balanced:
            rows = tf.stack([_row(tensors, parts, rank) for rank in range(members.size)])
            received = tf.cast(members.exchange_rows(rows), summed_in(dtype))
            mine, total = parts.indices[members.rank], tf.reduce_sum(received, 0)
        else:
            mine = bucket
            total = members.reduce(tf.cast(flat_of([tensors[i] for i in bucket]), summed_in(dtype)))
        total = tf.cast(total, dtype)
        for i, value in zip(mine, split(total, [tensors[i] for i in mine]), strict=True):
            if owners[i] == members.rank:
                results[i] = value
    return results


def values_of_owners(members: Members, tensors: Sequence[Any], owners: Sequence[int]) -> list[Any]:
    """Each tensor as its owner has it, bit for bit."""
    tensors = [tf.convert_to_tensor(tensor) for tensor in tensors]
    results: list[Any] = list(tensors)
    for bucket, parts in _buckets(members, tensors, owners):
        if parts.is_balanced:
            row = _row(tensors, parts, members.rank)
            sent = tf.unstack(gather_from(members, [row])[0])
            rows = list(zip(parts.indices, sent, strict=True))
        else:
            own = [i for i in bucket if owners[i] == members.rank]
            flat = flat_of([tensors[i] if i in own else tf.zeros_like(tensors[i]) for i in bucket])
            rows = [(bucket, _only_one(members, flat))]
        for indices, row in rows:
            values = split(row, [tensors[i] for i in indices])
            for i, value in zip(indices, values, strict=True):
                if owners[i] != members.rank:
                    results[i] = value
    return results


def _only_one(members: Members, flat: Any) -> Any:
    """A tensor of which each element is zero in all processes but one, as that one has it.

    The bits are added up as integers: a sum of floats would turn -0.0 to 0.0.
    """
    elements, together = flat.shape[0], 8 // flat.dtype.size
    filled = tf.pad(flat, [[0, -elements % together]])
    wide = tf.reshape(filled, [-1, together] if together > 1 else [-1])
    added = tf.bitcast(members.reduce(tf.bitcast(wide, tf.int64)), flat.dtype)
    return tf.reshape(added, [-1])[:elements]


def _buckets(
    members: Members, tensors: Sequence[Any], owners: Sequence[int]
) -> Iterator[tuple[list[int], Parts]]:
    elements = [tensor.shape.num_elements() for tensor in tensors]
    dtypes = [tensor.dtype for tensor in tensors]
    sizes = [n * dtype.size for n, dtype in zip(elements, dtypes, strict=True)]
    for bucket in buckets_of(dtypes, sizes, BUCKET_BYTES):
        if any(elements[i] for i in bucket):  # or TensorFlow would end the process
            yield bucket, parts_of(bucket, owners, elements, members.size)


def _row(tensors: Sequence[Any], parts: Parts, owner: int) -> Any:
    """The tensors of one owner as a flat one, filled up to the width of the others."""
    indices = parts.indices[owner]
    missing = parts.width - parts.sizes[owner]
    dtype = next(tensors[i].dtype for part in parts.indices for i in part)
    filling = [tf.zeros((missing,), dtype)] if missing else []
    return flat_of([*(tensors[i] for i in indices), *filling])
