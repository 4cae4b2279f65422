"""``class_weight``: sample weights computed from the labels."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from kbtrain.data.batch import SAMPLE_WEIGHT_KEY, LabelKeys, unpack
from kbtrain.data.loader import DataLoader, Loader
from kbtrain.data.sources.base import ArraySource
from kbtrain.errors import ConfigurationError, DataError


class ClassWeights:
    """Gives each sample the weight of its class, like Keras' ``fit(class_weight=...)``.

    Classes that are not listed have weight 1. Labels are class indices, ``(samples,)`` or
    ``(samples, 1)``, or one row per sample whose largest value is at the class (one-hot). Existing
    sample weights are multiplied.

    Args:
        weights: Class index -> weight.
        label_keys: Which keys of a dict are targets.

    Raises:
        ConfigurationError: The weights are not a valid dict.

    Example:
        >>> weigh = ClassWeights({0: 1.0, 1: 5.0})
        >>> weigh.of(np.array([[1], [0], [2]])).tolist()
        [5.0, 1.0, 1.0]
    """

    def __init__(self, weights: Mapping[int, float], label_keys: LabelKeys | None = None) -> None:
        check_class_weight(weights)
        self._weights = {int(number): float(weight) for number, weight in weights.items()}
        self._keys = label_keys or LabelKeys()

    def of(self, labels: np.ndarray) -> np.ndarray:
        """The weight of each sample, float32.

        Raises:
            DataError: The labels are not one class per sample.
        """
        if labels.ndim > 2:
            raise DataError(
                "class_weight needs one class per sample. Use sample_weight for labels with more "
                f"axes. Received: labels of shape {labels.shape}"
            )
        if labels.ndim == 2:
            labels = labels[:, 0] if labels.shape[1] == 1 else labels.argmax(axis=1)
        classes = np.round(labels).astype(np.int64)
        result = np.ones(len(classes), np.float32)
        for number, weight in self._weights.items():
            result[classes == number] = weight
        return result

    def __call__(self, batch: Any) -> Any:
        """Add the weights to a batch.

        Raises:
            DataError: The batch has no labels, or labels of several outputs.
        """
        x, y, weight = unpack(batch, self._keys)
        if not hasattr(y, "shape"):
            received = "no labels" if y is None else f"a {type(y).__name__} of labels"
            raise DataError(
                "class_weight needs data with one array of labels; use sample_weight for models "
                f"with several outputs. Received: {received}"
            )
        of_class = self.of(np.asarray(y[:]))
        if weight is not None:
            given = np.asarray(weight[:])
            of_class = given * of_class.reshape(-1, *(1,) * (given.ndim - 1))
        of_class = of_class.astype(np.float32)
        if isinstance(batch, Mapping) and self._keys.weight_of({SAMPLE_WEIGHT_KEY: of_class}):
            return {**batch, SAMPLE_WEIGHT_KEY: of_class}
        return (x, y, of_class)


class WeightedLoader:
    """The batches of a loader, with weights added.

    Args:
        loader: Any loader.
        weigh: Adds weights to a batch.
    """

    def __init__(self, loader: Loader, weigh: ClassWeights) -> None:
        self._loader, self._weigh = loader, weigh

    def __getattr__(self, name: str) -> Any:
        """Other attributes of the loader: ``name``, ``endless``, ``read_ahead``, ``close``, ..."""
        return getattr(self._loader, name)

    @property
    def sized(self) -> bool:
        """Whether ``len(loader)`` is known."""
        return self._loader.sized

    @property
    def num_examples(self) -> int | None:
        """Number of samples in an epoch, if known."""
        return self._loader.num_examples

    @property
    def batch_size(self) -> int | None:
        """Samples in a full batch, if known."""
        return self._loader.batch_size

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        return self.epoch(0)

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Any]:
        """Yield the batches of an epoch from number ``start_batch`` on."""
        batches = self._loader.epoch(epoch, start_batch)
        try:
            yield from map(self._weigh, batches)
        finally:
            close = getattr(batches, "close", None)
            if callable(close):
                close()

    def peek(self) -> Any:
        """The first batch, or None."""
        look = getattr(self._loader, "peek", None)
        first = look() if look is not None else next(iter(self._loader.epoch(0)), None)
        return None if first is None else self._weigh(first)


def weighted(
    loader: Loader, class_weight: Mapping[int, float] | None, label_keys: LabelKeys
) -> Loader:
    """The loader, with sample weights if class weights are given.

    For arrays the weights are computed once, so that whole blocks can still be read.
    """
    if class_weight is None:
        return loader
    weigh = ClassWeights(class_weight, label_keys)
    if isinstance(loader, DataLoader) and loader.vectorised:
        source, loader = loader.source, copy.copy(loader)
        assert isinstance(source, ArraySource)
        loader.source = source.changed(weigh)
        return loader
    return WeightedLoader(loader, weigh)


def check_class_weight(weights: Any) -> None:
    """Check that ``class_weight`` is a dict from classes to weights, or None.

    Raises:
        ConfigurationError: It is neither.
    """
    numbers = (int, float, np.integer, np.floating)
    if weights is not None and not (
        isinstance(weights, Mapping)
        and all(isinstance(n, (int, np.integer)) and not isinstance(n, bool) for n in weights)
        and all(isinstance(w, numbers) and 0 <= w < np.inf for w in weights.values())
    ):
        raise ConfigurationError(
            "class_weight must be a dict from class indices to weights of at least 0, such as "
            f"{{0: 1.0, 1: 5.0}}. Received: class_weight={weights!r}."
        )
