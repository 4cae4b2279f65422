"""The collator for language models, masked and causal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kbtrain.data.collators.padding import IGNORED, check_positive, fields, token_id
from kbtrain.data.collators.sequence import DataCollatorWithPadding
from kbtrain.errors import ConfigurationError, DataError

Draw = Callable[[int], np.ndarray]
"""Returns that many numbers in [0, 1)."""


@dataclass(frozen=True)
class DataCollatorForLanguageModeling(DataCollatorWithPadding):
    """Creates the labels of a language model, masked (BERT) or causal (GPT).

    Masked: ``mlm_probability`` of the tokens become labels; of these, 80 % are replaced by the mask
    token, 10 % by a random token and 10 % are kept. All other labels are -100. In a loader of
    kbtrain the choice is a function of (seed, epoch, number of the batch), so it differs in every
    epoch and is the same after a resume. Called directly, it draws from NumPy's global generator.

    Causal: the label of each position is the next token; the last position and padding have -100.
    (In Transformers the models shift the labels. Keras models and losses do not.)

    Args:
        mlm: Masked if True, causal if False.
        mlm_probability: Fraction of the tokens that become labels.
        mask_replace_prob: Fraction of these that are replaced by the mask token.
        random_replace_prob: Fraction of these that are replaced by a random token.
        whole_word_mask: Mask whole words instead of tokens. Samples then need ``word_ids``: the
            index of each token's word, or None (or -1) for tokens outside of words.
        mask_token_id: The mask token; the tokenizer's by default.
        vocab_size: Number of tokens to draw from; ``len(tokenizer)`` by default.
        special_token_ids: Tokens that are never masked; the tokenizer's ``all_special_ids`` by
            default. A sample's ``special_tokens_mask`` is respected too.
        shift: Causal only: False makes each token its own label, for models that shift.
        seed: Seed of the random choice.

    Raises:
        ConfigurationError: The arguments are inconsistent.

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
                "Probabilities must be between 0 and 1, and mask_replace_prob + "
                "random_replace_prob at most 1. "
                f"Received: mlm_probability={shares[0]}, mask_replace_prob={shares[1]}, "
                f"random_replace_prob={shares[2]}"
            )
        number = token_id("mask_token_id", self.mask_token_id, self.tokenizer)
        object.__setattr__(self, "mask_token_id", number)
        size = self.vocab_size
        if size is None and hasattr(self.tokenizer, "__len__"):
            size = len(self.tokenizer)
        if size is None and self.random_replace_prob > 0:
            raise ConfigurationError(
                "This collator needs vocab_size to draw random tokens. Pass it, or a tokenizer "
                "with a length, or random_replace_prob=0. Received: vocab_size=None"
            )
        check_positive("vocab_size", size)
        object.__setattr__(self, "vocab_size", size)
        special = self.special_token_ids
        if special is None:
            special = getattr(self.tokenizer, "all_special_ids", None) or ()
        object.__setattr__(self, "special_token_ids", tuple(special))

    def __call__(self, samples: Sequence[Any]) -> dict[str, np.ndarray]:
        """Collate samples with random masking."""
        return self._make(samples, np.random.random_sample)

    def at(self, epoch: int, number: int) -> Callable[[Sequence[Any]], dict[str, np.ndarray]]:
        """The collator for one batch of an epoch: the same position masks the same tokens."""
        sequence = np.random.SeedSequence(self.seed, spawn_key=(epoch, number))
        words = np.random.Philox(sequence)

        def draw(count: int) -> np.ndarray:
            # From raw words, because NumPy may change the streams of its distributions.
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
        """A field padded like ``ids``."""
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
            # One random number for each word of each row, shared by its tokens.
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
    """Samples without ``word_ids``, and the word ids as arrays, -1 for tokens outside of words."""
    rest, words = [], []
    for sample in samples:
        if not isinstance(sample, Mapping) or sample.get("word_ids") is None:
            raise DataError(
                "whole_word_mask=True needs the field 'word_ids' in each sample: for each token "
                "the index of its word, or None. Tokenizers return it as `encoding.word_ids`."
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
