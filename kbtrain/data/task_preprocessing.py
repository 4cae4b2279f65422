"""Models with built-in preprocessing, such as KerasHub tasks, which tokenize raw text.

Keras' ``fit`` runs such a model's ``preprocess_samples`` on each batch. Here it becomes the
collator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from kbtrain.data import map_structure, unpack
from kbtrain.data.sources.interop import yields_batches
from kbtrain.errors import DataError


def preprocesses(model: Any, data: Any, input_names: frozenset[str] | None) -> bool:
    """Whether a model should preprocess a data set itself.

    Args:
        model: The model.
        data: The data set, as passed by the user.
        input_names: Names of the model's inputs; a dict with all of them is preprocessed already.
    """
    if getattr(model, "preprocessor", None) is None:
        return False
    if not callable(getattr(model, "preprocess_samples", None)):
        return False
    x = data[0] if isinstance(data, tuple) and data else data
    return not (isinstance(x, Mapping) and input_names and input_names <= x.keys())


def preprocessed(model: Any, data: Any) -> tuple[Any, Callable[[list[Any]], Any] | None]:
    """A data set of raw samples, and the collator that preprocesses them.

    Args:
        model: A model with ``preprocess_samples``.
        data: Arrays and lists ``(x, y)`` or ``(x, y, sample_weight)``, samples, or an iterable of
            batches; batches are preprocessed directly, and there is no collator.
    """
    if yields_batches(data):
        if hasattr(data, "element_spec") and hasattr(data, "map"):  # tf.data, as in Keras
            return data.map(model.preprocess_samples), None
        raise DataError(
            f"{type(model).__name__} preprocesses its data itself, which requires arrays, samples "
            f"or a tf.data.Dataset. Received: batches of a {type(data).__name__}. Preprocess them "
            "there (model.preprocess_samples), and create the model with preprocessor=None."
        )
    if isinstance(data, tuple | Mapping):
        data = _Columns(data)
    return data, lambda samples: _batch(model, samples)


class _Columns:
    """The samples of a data set given as columns (lists and arrays)."""

    def __init__(self, columns: Any) -> None:
        self._columns = columns
        lengths = {len(column) for column in _columns_of(columns)}
        if len(lengths) != 1:
            raise DataError(
                "All columns of the data must have the same length. "
                f"Received: lengths {sorted(lengths)}."
            )
        (self._length,) = lengths

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Any:
        return _map(lambda column: column[index], self._columns)


def _map(function: Callable[[Any], Any], columns: Any) -> Any:
    """Map over columns; as in KerasHub, tuples and dicts are structure, a list is a column."""
    if isinstance(columns, Mapping):
        return {name: _map(function, column) for name, column in columns.items()}
    if isinstance(columns, tuple):
        return tuple(_map(function, column) for column in columns)
    return function(columns)


def _columns_of(columns: Any) -> list[Any]:
    leaves: list[Any] = []
    _map(leaves.append, columns)
    return leaves


def _batch(model: Any, samples: Sequence[Any]) -> Any:
    """Join samples, and let the model preprocess them."""
    joined = _join_samples(samples)
    x, y, weight = (joined, None, None) if isinstance(joined, list) else unpack(joined)
    if isinstance(x, Mapping) and len(x) == 1:  # a data set with a single text column
        (x,) = x.values()
    return map_structure(np.asarray, model.preprocess_samples(x, y, weight))


def _join_samples(samples: Sequence[Any]) -> Any:
    first = samples[0]
    if isinstance(first, Mapping):
        return {name: _join_samples([sample[name] for sample in samples]) for name in first}
    if isinstance(first, tuple):
        return tuple(_join_samples(part) for part in zip(*samples, strict=True))
    if isinstance(first, str | bytes):
        return [s.decode("utf-8") if isinstance(s, bytes) else str(s) for s in samples]
    return np.asarray(samples)
