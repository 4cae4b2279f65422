"""Which tensors travel together between processes: buckets, and the part of each owner in one."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

BUCKET_BYTES = 25 << 20
"""Size of a bucket, as in DistributedDataParallel."""

IMBALANCE = 1.5
"""How much larger than its tensors a bucket may be with the parts of all owners made equal."""


def buckets_of(dtypes: Sequence[Hashable], sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Indices of the tensors that travel together, of one dtype each.

    The last come first, as the backward pass computes the gradients of the last layers first.

    Args:
        dtypes: The dtype of each tensor.
        sizes: The bytes of each.
        limit: Bytes of a bucket; a larger tensor has one of its own.

    Example:
        >>> buckets_of(["float32"] * 4, [8, 8, 16, 8], 16)
        [[3], [2], [1, 0]]
    """
    buckets: list[list[int]] = []
    open_ones: dict[Hashable, tuple[list[int], int]] = {}
    for i in reversed(range(len(sizes))):
        indices, held = open_ones.get(dtypes[i], ([], limit))
        if held + sizes[i] > limit:
            indices, held = [], 0
            buckets.append(indices)
        indices.append(i)
        open_ones[dtypes[i]] = indices, held + sizes[i]
    return buckets


@dataclass(frozen=True)
class Parts:
    """A bucket, divided by owner.

    Attributes:
        indices: The tensors of each owner.
        sizes: The number of their elements.
    """

    indices: list[list[int]]
    sizes: list[int]

    @property
    def width(self) -> int:
        """The elements of the largest part, to which all are filled up."""
        return max(self.sizes)

    @property
    def is_balanced(self) -> bool:
        """Whether filling up the parts is worth it."""
        return self.width * len(self.sizes) <= IMBALANCE * sum(self.sizes)


def parts_of(
    bucket: Sequence[int], owners: Sequence[int], elements: Sequence[int], processes: int
) -> Parts:
    """Divide a bucket by owner.

    Args:
        bucket: Indices of its tensors.
        owners: The rank of the owner of each tensor, in the bucket or not.
        elements: The number of elements of each.
        processes: Number of processes.
    """
    parts = [[i for i in bucket if owners[i] == rank] for rank in range(processes)]
    return Parts(parts, [sum(elements[i] for i in part) for part in parts])
