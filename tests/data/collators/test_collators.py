"""Collators against arrays written by hand, and shares counted in large samples."""

import doctest
import math

import keras
import numpy as np
import pytest
from helpers import StopAt, arguments, same, weights, with_weights

import kbtrain.data.collators.language_modeling
import kbtrain.data.collators.packing
import kbtrain.data.collators.padding
import kbtrain.data.collators.sequence
import kbtrain.data.prefetch
import kbtrain.data.sampling.by_length
import kbtrain.data.sampling.permutation
from kbtrain import (
    DataCollatorForLanguageModeling,
    DataCollatorForPacking,
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    Trainer,
)
from kbtrain.data import DataLoader
from kbtrain.errors import ConfigurationError, DataError

SAMPLES = [
    {"input_ids": [5, 6, 7], "token_type_ids": [0, 0, 1], "label": 1},
    {"input_ids": [8], "token_type_ids": [1], "label": 0},
]


@pytest.mark.parametrize(
    "collate",
    [
        DataCollatorWithPadding(pad_token_id=0),
        DataCollatorForLanguageModeling(mlm=False, pad_token_id=0),
        DataCollatorForPacking(max_length=4),
    ],
)
def test_an_empty_text_does_not_make_the_tokens_floats(collate):
    big = 2**24 + 1  # float32 has no such number
    for samples in ([[], [big]], [[big], []], [[], []]):
        ids = collate([{"input_ids": sample} for sample in samples])["input_ids"]
        assert ids.dtype.kind == "i"
        assert (big in ids) == ([big] in samples)
    with pytest.raises(DataError, match="must be a list of token ids. Received: 3 in sample 1"):
        collate([{"input_ids": [1]}, {"input_ids": 3}])


def test_numbers_of_several_kinds_keep_their_values():
    """The first sample's kind would cut off what comes after the point in the others."""
    collate = DataCollatorWithPadding(pad_token_id=0, padding_values={"speed": -1})
    samples = [{"input_ids": [1], "speed": [1]}, {"input_ids": [1, 2], "speed": [0.5, 1.5]}]
    assert collate(samples)["speed"].tolist() == [[1.0, -1.0], [0.5, 1.5]]


@pytest.mark.parametrize(
    "module",
    [
        kbtrain.data.collators.sequence,
        kbtrain.data.collators.language_modeling,
        kbtrain.data.collators.packing,
        kbtrain.data.sampling.by_length,
        kbtrain.data.collators.padding,
        kbtrain.data.sampling.permutation,
        kbtrain.data.prefetch,
    ],
    ids=lambda module: module.__name__,
)
def test_examples_in_docstrings(module):
    result = doctest.testmod(module)
    assert result.attempted
    assert not result.failed


def lists(batch):
    return {name: array.tolist() for name, array in batch.items()}


# ------------------------------------------------------------------------------------------ padding


def test_padding_to_the_longest():
    batch = DataCollatorWithPadding(pad_token_id=9)(SAMPLES)
    assert lists(batch) == {
        "input_ids": [[5, 6, 7], [8, 9, 9]],
        "token_type_ids": [[0, 0, 1], [1, 0, 0]],
        "labels": [1, 0],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
    }


@pytest.mark.parametrize(
    ("arguments", "length"),
    [
        ({}, 3),
        ({"padding": "longest", "max_length": 7}, 3),
        ({"pad_to_multiple_of": 4}, 4),
        ({"pad_to_multiple_of": 3}, 3),
        ({"padding": "max_length", "max_length": 5}, 5),
        ({"padding": "max_length", "max_length": 5, "pad_to_multiple_of": 8}, 8),
    ],
)
def test_padding_gives_the_length_asked_for(arguments, length):
    batch = DataCollatorWithPadding(pad_token_id=0, **arguments)(SAMPLES)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, length)


def test_padding_on_the_left_and_masks_that_are_there():
    samples = [
        {"input_ids": [5, 6], "attention_mask": [0, 1]},
        {"input_ids": [7], "attention_mask": [1]},
    ]
    assert lists(DataCollatorWithPadding(pad_token_id=0, padding_side="left")(samples)) == {
        "input_ids": [[5, 6], [0, 7]],
        "attention_mask": [[0, 1], [0, 1]],
    }


def test_what_a_tokenizer_knows_is_taken_from_it():
    class Tokenizer:
        pad_token_id, padding_side = 3, "left"

    batch = DataCollatorWithPadding(Tokenizer(), return_attention_mask=False)([[1, 2], [4]])
    assert lists(batch) == {"input_ids": [[1, 2], [3, 4]]}


