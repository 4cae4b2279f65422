"""Removes columns of a data set that the model does not use."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import Any

from kbtrain.data.batch import LABEL_KEYS, SAMPLE_WEIGHT_KEY

logger = logging.getLogger("kbtrain")


class ColumnFilter:
    """Removes entries of dicts that are neither inputs of the model nor labels or weights.

    A warning names each of them once. If none of a dict's entries is an input, the names do not
    correspond (with a single unnamed input, for example), and everything is kept.

    Args:
        inputs: Names of the model's inputs.
        label_names: Keys that hold labels in addition to the usual ones; an empty list means that
            there are neither labels nor sample weights.

    Example:
        >>> keep = ColumnFilter({"input_ids"})
        >>> sorted(keep({"input_ids": [1], "labels": 0}, "train_dataset"))
        ['input_ids', 'labels']
    """

    def __init__(self, inputs: Collection[str], label_names: Collection[str] | None = None) -> None:
        self._inputs = frozenset(inputs)
        no_labels = label_names is not None and not label_names
        usual = () if no_labels else (*LABEL_KEYS, SAMPLE_WEIGHT_KEY)
        self._others = frozenset((*usual, *(label_names or ())))
        self._said: set[Any] = set()

    @property
    def inputs(self) -> frozenset[str]:
        """Names of the model's inputs."""
        return self._inputs

    def __call__(self, batch: Any, name: str, taken: Collection[str] = ()) -> Any:
        """The batch (or sample, or columns) without unused entries.

        Args:
            batch: A dict, or a tuple whose first part is one; anything else is returned unchanged.
            name: The name of the data in the message.
            taken: Further keys used by the collator that gets the sample.
        """
        if isinstance(batch, tuple) and batch and isinstance(batch[0], Mapping):
            first = self._filter(batch[0], name, frozenset(), taken)
            return batch if first is batch[0] else (first, *batch[1:])
        if isinstance(batch, Mapping):
            return self._filter(batch, name, self._others, taken)
        return batch

    def _filter(
        self, batch: Mapping[Any, Any], name: str, others: frozenset[str], taken: Collection[str]
    ) -> Any:
        inputs = [key for key in batch if key not in others]
        unused = [key for key in inputs if key not in self._inputs and key not in taken]
        if not unused or len(unused) == len(inputs):
            return batch
        if not self._said.issuperset(unused):
            self._said.update(unused)
            logger.warning(
                "%s has columns that the model does not use (it uses %s): %s. They are removed "
                "from the batches; remove_unused_columns=False keeps them.",
                name,
                ", ".join(sorted(self._inputs)),
                ", ".join(map(str, unused)),
            )
        return {key: value for key, value in batch.items() if key not in unused}


def without_texts(sample: Any, name: str) -> Any:
    """A sample without its text columns, which no model accepts."""
    if not isinstance(sample, Mapping):
        return sample
    texts = [key for key, value in sample.items() if _holds_text(value)]
    if not texts:
        return sample
    logger.info("%s: the columns %s hold text and are removed.", name, ", ".join(map(str, texts)))
    return {key: value for key, value in sample.items() if key not in texts}


def _holds_text(value: Any) -> bool:
    while isinstance(value, list | tuple) and value:
        value = value[0]
    return isinstance(value, str | bytes)
