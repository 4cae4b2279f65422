"""Collators for sequences: padding, token classification, sequence to sequence.

They accept lists of dicts and return dicts of NumPy arrays. Names and defaults are those of
Transformers; instead of a tokenizer, the token ids can be passed directly.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

from kbtrain.data.batch import LabelKeys, LabelNames, label_keys
from kbtrain.data.collators.padding import (
    IGNORED,
    check_positive,
    fields,
    lengths,
    pad,
    round_up,
    stack_field,
    token_id,
    widened,
)
from kbtrain.errors import ConfigurationError, DataError

_FILL = {"attention_mask": 0, "token_type_ids": 0, "position_ids": 0, "special_tokens_mask": 1}


@dataclass(frozen=True)
class DataCollatorWithPadding:
    """Pads fields with one value per token; stacks all others.

    Args:
        tokenizer: Source of ``pad_token_id`` and ``padding_side`` if they are not given.
        padding: True or ``"longest"`` pads to the longest sample of the batch, ``"max_length"`` to
            ``max_length``, False not at all (all samples must have the same length).
        max_length: Length to pad to; a longer sample is an error, because nothing is truncated.
        pad_to_multiple_of: Round the length up to a multiple of this. Each length is compiled once,
            so this bounds the number of compilations.
        pad_token_id: Padding value of ``input_ids``.
        padding_side: ``"right"`` (the default) or ``"left"``.
        padding_values: Padding values of further per-token fields, by name.
        return_attention_mask: Add ``attention_mask`` (1 for tokens, 0 for padding) if the samples
            have none.

    Returns (when called with a list of samples):
        A dict of arrays of shape ``(batch, length, ...)``. A sample's ``"label"`` or
        ``"label_ids"`` becomes ``"labels"``, unless the model has an input of that name.

    Raises:
        ConfigurationError: The arguments are inconsistent.
        DataError: Samples are inconsistent, or longer than ``max_length``.

    Example:
        >>> collate = DataCollatorWithPadding(pad_token_id=0, pad_to_multiple_of=4)
        >>> batch = collate([{"input_ids": [5, 6, 7], "label": 1}, {"input_ids": [8], "label": 0}])
        >>> batch["input_ids"].tolist(), batch["labels"].tolist()
        ([[5, 6, 7, 0], [8, 0, 0, 0]], [1, 0])
    """

    tokenizer: Any = None
    padding: bool | str = True
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    pad_token_id: int | None = None
    padding_side: str | None = None
    padding_values: Mapping[str, float] = field(default_factory=dict)
    return_attention_mask: bool = True

    def __post_init__(self) -> None:
        """Check the arguments, and read the tokenizer."""
        if self.padding not in (True, False, "longest", "max_length", "do_not_pad"):
            raise ConfigurationError(
                "padding must be True or 'longest', 'max_length', or False. "
                f"Received: padding={self.padding!r}"
            )
        if self.padding == "max_length" and self.max_length is None:
            raise ConfigurationError("padding='max_length' needs max_length. Received: None")
        check_positive("max_length", self.max_length)
        check_positive("pad_to_multiple_of", self.pad_to_multiple_of)
        side = self.padding_side or getattr(self.tokenizer, "padding_side", None) or "right"
        if side not in ("right", "left"):
            raise ConfigurationError(
                f"padding_side must be 'right' or 'left'. Received: padding_side={side!r}"
            )
        object.__setattr__(self, "padding_side", side)
        if self.padding not in (False, "do_not_pad"):
            number = token_id("pad_token_id", self.pad_token_id, self.tokenizer)
            object.__setattr__(self, "pad_token_id", number)

    @property
    def takes(self) -> frozenset[str]:
        """The columns it uses. A loader removes others that the model does not use."""
        return frozenset(("input_ids", "word_ids", *_FILL, *self.padding_values))

    _label_keys = LabelKeys()

    def with_label_names(self, label_names: LabelNames) -> Self:
        """The same collator for a model whose inputs are known.

        Args:
            label_names: Which keys of a sample hold targets, see ``kbtrain.data.unpack``.
        """
        other = copy.copy(self)
        object.__setattr__(other, "_label_keys", label_keys(label_names))
        return other

    def __call__(self, samples: Sequence[Any]) -> dict[str, np.ndarray]:
        """Collate samples; see the class."""
        return self.collate(fields(samples, self._label_keys))

    def collate(self, columns: dict[str, list[np.ndarray]]) -> dict[str, np.ndarray]:
        """The batch of the samples' fields (``kbtrain.data.collators.padding.fields``)."""
        counts = lengths(columns)
        length = self.length(max(counts))
        if self.return_attention_mask and "attention_mask" not in columns:
            columns = {**columns, "attention_mask": [np.ones(n, np.int64) for n in counts]}
        fill = self.fill()
        batch = {}
        for name, arrays in columns.items():
            if name not in fill or not self.padding or self.padding == "do_not_pad":
                batch[name] = stack_field(name, arrays)
                continue
            if [a.shape[:1] for a in arrays] != [(n,) for n in counts]:
                raise DataError(
                    f"{name!r} must have one value for each of the sample's input_ids. Received: "
                    f"lengths {[a.shape[:1] for a in arrays][:4]} and {counts[:4]}"
                )
            arrays = widened(arrays) if name == "labels" else arrays
            batch[name] = pad(arrays, fill[name], length, str(self.padding_side))
        return batch

    def fill(self) -> dict[str, float]:
        """Per-token fields and their padding values."""
        assert self.pad_token_id is not None or not self.padding or self.padding == "do_not_pad"
        return {"input_ids": self.pad_token_id or 0, **_FILL, **self.padding_values}

    def length(self, longest: int) -> int:
        """The length to pad to, for a batch whose longest sample has ``longest`` tokens.

        Raises:
            DataError: ``longest`` is more than ``max_length`` with ``padding="max_length"``.
        """
        if self.padding != "max_length":
            return round_up(longest, self.pad_to_multiple_of)
        assert self.max_length is not None
        if longest > self.max_length:
            raise DataError(
                f"A sample has {longest} tokens, more than max_length={self.max_length}. Truncate "
                "it in the tokenizer, or increase max_length."
            )
        return round_up(self.max_length, self.pad_to_multiple_of)


