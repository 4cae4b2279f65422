"""Collators for language models: masked, causal, and several texts packed into one row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from kbtrain.data.collators.padding import IGNORED, check_positive, fields, lengths, token_id
from kbtrain.data.collators.sequence import DataCollatorWithPadding
from kbtrain.errors import ConfigurationError, DataError

Draw = Callable[[int], np.ndarray]
"""Returns that many numbers in [0, 1)."""


@dataclass(frozen=True)
class DataCollatorForLanguageModeling(DataCollatorWithPadding):
    """Makes the labels of a language model, masked (BERT) or causal (GPT).

    Masked: ``mlm_probability`` of the tokens become labels; of these, 80 % are replaced by the mask
    token, 10 % by any token and 10 % stay. All other labels are -100. In a loader of kbtrain the
    choice is a function of (seed, epoch, number of the batch), so it is new in every epoch and
    the same after a resume. Called by itself, it draws from NumPy's global generator.

    Causal: the label of each position is the next token; the last position and padding have -100.
    (The reference leaves the shift to its models. Keras models and losses do not shift.)

    Args:
        mlm: Masked if True, causal if False.
        mlm_probability: Share of the tokens that become labels.
        mask_replace_prob: Share of these that the mask token replaces.
        random_replace_prob: Share of these that a random token replaces.
        whole_word_mask: Choose words instead of tokens. Samples need ``word_ids`` then: for each
            token the number of its word, or None (or -1) for tokens of no word.
        mask_token_id: The mask token; the tokenizer's if not given.
        vocab_size: Number of tokens to draw from; ``len(tokenizer)`` if not given.
        special_token_ids: Tokens that are never masked; the tokenizer's ``all_special_ids`` if not
            given. A sample's ``special_tokens_mask`` counts as well.
        shift: Causal only: False gives each position its own token, for a model that shifts.
        seed: Seed of the choice.

    Raises:
        ConfigurationError: The arguments do not fit together.

    Example:
        >>> collate = DataCollatorForLanguageModeling(mlm=False, pad_token_id=0)
        >>> batch = collate([[5, 6, 7], [8, 9]])
        >>> batch["labels"].tolist()
        [[6, 7, -100], [9, -100, -100]]

    Reference:
        Devlin et al., BERT: Pre-training of Deep Bidirectional Transformers, 2018, section 3.1.
    """

    mlm: bool = True
    mlm_probability: float = 0.15
    mask_replace_prob: float = 0.8
    random_replace_prob: float = 0.1
    whole_word_mask: bool = False
    mask_token_id: int | None = None
    vocab_size: int | None = None
    special_token_ids: Sequence[int] | None = None
    shift: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the arguments, and read the tokenizer."""
        super().__post_init__()
        if not self.mlm:
            return
        shares = (self.mlm_probability, self.mask_replace_prob, self.random_replace_prob)
        if min(shares) < 0 or max(shares) > 1 or sum(shares[1:]) > 1:
            raise ConfigurationError(
                "Shares lie between 0 and 1, and mask_replace_prob + random_replace_prob is at "
                f"most 1. Received: mlm_probability={shares[0]}, mask_replace_prob={shares[1]}, "
                f"random_replace_prob={shares[2]}"
            )
        number = token_id("mask_token_id", self.mask_token_id, self.tokenizer)
        object.__setattr__(self, "mask_token_id", number)
        size = self.vocab_size
        if size is None and hasattr(self.tokenizer, "__len__"):
            size = len(self.tokenizer)
        if size is None and self.random_replace_prob > 0:
            raise ConfigurationError(
                "This collator needs vocab_size to draw random tokens: give it, or a tokenizer "
                "with a length, or random_replace_prob=0. Received: vocab_size=None"
            )
        check_positive("vocab_size", size)
        object.__setattr__(self, "vocab_size", size)
        special = self.special_token_ids
        if special is None:
            special = getattr(self.tokenizer, "all_special_ids", None) or ()
        object.__setattr__(self, "special_token_ids", tuple(special))

    def __call__(self, samples: Sequence[Any]) -> dict[str, np.ndarray]:
        """Collate samples, masked at random."""
        return self._make(samples, np.random.random_sample)

    def at(self, epoch: int, number: int) -> Callable[[Sequence[Any]], dict[str, np.ndarray]]:
        """The collator of one batch of an epoch: the same position masks the same tokens."""
        sequence = np.random.SeedSequence(self.seed, spawn_key=(epoch, number))
        words = np.random.Philox(sequence)

        def draw(count: int) -> np.ndarray:
            # Raw words, because NumPy may change the streams of its distributions.
            return (words.random_raw(count) >> np.uint64(11)) * 2.0**-53

        return lambda samples: self._make(samples, draw)

    def _make(self, samples: Sequence[Any], draw: Draw) -> dict[str, np.ndarray]:
        words: list[np.ndarray] | None = None
        if self.mlm and self.whole_word_mask:
            samples, words = _take_words(samples)
        columns = {k: v for k, v in fields(samples, self._label_keys).items() if k != "labels"}
        special = columns.pop("special_tokens_mask", None)
        batch = self.collate(columns)
        ids = batch["input_ids"]
        lengths = [len(row) for row in columns["input_ids"]]
        real = self._padded([np.ones(n, bool) for n in lengths], False, ids)
        if not self.mlm:
            batch["labels"] = _next_tokens(ids, real) if self.shift else _where(real, ids)
            return batch
        usable = real & ~np.isin(ids, np.array(self.special_token_ids, ids.dtype))
        if special is not None:
            usable &= self._padded(special, 1, ids) == 0
        grouped = None if words is None else self._padded(words, -1, ids)
        batch["input_ids"], batch["labels"] = self._mask(ids, usable, grouped, draw)
        return batch

    def _padded(self, arrays: list[np.ndarray], value: int, ids: np.ndarray) -> np.ndarray:
        """A field laid out like ``ids``."""
        result = np.full(ids.shape, value, arrays[0].dtype)
        width = ids.shape[1]
        for row, array in zip(result, arrays, strict=True):
            start = 0 if self.padding_side == "right" else width - len(array)
            row[start : start + len(array)] = array
        return result

    def _mask(
        self, ids: np.ndarray, usable: np.ndarray, words: np.ndarray | None, draw: Draw
    ) -> tuple[np.ndarray, np.ndarray]:
        """The masked tokens and the labels."""
        chance = draw(ids.size).reshape(ids.shape)
        if words is not None:
            # One number for each word of each row, looked up by its tokens.
            usable = usable & (words >= 0)
            by_word = draw(ids.shape[0] * (int(words.max(initial=0)) + 1))
            by_word = by_word.reshape(ids.shape[0], -1)
            chance = np.take_along_axis(by_word, np.maximum(words, 0), axis=1)
        chosen = usable & (chance < self.mlm_probability)
        what = draw(ids.size).reshape(ids.shape)
        any_token = draw(ids.size).reshape(ids.shape)
        masked = ids.copy()
        masked[chosen & (what < self.mask_replace_prob)] = self.mask_token_id
        random = chosen & (what >= self.mask_replace_prob)
        random &= what < self.mask_replace_prob + self.random_replace_prob
        masked[random] = (any_token[random] * (self.vocab_size or 0)).astype(ids.dtype)
        return masked, _where(chosen, ids)