def test_fields_of_other_kinds():
    samples = [
        {"input_ids": [1, 2], "speed": [0.5, 1.0], "box": np.zeros((2, 4)), "image": np.ones(3)},
        {"input_ids": [1], "speed": [2.0], "box": np.ones((1, 4)), "image": np.ones(3)},
    ]
    collate = DataCollatorWithPadding(pad_token_id=0, padding_values={"speed": -1, "box": 7})
    batch = collate(samples)
    assert batch["speed"].tolist() == [[0.5, 1.0], [2.0, -1.0]]
    assert batch["box"].tolist() == [[[0] * 4] * 2, [[1] * 4, [7] * 4]]
    assert batch["image"].shape == (2, 3)
    assert batch["box"].dtype == batch["image"].dtype == np.float32


@pytest.mark.parametrize("kind", ["int8", "uint8", "uint16", "uint32", "uint64"])
@pytest.mark.parametrize(
    "collate",
    [
        DataCollatorForLanguageModeling(mlm=False, pad_token_id=0),
        DataCollatorForLanguageModeling(mlm=False, padding=False),
        DataCollatorForLanguageModeling(
            pad_token_id=0, mask_token_id=50_000, vocab_size=50_001, mlm_probability=1.0
        ),
        DataCollatorForTokenClassification(pad_token_id=50_000),
        DataCollatorForSeq2Seq(pad_token_id=50_000, decoder_start_token_id=50_000),
        DataCollatorForPacking(300),
    ],
)
def test_narrow_integers_have_room_for_labels_and_positions(kind, collate):
    size = 200
    other = 1 if getattr(collate, "padding", True) else size
    samples = [{"input_ids": np.ones(n, kind), "labels": np.ones(n, kind)} for n in (size, other)]
    batch = collate(samples)
    wide = "int32" if np.can_cast(kind, "int32") else "int64"
    assert {batch[name].dtype.name for name in ("input_ids", "labels")} == {wide}
    if isinstance(collate, DataCollatorForPacking):
        assert batch["position_ids"][0, :size].tolist() == list(range(size))
    assert set(np.unique(batch["labels"])) <= {-100, 1}


def test_a_padding_value_that_does_not_fit_widens_the_field():
    collate = DataCollatorWithPadding(pad_token_id=0, padding_values={"x": -1, "m": 0})
    samples = [
        {"input_ids": [1] * n, "x": np.ones(n, "uint8"), "m": np.ones(n, bool)} for n in (2, 1)
    ]
    batch = collate(samples)
    assert batch["x"].tolist() == [[1, 1], [1, -1]]
    assert batch["m"].dtype == bool
    with pytest.raises(DataError, match=r"Integers \(uint8\) cannot be padded with 0.5"):
        DataCollatorWithPadding(pad_token_id=0, padding_values={"x": 0.5, "m": 0})(samples)


def test_no_padding_stacks():
    collate = DataCollatorWithPadding(padding=False)
    assert collate([[1, 2], [3, 4]])["input_ids"].tolist() == [[1, 2], [3, 4]]
    with pytest.raises(DataError, match="input_ids.*differs in shape"):
        collate(SAMPLES)


def test_labels_per_token_are_padded_with_the_ignored_index():
    samples = [{"input_ids": [5, 6, 7], "labels": [1, 0, 2]}, {"input_ids": [8], "labels": [1]}]
    batch = DataCollatorForTokenClassification(pad_token_id=0, pad_to_multiple_of=4)(samples)
    assert batch["labels"].tolist() == [[1, 0, 2, -100], [1, -100, -100, -100]]
    batch = DataCollatorForTokenClassification(pad_token_id=0, padding_side="left")(samples)
    assert batch["labels"].tolist() == [[1, 0, 2], [-100, -100, 1]]


