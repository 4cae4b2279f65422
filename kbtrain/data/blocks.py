"""Blocks: the batches of several updates, stacked for one call to the device."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Generator, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kbtrain.data.batch import LabelNames, count_samples, named_leaves, signature, stack
from kbtrain.data.loader import DataLoader, Loader
from kbtrain.data.prefetch import Prefetched
from kbtrain.data.shape_monitor import ShapeMonitor
from kbtrain.data.tree import map_structure

MAX_BLOCK = 64
"""Maximum number of updates in a block."""

BLOCK_BYTES = 1 << 20
"""Maximum size of a block with more than one update."""


@dataclass(frozen=True)
class Block:
    """Several updates of equal shapes.

    Attributes:
        chunks: The input of the train step, with the updates along a new leading axis: a list of
            ``{"single": micro_batch}`` and ``{"stacked": micro_batches along one more axis}``.
        capacity: Length of the leading axis; entries from ``updates`` on are padding.
        updates: Updates in the block.
        micro_batches: Micro-batches of each update.
        samples: Total number of samples.
        outline: Structure, shapes and dtypes of each update's micro-batches.
    """

    chunks: list[dict[str, Any]]
    capacity: int
    updates: int
    micro_batches: int
    samples: int
    outline: Hashable


def micro_batches(chunks: Sequence[Mapping[str, Any]], update: int) -> Iterator[Any]:
    """The micro-batches of one update, sliced from a block's chunks.

    Args:
        chunks: ``Block.chunks``.
        update: Index of the update in the block.
    """
    for chunk in chunks:
        for kind, rows in chunk.items():
            batch = map_structure(lambda x: np.asarray(x[update]), rows)
            if kind == "single":
                yield batch
                continue
            for i in range(len(next(named_leaves(batch))[1])):
                yield map_structure(lambda x, i=i: x[i], batch)


class Batches:
    """The micro-batches of a loader, from any position, in blocks.

    The first batch can be inspected before training (to build the model from its shapes). It is
    kept, because a generator could not produce it a second time.

    Arrays are read a block at a time, and prefetched by a thread if that is slow (large batches,
    arrays on disk). Data that runs user code is read in the calling thread: the code may draw from
    the global random generators, whose state is part of a checkpoint, or be bound to one thread. A
    loader whose ``read_ahead`` is a number has that many batches prefetched even so.

    Args:
        loader: The loader of the batches. If it has a method ``peek``, that returns the batch to
            inspect; a method ``close`` is called at the end.
        label_names: Which keys of a dict hold targets, see ``kbtrain.data.unpack``.
    """

    def __init__(self, loader: Loader, label_names: LabelNames = None) -> None:
        self._loader = loader
        self._label_names = label_names
        self._first: tuple[Any, Iterator[Any]] | None = None
        self._reach = 1
        self._watch = ShapeMonitor(getattr(loader, "name", "the data"))

    @property
    def loader(self) -> Loader:
        """The loader of the batches."""
        return self._loader

    def peek(self) -> Any:
        """The first batch of epoch 0; None if the data is empty."""
        look = getattr(self._loader, "peek", None)
        if look is not None:
            return look()
        batches = iter(self._loader.epoch(0))
        first = next(batches, None)
        if first is not None:
            self._first = (first, batches)
        return first

    def __iter__(self) -> Iterator[Any]:
        """The batches of epoch 0."""
        for batch in self._from(0, 0):
            self._watch.see(signature(batch), [batch])
            yield batch

    def blocks(
        self, epoch: int, start: int, accumulation: int, limit: Callable[[], int]
    ) -> Generator[Block, None, None]:
        """The rest of an epoch in blocks. Close it (``contextlib.closing``) when leaving it early.

        Args:
            epoch: Number of the epoch.
            start: Number of micro-batches to skip.
            accumulation: Micro-batches per update; the last update may have fewer.
            limit: Called before each block; returns the maximum number of updates in it.
        """
        loader = self._loader
        if isinstance(loader, DataLoader) and loader.vectorised:
            updates = max(0, loader.full_batches - start) // accumulation
            slabs = self._slabs(loader, epoch, start, accumulation, updates)
            with contextlib.closing(Prefetched(slabs)) as slabs:
                yield from _cut_to_limit(slabs, limit)
            start += updates * accumulation
        with contextlib.closing(self._from(epoch, start)) as rest:
            yield from self._collected(rest, accumulation, limit)

    def close(self) -> None:
        """Release what the loader keeps between epochs, such as worker processes."""
        self._first = None
        close = getattr(self._loader, "close", None)
        if callable(close):
            close()

    def _slabs(
        self, loader: DataLoader, epoch: int, start: int, accumulation: int, updates: int
    ) -> Iterator[Block]:
        """Updates of full batches in full blocks: all rows of a block are read at once.

        These blocks do not depend on when something is due, so they can be prefetched. The first
        ones of a run are short, so that its first step does not wait for 64 batches from a slow
        disk.
        """
        if not updates:
            return
        read, size = loader.reader(epoch), loader.batch_size
        # Only for shapes and dtypes: `np.empty` does not touch the memory.
        one = map_structure(
            lambda x: np.empty((accumulation, size, *x.shape[1:]), x.dtype), read(start, 0)
        )
        capacity, outline = _capacity(one), (signature(one),)
        self._watch.see(outline, [])
        kind = "single" if accumulation == 1 else "stacked"
        lead = (size,) if accumulation == 1 else (accumulation, size)
        while updates:
            count = min(capacity, updates, self._reach)
            self._reach = min(4 * self._reach, MAX_BLOCK)
            rows = read(start, count * accumulation)

            def lay_out(x: np.ndarray, count: int = count) -> np.ndarray:
                return _with_capacity(x.reshape(count, *lead, *x.shape[1:]), capacity)

            samples = count * accumulation * size
            chunk = map_structure(lay_out, rows)
            yield Block([{kind: chunk}], capacity, count, accumulation, samples, outline)
            start += count * accumulation
            updates -= count

    def _collected(
        self, batches: Iterator[Any], accumulation: int, limit: Callable[[], int]
    ) -> Iterator[Block]:
        """Any batches; consecutive updates of equal shapes are stacked."""
        waiting: list[Any] = []
        capacity = 1
        while True:
            groups: list[list[Any]] = []
            outline: tuple[Any, ...] = ()
            for _ in range(max(limit(), 1)):
                group = waiting or list(itertools.islice(batches, accumulation))
                waiting = []
                if not group:
                    break
                shapes = tuple(signature(batch) for batch in group)
                if groups and (shapes != outline or len(groups) == capacity):
                    waiting = group
                    break
                if not groups:
                    outline, capacity = shapes, _capacity(*group)
                groups.append(group)
            if not groups:
                return
            self._watch.see(outline, groups[0])
            samples = len(groups) * sum(
                count_samples(batch, self._label_names) for batch in groups[0]
            )
            yield Block(
                _stacked_chunks(groups, capacity),
                capacity,
                len(groups),
                len(groups[0]),
                samples,
                outline,
            )

    def _from(self, epoch: int, start: int) -> Generator[Any, None, None]:
        """The batches of an epoch, prefetched if the loader requests it."""
        batches = self._read(epoch, start)
        ahead = getattr(self._loader, "read_ahead", None)
        if ahead is None:
            return batches
        return _prefetched(batches, ahead)

    def _read(self, epoch: int, start: int) -> Generator[Any, None, None]:
        first, self._first = self._first, None
        if first is not None and epoch == 0 and (start == 0 or not self._loader.sized):
            source: Iterator[Any] = first[1]
            batches: Iterator[Any] = itertools.islice(
                itertools.chain([first[0]], source), start, None
            )
        else:
            source = batches = iter(self._loader.epoch(epoch, start))
        try:
            yield from batches
        finally:
            close = getattr(source, "close", None)
            if callable(close):
                close()


def _prefetched(batches: Iterator[Any], ahead: int) -> Generator[Any, None, None]:
    with contextlib.closing(Prefetched(batches, ahead, patience=0.0)) as items:
        yield from items


def _cut_to_limit(slabs: Iterator[Block], limit: Callable[[], int]) -> Iterator[Block]:
    """Split and join ``slabs`` into blocks of the lengths that ``limit`` allows."""
    slab, done = next(slabs, None), 0
    while slab is not None:
        wanted = min(max(limit(), 1), slab.capacity)
        count = 0
        parts: list[tuple[Block, slice]] = []
        while slab is not None and count < wanted:
            stop = min(slab.updates, done + wanted - count)
            parts.append((slab, slice(done, stop)))
            count, done = count + stop - done, stop
            if count < wanted:
                slab, done = next(slabs, None), 0
        yield _join_parts(parts, count)
        if slab is not None and done == slab.updates:
            slab, done = next(slabs, None), 0


def _join_parts(parts: list[tuple[Block, slice]], count: int) -> Block:
    """Join parts of several blocks; a single part at the start of its block is not copied."""
    first, rows = parts[0]
    chunks = first.chunks
    if len(parts) > 1 or rows.start:

        def join(*arrays: np.ndarray) -> np.ndarray:
            result = np.empty((first.capacity, *arrays[0].shape[1:]), arrays[0].dtype)
            cuts = [array[rows] for array, (_, rows) in zip(arrays, parts, strict=True)]
            np.concatenate(cuts, out=result[:count])
            result[count:] = _padding_value(result)
            return result

        of_all = zip(*[block.chunks for block, _ in parts], strict=True)
        chunks = [map_structure(join, *chunk) for chunk in of_all]
    samples = first.samples // first.updates * count
    return dataclasses.replace(first, chunks=chunks, updates=count, samples=samples)


def _capacity(*batches: Any) -> int:
    """Length of the leading axis for blocks of updates with batches like these.

    It depends only on the shapes, so that the compiled code, and thus every result, does not depend
    on the speed of the machine. Blocks of large batches have no padding, because that would be
    copied to the device.
    """
    size = sum(leaf.nbytes for batch in batches for _, leaf in named_leaves(batch))
    result: int = max(1, min(MAX_BLOCK, BLOCK_BYTES // max(size, 1)))
    return result


def _padding_value(x: np.ndarray) -> Any:
    """The padding of an array: zeros, or empty strings."""
    return "" if x.dtype.kind == "O" else 0


def _with_capacity(x: np.ndarray, capacity: int) -> np.ndarray:
    if len(x) == capacity:
        return x
    result = np.empty((capacity, *x.shape[1:]), x.dtype)
    result[: len(x)] = x
    result[len(x) :] = _padding_value(x)  # instead of uninitialized memory
    return result


def _stacked_chunks(groups: list[list[Any]], capacity: int) -> list[dict[str, Any]]:
    """The updates' micro-batches; those of equal shape are stacked for a loop on the device."""
    chunks = []
    position = 0
    for _, same in itertools.groupby(groups[0], key=signature):
        count = len(list(same))
        parts = [group[position : position + count] for group in groups]
        position += count
        kind = "single" if count == 1 else "stacked"
        rows = [part[0] if count == 1 else stack(part) for part in parts]
        chunks.append({kind: map_structure(lambda x: _with_capacity(x, capacity), stack(rows))})
    return chunks