def _take_words(samples: Sequence[Any]) -> tuple[list[Any], list[np.ndarray]]:
    """Samples without ``word_ids``, and these as arrays with -1 for tokens of no word."""
    rest, words = [], []
    for sample in samples:
        if not isinstance(sample, Mapping) or sample.get("word_ids") is None:
            raise DataError(
                "whole_word_mask=True needs the field 'word_ids' in each sample: for each token "
                "the number of its word, or None. Tokenizers give it as `encoding.word_ids`."
            )
        numbers = [-1 if word is None else int(word) for word in sample["word_ids"]]
        words.append(np.array(numbers, np.int64))
        rest.append({key: value for key, value in sample.items() if key != "word_ids"})
    return rest, words


def _where(condition: np.ndarray, ids: np.ndarray) -> np.ndarray:
    return np.where(condition, ids, IGNORED)


def _next_tokens(ids: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Each position's next token; -100 where there is none."""
    labels = np.full_like(ids, IGNORED)
    both = real[:, 1:] & real[:, :-1]
    labels[:, :-1][both] = ids[:, 1:][both]
    return labels


@dataclass(frozen=True)
class DataCollatorForPacking:
    """Packs several texts into one row, for causal language models: little padding, one shape.

    Texts are put, in their order, into the first row that has space. Each has positions of its
    own from 0, and its last token has no label, so nothing is predicted across a border.

    Args:
        max_length: Tokens of a row; a longer text is an error.
        rows: Rows of a batch, filled up with empty ones, so that all batches have one shape. None
            makes as many as are needed.
        pad_token_id: What fills up the rows.
        return_attention_mask: Add ``attention_mask``, booleans of shape ``(rows, max_length,
            max_length)`` as ``keras.layers.MultiHeadAttention`` takes them: true where the query
            (second axis) may see the key (third axis): the same text, not later. Padding sees
            itself, so that no softmax is empty.

    Returns (when called with a list of samples):
        ``input_ids``, ``position_ids``, ``segment_ids`` (1, 2, ... within a row; 0 is padding) and
        ``labels`` (the next token, or the samples' own next ``labels``), of shape
        ``(rows, max_length)``.

    Raises:
        ConfigurationError: An argument is not a positive integer.
        DataError: A text is longer than a row, or the texts need more rows than there are.

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
    takes: ClassVar[frozenset[str]] = frozenset(("input_ids",))
    """The columns it looks at, besides labels."""

    def __post_init__(self) -> None:
        """Check the arguments."""
        if self.max_length is None:
            raise ConfigurationError("max_length must be an integer. Received: None")
        check_positive("max_length", self.max_length)
        check_positive("rows", self.rows)

    def __call__(self, samples: Sequence[Any]) -> dict[str, np.ndarray]:
        """Pack samples; see the class."""
        columns = fields(samples)
        places = self._places(lengths(columns))
        texts = columns["input_ids"]
        targets = columns.get("labels", texts)
        needed = 1 + max(row for row, _ in places)
        if self.rows is not None and needed > self.rows:
            raise DataError(
                f"The texts of a batch need {needed} rows of {self.max_length} tokens, and "
                f"rows={self.rows}. Raise rows, or lower per_device_train_batch_size."
            )
        shape = (self.rows or needed, self.max_length)
        kind = texts[0].dtype
        batch = {
            "input_ids": np.full(shape, self.pad_token_id, kind),
            "position_ids": np.zeros(shape, kind),
            "segment_ids": np.zeros(shape, kind),
            "labels": np.full(shape, IGNORED, kind),
        }
        for text, target, (row, start) in zip(texts, targets, places, strict=True):
            if target.shape != text.shape:
                raise DataError(
                    "The labels of a text must be as many as its input_ids. "
                    f"Received: shapes {target.shape} and {text.shape}"
                )
            stop = start + len(text)
            batch["input_ids"][row, start:stop] = text
            batch["position_ids"][row, start:stop] = np.arange(len(text))
            batch["segment_ids"][row, start:stop] = 1 + batch["segment_ids"][row].max()
            batch["labels"][row, start : max(start, stop - 1)] = target[1:]
        if self.return_attention_mask:
            batch["attention_mask"] = causal_segments(batch["segment_ids"])
        return batch

    def _places(self, lengths: Sequence[int]) -> list[tuple[int, int]]:
        """Row and first column of each text: the first row with space."""
        used: list[int] = []
        places = []
        for length in lengths:
            if length > self.max_length:
                raise DataError(
                    f"A text has {length} tokens, more than max_length={self.max_length}. Split "
                    "long texts before they are packed, or raise max_length."
                )
            fitting = (row for row, start in enumerate(used) if start + length <= self.max_length)
            row = next(fitting, len(used))
            if row == len(used):
                used.append(0)
            places.append((row, used[row]))
            used[row] += length
        return places


def causal_segments(segment_ids: np.ndarray) -> np.ndarray:
    """Who may attend to whom in packed rows.

    Args:
        segment_ids: Numbers of the texts, shape ``(rows, length)``.

    Returns:
        Booleans of shape ``(rows, length, length)``: [row, query, key] is true if both belong to
        the same text and the key is not later.
    """
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    result: np.ndarray = same & np.tri(segment_ids.shape[1], dtype=bool)
    return result