def test_sequence_to_sequence_pads_inputs_and_labels_apart():
    samples = [
        {"input_ids": [5, 6, 7], "labels": [1]},
        {"input_ids": [8], "labels": [2, 3, 4, 5, 6]},
    ]
    collate = DataCollatorForSeq2Seq(
        pad_token_id=0, pad_to_multiple_of=4, decoder_start_token_id=11
    )
    assert lists(collate(samples)) == {
        "input_ids": [[5, 6, 7, 0], [8, 0, 0, 0]],
        "attention_mask": [[1, 1, 1, 0], [1, 0, 0, 0]],
        "labels": [[1] + [-100] * 7, [2, 3, 4, 5, 6, -100, -100, -100]],
        "decoder_input_ids": [[11, 1, 0, 0, 0, 0, 0, 0], [11, 2, 3, 4, 5, 6, 0, 0]],
    }
    inputs_only = [{"input_ids": [1]}]
    assert set(collate(inputs_only)) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DataCollatorWithPadding(), "needs pad_token_id"),
        (lambda: DataCollatorWithPadding(object()), "object has none"),
        (lambda: DataCollatorWithPadding(pad_token_id=0, padding="long"), "padding='long'"),
        (lambda: DataCollatorWithPadding(pad_token_id=0, padding="max_length"), "max_length"),
        (lambda: DataCollatorWithPadding(pad_token_id=0, pad_to_multiple_of=0), "multiple_of=0"),
        (lambda: DataCollatorWithPadding(pad_token_id=0, padding_side="top"), "padding_side='top'"),
        (lambda: DataCollatorForLanguageModeling(pad_token_id=0), "needs mask_token_id"),
        (
            lambda: DataCollatorForLanguageModeling(pad_token_id=0, mask_token_id=1),
            "needs vocab_size",
        ),
        (
            lambda: DataCollatorForLanguageModeling(
                pad_token_id=0, mask_token_id=1, vocab_size=9, random_replace_prob=0.3
            ),
            "random_replace_prob=0.3",
        ),
        (lambda: DataCollatorForPacking(0), "max_length=0"),
        (lambda: DataCollatorForPacking(4, rows=0), "rows=0"),
    ],
)
def test_arguments_are_checked(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([], "at least one sample"),
        ([([1], 0)], "accepts dicts.*Received: a tuple"),
        ([{"ids": [1]}], "need the field 'input_ids'"),
        ([{"input_ids": [1]}, {"input_ids": [1], "x": 2}], "same keys"),
        ([{"input_ids": [1], "label": 0, "labels": 0}], "may have one of the keys"),
        ([{"input_ids": [1], "text": "a"}], r"sample\['text'\] is a string"),
        ([{"input_ids": [1, 2], "attention_mask": [1]}], "one value for each"),
        ([{"input_ids": [1], "x": [1]}, {"input_ids": [1], "x": [1, 2]}], "padding_values"),
        ([{"input_ids": [1] * 5}], "5 tokens, more than max_length=4"),
    ],
)
def test_samples_are_checked(samples, message):
    collate = DataCollatorWithPadding(pad_token_id=0, padding="max_length", max_length=4)
    with pytest.raises(DataError, match=message):
        collate(samples)


# ------------------------------------------------------------------------------- language modelling


def masking(**arguments):
    defaults = {"pad_token_id": 0, "mask_token_id": 1, "vocab_size": 1000, "special_token_ids": [2]}
    return DataCollatorForLanguageModeling(**(defaults | arguments))


def test_causal_labels_are_the_next_tokens():
    collate = DataCollatorForLanguageModeling(mlm=False, pad_token_id=0, pad_to_multiple_of=4)
    batch = collate([[5, 6, 7], [8, 0]])  # a 0 that is no padding
    assert batch["labels"].tolist() == [[6, 7, -100, -100], [0, -100, -100, -100]]
    left = DataCollatorForLanguageModeling(mlm=False, pad_token_id=0, padding_side="left")
    assert left([[5, 6, 7], [8, 9]])["labels"].tolist() == [[6, 7, -100], [-100, 9, -100]]
    own = DataCollatorForLanguageModeling(mlm=False, pad_token_id=0, shift=False)
    assert own([[5, 6, 7], [8, 9]])["labels"].tolist() == [[5, 6, 7], [8, 9, -100]]


def shares(batch, ids):
    labels, found = batch["labels"], batch["input_ids"]
    chosen = labels != -100
    np.testing.assert_array_equal(labels[chosen], ids[chosen])
    np.testing.assert_array_equal(found[~chosen], ids[~chosen])
    masked = chosen & (found == 1)
    other = chosen & (found != 1) & (found != ids)
    return chosen, masked, other


def near(count, total, share):
    return abs(count - total * share) < 5 * math.sqrt(total * share * (1 - share))


def test_masking_chooses_the_shares_of_the_formula():
    ids = np.full((200, 500), 7)
    batch = masking().at(0, 0)(list(ids))
    chosen, masked, other = shares(batch, ids)
    assert near(chosen.sum(), ids.size, 0.15)
    assert near(masked.sum(), chosen.sum(), 0.8)
    assert near(other.sum(), chosen.sum(), 0.1)
    drawn = batch["input_ids"][other]
    assert drawn.min() < 20
    assert 980 < drawn.max() < 1000
    assert abs(drawn.mean() - 499.5) < 5 * 289 / math.sqrt(len(drawn))


