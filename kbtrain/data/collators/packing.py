"""The collator that packs several texts into one row, with masks that keep them apart."""

from __future__ import annotations

import copy
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np

from kbtrain.data.batch import SAMPLE_WEIGHT_KEY as WEIGHT
from kbtrain.data.collators.padding import IGNORED, check_positive, fields, lengths, widened
from kbtrain.errors import ConfigurationError, DataError

logger = logging.getLogger("kbtrain")


@dataclass(frozen=True)
class DataCollatorForPacking:
    """Packs several texts into one row, for causal language models: little padding, one shape.

    Texts are placed in order into the first row with enough space. Each has its own positions from
    0, and its last token has no label, so nothing is predicted across a boundary.

    Args:
        max_length: Tokens of a row; a longer text is an error.
        rows: Rows of a batch, including empty ones, so that all batches have one shape. None
            creates as many as needed.
        pad_token_id: The padding token.
        return_attention_mask: Add ``attention_mask``, booleans of shape ``(rows, max_length,
            max_length)`` for ``keras.layers.MultiHeadAttention``: true where the query (second
            axis) may attend to the key (third axis), which is in the same text and not later.
            Padding attends to itself, so that no softmax is empty. A model with an input of that
            name gets it in any case.

    In a Trainer, a model with named inputs gets those of them that it takes. To keep the texts
    apart it must take ``attention_mask`` or ``segment_ids``, and ``position_ids`` if it has an
    embedding of positions; the sums of losses and gradients are then those of the texts one by one.
    One that takes neither is warned about.

    Other fields of the samples are packed like the tokens if they have one value for each token, 0
    on padding. ``sample_weight`` may also be one number for a text; as it belongs to the labels, it
    moves with them: the weight of a token is at the position that predicts it. A field of any other
    length cannot be packed and is an error.

    Returns (when called with a list of samples):
        ``input_ids``, ``position_ids``, ``segment_ids`` (1, 2, ... within a row; 0 is padding) and
        ``labels`` (the next token, or the samples' own next ``labels``), of shape
        ``(rows, max_length)``; int32, or int64 where the samples have wider integers.

    Raises:
        ConfigurationError: An argument is not a positive integer.
        DataError: A text is longer than a row, its tokens are not integers, the texts need more
            than ``rows`` rows, or a field cannot be packed.

    Example:
        >>> batch = DataCollatorForPacking(max_length=6)([[5, 6, 7], [8, 9], [1, 2]])
        >>> batch["input_ids"].tolist(), batch["segment_ids"].tolist()
        ([[5, 6, 7, 8, 9, 0], [1, 2, 0, 0, 0, 0]], [[1, 1, 1, 2, 2, 0], [1, 1, 0, 0, 0, 0]])
        >>> batch["labels"][0].tolist()
        [6, 7, -100, 9, -100, -100]
    """

    max_length: int
    rows: int | None = None
    pad_token_id: int = 0
    return_attention_mask: bool = False
    takes: ClassVar[frozenset[str]] = frozenset(("input_ids", "attention_mask"))
    """The columns it uses, besides labels."""
    _inputs = frozenset[str]()

    def __post_init__(self) -> None:
        """Check the arguments."""
        if self.max_length is None:
            raise ConfigurationError("max_length must be an integer. Received: None")
        check_positive("max_length", self.max_length)
        check_positive("rows", self.rows)

    def with_inputs(self, names: Collection[str]) -> Self:
        """The same collator for a model that takes the inputs of these names."""
        if "input_ids" not in names:
            return self  # the model has other names for its inputs
        if not {"attention_mask", "segment_ids"} & set(names):
            logger.warning(
                "The model takes neither attention_mask nor segment_ids (it takes %s), so texts "
                "that DataCollatorForPacking puts into one row attend to each other. To keep them "
                "apart, give the model an input attention_mask of shape (None, None) and pass it "
                "on to its attention layers.",
                ", ".join(sorted(names)),
            )
        other = copy.copy(self)
        object.__setattr__(other, "_inputs", frozenset(names))
        return other

    def __call__(self, samples: Sequence[Any]) -> dict[str, np.ndarray]:
        """Pack samples; see the class."""
        columns = fields(samples)
        places = self._places(lengths(columns))
        texts = columns["input_ids"]
        targets = widened(columns.get("labels", texts))
        for name, arrays in (("input_ids", texts), ("labels", targets)):
            if arrays[0].dtype.kind != "i":
                raise DataError(
                    f"Texts to pack need integers as {name}. Received: {arrays[0].dtype}"
                )
        needed = 1 + max(row for row, _ in places)
        if self.rows is not None and needed > self.rows:
            raise DataError(
                f"The texts of a batch need {needed} rows of {self.max_length} tokens, but "
                f"rows={self.rows}. Increase rows, or reduce per_device_train_batch_size."
            )
        shape = (self.rows or needed, self.max_length)
        kind = texts[0].dtype  # int32 or int64
        batch = {
            "input_ids": np.full(shape, self.pad_token_id, kind),
            "position_ids": np.zeros(shape, kind),
            "segment_ids": np.zeros(shape, kind),
            "labels": np.full(shape, IGNORED, targets[0].dtype),
        }
        for text, target, (row, start) in zip(texts, targets, places, strict=True):
            if target.shape != text.shape:
                raise DataError(
                    "A text must have as many labels as input_ids. "
                    f"Received: shapes {target.shape} and {text.shape}"
                )
            stop = start + len(text)
            batch["input_ids"][row, start:stop] = text
            batch["position_ids"][row, start:stop] = np.arange(len(text))
            batch["segment_ids"][row, start:stop] = 1 + batch["segment_ids"][row].max()
            batch["labels"][row, start : max(start, stop - 1)] = target[1:]
        for name, values in _others(columns).items():
            batch[name] = np.zeros((*shape, *values[0].shape[1:]), values[0].dtype)
            for value, (row, start) in zip(values, places, strict=True):
                batch[name][row, start : start + len(value)] = value
        if self.return_attention_mask or "attention_mask" in self._inputs:
            batch["attention_mask"] = causal_segments(batch["segment_ids"])
        if self._inputs:
            unused = {"position_ids", "segment_ids", "attention_mask"} - self._inputs
            batch = {name: array for name, array in batch.items() if name not in unused}
        return batch

    def _places(self, lengths: Sequence[int]) -> list[tuple[int, int]]:
        """Row and start of each text, in the first row with enough space."""
        used: list[int] = []
        places = []
        for length in lengths:
            if length > self.max_length:
                raise DataError(
                    f"A text has {length} tokens, more than max_length={self.max_length}. Split "
                    "long texts before packing, or increase max_length."
                )
            fitting = (row for row, start in enumerate(used) if start + length <= self.max_length)
            row = next(fitting, len(used))
            if row == len(used):
                used.append(0)
            places.append((row, used[row]))
            used[row] += length
        return places


