"""Leaving out the columns of a data set that the model does not take."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import Any

from kbtrain.data.batch import LABEL_KEYS, SAMPLE_WEIGHT_KEY

logger = logging.getLogger("kbtrain")


class ColumnFilter:
    """Removes from dicts what is neither an input of the model nor a label or weight.

    It says so once of each. If not one of a dict's inputs is known, the names of the two do not
    correspond (a single unnamed input, say), and everything stays.

    Args:
        inputs: Names of the model's inputs.
        label_names: Keys that hold labels besides the usual ones; an empty list says that no key
            does, and that none holds sample weights.

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

    def __call__(self, batch: Any, name: str, taken: Collection[str] = ()) -> Any:
        """The batch (or sample, or columns) without what is not used.

        Args:
            batch: A dict, or a tuple whose first part is one; anything else comes back as it is.
            name: How the message calls the data.
            taken: Further keys that are used, by the collator that gets a sample.
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
                "%s has columns that the model does not take (it takes %s): %s. They are left out "
                "of the batches; remove_unused_columns=False keeps them.",
                name,
                ", ".join(sorted(self._inputs)),
                ", ".join(map(str, unused)),
            )
        return {key: value for key, value in batch.items() if key not in unused}


def without_texts(sample: Any, name: str) -> Any:
    """A sample without the columns that hold texts, which no model takes from a collator."""
    if not isinstance(sample, Mapping):
        return sample
    texts = [key for key, value in sample.items() if _is_text(value)]
    if not texts:
        return sample
    logger.info("%s: the columns %s hold texts and are left out.", name, ", ".join(map(str, texts)))
    return {key: value for key, value in sample.items() if key not in texts}


def _is_text(value: Any) -> bool:
    while isinstance(value, list | tuple) and value:
        value = value[0]
    return isinstance(value, str | bytes)