@dataclass(frozen=True)
class DataCollatorForTokenClassification(DataCollatorWithPadding):
    """Like ``DataCollatorWithPadding``, with one label per token, padded like the tokens.

    Args:
        label_pad_token_id: Label of padding; the loss ignores -100.

    Example:
        >>> collate = DataCollatorForTokenClassification(pad_token_id=0)
        >>> samples = [{"input_ids": [5, 6], "labels": [1, 2]}, {"input_ids": [7], "labels": [0]}]
        >>> collate(samples)["labels"].tolist()
        [[1, 2], [0, -100]]
    """

    label_pad_token_id: int = IGNORED

    def fill(self) -> dict[str, float]:
        """Per-token fields and their padding values."""
        return {"labels": self.label_pad_token_id, **super().fill()}


@dataclass(frozen=True)
class DataCollatorForSeq2Seq(DataCollatorWithPadding):
    """Pads inputs and labels separately.

    Args:
        label_pad_token_id: Padding value of the labels; the loss ignores -100.
        decoder_start_token_id: If given, the batch gets ``decoder_input_ids``: the labels shifted
            to the right by one after this token, with ``pad_token_id`` in place of -100.

    Example:
        >>> collate = DataCollatorForSeq2Seq(pad_token_id=0, decoder_start_token_id=9)
        >>> batch = collate([{"input_ids": [1, 2, 3], "labels": [4, 5]},
        ...                  {"input_ids": [1], "labels": [6]}])
        >>> batch["labels"].tolist(), batch["decoder_input_ids"].tolist()
        ([[4, 5], [6, -100]], [[9, 4], [9, 6]])
    """

    label_pad_token_id: int = IGNORED
    decoder_start_token_id: int | None = None

    def collate(self, columns: dict[str, list[np.ndarray]]) -> dict[str, np.ndarray]:
        """The batch of the samples' fields."""
        labels = columns.get("labels")
        batch = super().collate({k: v for k, v in columns.items() if k != "labels"})
        if labels is None:
            return batch
        if any(array.ndim == 0 for array in labels):
            raise DataError("The labels of each sample must be a list of token ids.")
        width = self.length(max(len(array) for array in labels))
        side = str(self.padding_side)
        batch["labels"] = pad(widened(labels), self.label_pad_token_id, width, side)
        if self.decoder_start_token_id is not None:
            shifted = np.full_like(batch["labels"], self.decoder_start_token_id)
            shifted[:, 1:] = batch["labels"][:, :-1]
            number = token_id("pad_token_id", self.pad_token_id, self.tokenizer)
            shifted[shifted == self.label_pad_token_id] = number
            batch["decoder_input_ids"] = shifted
        return batch