def test_special_tokens_and_padding_are_never_masked():
    samples = [
        {"input_ids": [2, 7, 7, 2], "special_tokens_mask": [0, 0, 1, 0]},
        {"input_ids": [7], "special_tokens_mask": [0]},
    ]
    batch = masking(mlm_probability=1.0, mask_replace_prob=1.0, random_replace_prob=0.0)(samples)
    assert lists(batch) == {
        "input_ids": [[2, 1, 7, 2], [1, 0, 0, 0]],
        "attention_mask": [[1, 1, 1, 1], [1, 0, 0, 0]],
        "labels": [[-100, 7, -100, -100], [7, -100, -100, -100]],
    }


@pytest.mark.parametrize("side", ["left", "right"])
def test_whole_words_are_masked_together(side):
    words = [None, 0, 0, 0, 1, 2, 2, None]
    samples = [{"input_ids": [2, 5, 5, 5, 6, 7, 7, 2], "word_ids": words}] * 300
    samples += [{"input_ids": [5, 5], "word_ids": [0, 0]}] * 300
    collate = masking(whole_word_mask=True, padding_side=side, mlm_probability=0.3)
    chosen = collate.at(0, 3)(samples)["labels"] != -100
    long, short = chosen[:300], chosen[300:]
    assert not long[:, [0, 7]].any()
    assert (long[:, 1] == long[:, 2]).all()
    assert (long[:, 1] == long[:, 3]).all()
    assert (long[:, 5] == long[:, 6]).all()
    pair = [0, 1] if side == "right" else [6, 7]
    assert (short[:, pair[0]] == short[:, pair[1]]).all()
    assert short.sum() == 2 * short[:, pair[0]].sum()
    for column in (long[:, 1], long[:, 4], long[:, 5], short[:, pair[0]]):
        assert near(column.sum(), 300, 0.3)
    assert (long[:, 1] != long[:, 4]).any()


def test_whole_words_need_word_ids():
    with pytest.raises(DataError, match="needs the field 'word_ids'"):
        masking(whole_word_mask=True)([{"input_ids": [5]}])


def test_masks_belong_to_the_position_in_the_data():
    ids = [np.full(40, 7)] * 12

    def read(epoch, start=0, seed=0):
        loader = DataLoader(ids, 4, collate=masking(seed=seed))
        return [batch["input_ids"].tolist() for batch in loader.epoch(epoch, start)]

    whole = read(0)
    assert read(0) == whole
    assert read(0, 2) == whole[2:]
    others = [whole[0], whole[1], whole[2], read(1)[0], read(0, seed=1)[0]]
    assert len({str(batch) for batch in others}) == 5
    stream = DataLoader(lambda: iter(ids), 4, collate=masking())
    assert [batch["input_ids"].tolist() for batch in stream.epoch(0)] == whole


def test_alone_it_draws_from_the_global_generator():
    ids = [np.full(100, 7)] * 4
    np.random.seed(3)
    first, second = masking()(ids), masking()(ids)
    np.random.seed(3)
    np.testing.assert_array_equal(masking()(ids)["labels"], first["labels"])
    assert (first["labels"] != second["labels"]).any()


def test_a_masked_language_model_resumes_exactly(tmp_path):
    """Other numbers than the position decide nothing: the masks after a resume are the same."""
    ids = np.random.default_rng(0).integers(3, 20, (16, 6))

    def make(folder, *callbacks):
        inputs = keras.Input((None,), dtype="int32", name="input_ids")
        outputs = keras.layers.Dense(20)(keras.layers.Embedding(20, 4)(inputs))
        args = arguments(
            tmp_path / folder,
            per_device_train_batch_size=4,
            train_sampling_strategy="random",
            num_train_epochs=2,
            save_strategy="steps",
            save_steps=3,
        )
        return Trainer(
            with_weights(keras.Model({"input_ids": inputs}, outputs)),
            args,
            masking(vocab_size=20, mlm_probability=0.5, return_attention_mask=False),
            [{"input_ids": row} for row in ids],
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            callbacks=list(callbacks),
        )

    whole, stopped, resumed = make("whole"), make("part", StopAt(3)), make("part")
    whole.fit()
    stopped.fit()
    np.random.seed(99)
    resumed.fit(resume_from_checkpoint=True)
    assert same(weights(whole.model), weights(resumed.model))
