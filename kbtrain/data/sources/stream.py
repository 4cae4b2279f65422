"""Iterables whose items may be samples, or whole batches as in Keras' generators.

The model's inputs decide: an item with as many axes as the inputs is a batch, one with one axis
less is a sample.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kbtrain.data.batch import Batch, LabelKeys, nesting_hint, to_batch, unpack
from kbtrain.data.loader import DataLoader, check_count, every_column
from kbtrain.data.ragged import is_ragged
from kbtrain.data.sources.base import IterableSource, UnsizedDataError
from kbtrain.data.sources.column_filter import ColumnFilter
from kbtrain.data.sources.interop import derives_from, is_grain
from kbtrain.data.tree import is_list_of_numbers, is_sparse_matrix, leaves_with_paths, map_raw
from kbtrain.errors import DataError

logger = logging.getLogger("kbtrain")

Shape = tuple[int | None, ...]


@dataclass(frozen=True)
class ModelInputs:
    """What is known about the inputs of a model before it has seen data.

    Attributes:
        shapes: Name and shape of each input, batch axis first; empty if unknown.
        label_keys: Which keys of a dict are targets.
    """

    shapes: Sequence[tuple[str, Shape]] = ()
    label_keys: LabelKeys = field(default_factory=LabelKeys)


class StreamLoader:
    """Batches of an iterable: its items unchanged if they are batches, else collated samples.

    This is decided when the first item is read.

    Args:
        loader: A loader of the iterable, used if its items are samples.
        inputs: The inputs of the model.
        columns: Removes unused columns.
        samples: Whether the items are known to be samples because there is a collator for them.
    """

    sized = False
    num_examples = None

    def __init__(
        self,
        loader: DataLoader,
        inputs: ModelInputs,
        columns: ColumnFilter | None = None,
        samples: bool = False,
    ) -> None:
        assert isinstance(loader.source, IterableSource)
        self._loader, self._source, self._inputs = loader, loader.source, inputs
        self._columns = columns or every_column
        self._batched = False if samples else None

    @property
    def name(self) -> str:
        """The name of the data in messages."""
        return self._source.name

    @property
    def batch_size(self) -> int | None:
        """Samples in a full batch; None if the items are batches."""
        return None if self._batched else self._loader.batch_size

    @property
    def read_ahead(self) -> int | None:
        """Number of batches that a thread prefetches."""
        return self._loader.read_ahead

    @property
    def resume_caveat(self) -> str | None:
        """Why a resumed run may see other data; None if it does not."""
        return self._loader.resume_caveat

    @property
    def endless(self) -> bool:
        """Whether the data is known to have no end."""
        return self._source.endless

    def __len__(self) -> int:
        """Raise an ``UnsizedDataError``: the number of batches is not known."""
        raise UnsizedDataError(
            f"{self.name} is iterable and has no length. Set max_steps, or pass data with "
            "__len__ and __getitem__."
        )

    def __iter__(self) -> Iterator[Any]:
        return self.epoch(0)

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Any]:
        """Yield the batches of an epoch; see ``DataLoader.epoch``.

        Raises:
            ConfigurationError: A number is negative.
            DataError: While iterating: the data failed, or its items may be samples or batches.
        """
        check_count("epoch", epoch, 0)
        check_count("start_batch", start_batch, 0)
        self._source.set_epoch(epoch)
        return self._read(epoch, start_batch)

    def _read(self, epoch: int, start_batch: int) -> Iterator[Any]:
        items = self._source.stream()
        first = list(itertools.islice(items, 1))
        if first and self._batched is None:
            self._batched = self._is_batch(first[0])
        items = itertools.chain(first, items)
        if not self._batched:
            yield from self._loader.batches_of(items, epoch, start_batch)
            return
        for number, item in enumerate(items):
            if number >= start_batch:
                where = f"Batch {number} of {self.name}"
                keys = self._inputs.label_keys
                yield to_batch(self._columns(item, self.name), where, keys)

    def _is_batch(self, item: Any) -> bool:
        if any(is_ragged(leaf) for _, leaf in leaves_with_paths(item)):
            return True  # ragged samples could not be collated
        parts = _shapes(item, self._inputs.label_keys)
        if parts is None or () in [*_leaf_shapes(parts.y), *_leaf_shapes(parts.sample_weight)]:
            return False
        batched = _by_model(parts.x, self._inputs.shapes)
        if batched is None and _may_be_batch(parts) and not _is_of_samples(self._source.data):
            raise DataError(
                f"An item of {self.name} may be one sample or a whole batch: its arrays are "
                f"{_describe_shapes(parts)}, and the model's inputs are unknown. Specify which it "
                "is: kbtrain.data.as_loader(data) for batches (as Keras reads a generator), "
                "data_collator=kbtrain.data.default_collate for samples, or build the model first."
                + nesting_hint(tuple(parts))
            )
        if batched:
            logger.info(
                "%s yields batches (%s): they are used unchanged, and the batch sizes in the "
                "arguments are ignored.",
                self.name,
                _describe_shapes(parts),
            )
        return bool(batched)


def check_sample(item: Any, inputs: ModelInputs, name: str) -> None:
    """Check a sample of data that is read by index: it might be a whole batch.

    Raises:
        DataError: It has as many axes as the model's inputs, including the batch axis.
    """
    parts = _shapes(item, inputs.label_keys)
    if parts is None or () in [*_leaf_shapes(parts.y), *_leaf_shapes(parts.sample_weight)]:
        return
    batched = _by_model(parts.x, inputs.shapes)
    if batched:
        raise DataError(
            f"The items of {name} are read as samples, but this one is a whole batch for the model "
            f"({_describe_shapes(parts)}). Pass kbtrain.data.as_loader(data), which uses batches "
            "unchanged."
        )
    if batched is None and _may_be_batch(parts):
        logger.warning(
            "Each item of %s is read as one sample (%s). If the items are batches, pass "
            "kbtrain.data.as_loader(data).",
            name,
            _describe_shapes(parts),
        )


def _shapes(item: Any, keys: LabelKeys) -> Batch | None:
    """The shapes of an item's arrays in its structure; None if a value has no shape."""

    def shape(leaf: Any, path: str) -> Any:
        known = getattr(leaf, "shape", None)
        if is_sparse_matrix(leaf) and leaf.shape[0] == 1:
            known = leaf.shape[1:]  # a row, which has two axes in SciPy
        return np.empty(np.shape(leaf) if known is None else tuple(known), np.void)

    try:
        is_array = isinstance(item, list) and is_list_of_numbers(item)
        parts = Batch(item) if is_array else unpack(item, keys)
        return Batch(*(map_raw(shape, part, "item") for part in parts))
    except (DataError, ValueError, TypeError):
        return None  # reading the item raises the error