def _others(columns: Mapping[str, list[np.ndarray]]) -> dict[str, list[np.ndarray]]:
    """The fields besides tokens and labels, with one value for each token.

    Raises:
        DataError: A field has another length, or is one that packing makes.
    """
    texts, found = columns["input_ids"], {}
    for name, values in columns.items():
        if name in ("input_ids", "labels"):
            continue
        if name in ("position_ids", "segment_ids"):
            raise DataError(f"Packing makes {name!r} itself. Remove this field of the samples.")
        if name == WEIGHT:
            values = [
                np.full(len(text), value) if value.ndim == 0 else value
                for text, value in zip(texts, values, strict=True)
            ]
        for text, value in zip(texts, values, strict=True):
            if value.shape[:1] != (len(text),) or value.shape[1:] != values[0].shape[1:]:
                raise DataError(
                    f"{name!r} cannot be packed: a row has several texts, so a field needs one "
                    "value for each token. Remove the field, or do not pack. Received: shape "
                    f"{value.shape} for a text of {len(text)} tokens"
                )
            if name == "attention_mask" and not value.all():
                raise DataError(
                    "Texts to pack must be without padding: an 'attention_mask' has zeros. Turn "
                    "off the tokenizer's padding."
                )
        if name != "attention_mask":  # of ones: packing makes that of the whole row
            found[name] = [value[1:] for value in values] if name == WEIGHT else values
    return found


def causal_segments(segment_ids: np.ndarray) -> np.ndarray:
    """The causal attention mask of packed rows.

    Args:
        segment_ids: Indices of the texts, shape ``(rows, length)``.

    Returns:
        Booleans of shape ``(rows, length, length)``: [row, query, key] is true if both belong to
        the same text and the key is not later.
    """
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    result: np.ndarray = same & np.tri(segment_ids.shape[1], dtype=bool)
    return result