def _leaf_shapes(part: Any) -> list[tuple[int, ...]]:
    return [leaf.shape for _, leaf in leaves_with_paths(part)]


def _by_model(x: Any, specs: Sequence[tuple[str, Shape]]) -> bool | None:
    """Whether inputs are a batch for the model; None if unknown."""
    by_name = dict(specs)
    if isinstance(x, Mapping) and by_name.keys() <= x.keys():
        x = {name: x[name] for name in by_name}
    shapes = _leaf_shapes(x)
    if not specs or not shapes:
        return None
    if len(shapes) != len(specs):  # an error in either case
        return {len(shape) for shape in shapes} == {len(spec) for _, spec in specs}
    pairs = list(zip(shapes, [spec for _, spec in specs], strict=True))
    for exact in (True, False):
        if all(_fits((None, *shape), spec, exact) for shape, spec in pairs):
            return False
        if all(_fits(shape, spec, exact) for shape, spec in pairs):
            return True
    return all(len(shape) == len(spec) for shape, spec in pairs)


def _fits(shape: Shape, spec: Shape, exact: bool) -> bool:
    """Whether an input accepts an array. Keras adds a missing last axis of length 1."""
    if not exact and len(shape) == len(spec) - 1 and spec[-1] == 1:
        shape = (*shape, 1)
    return len(shape) == len(spec) and all(
        size is None or wanted in (None, size) for size, wanted in zip(shape, spec, strict=True)
    )


def _may_be_batch(parts: Batch) -> bool:
    """Whether several arrays share the length of the first axis, as in a batch."""
    shapes = [shape for part in parts for shape in _leaf_shapes(part)]
    if len(shapes) < 2 or not all(shapes) or len({shape[0] for shape in shapes}) > 1:
        return False
    return shapes[0] != (1,) or any(len(shape) > 1 for shape in shapes)


def _is_of_samples(data: Any) -> bool:
    """Whether data yields samples by the convention of its library."""
    streams = (derives_from(data, "IterableDataset", package) for package in ("torch", "datasets"))
    return is_grain(data) or any(streams)


def _describe_shapes(parts: Batch) -> str:
    names = zip(("x", "y", "sample_weight"), parts, strict=True)
    leaves = [leaf for name, part in names for leaf in leaves_with_paths(part, name)]
    return ", ".join(f"{path}: {leaf.shape}" for path, leaf in leaves)
