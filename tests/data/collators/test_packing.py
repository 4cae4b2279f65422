"""Packing: where texts are put, and that a packed batch is computed like its texts one by one."""

import keras
import numpy as np
import pytest
from helpers import StopAt, arguments, same, weights, with_weights

from kbtrain import DataCollatorForPacking, Trainer
from kbtrain.data.collators.packing import causal_segments
from kbtrain.errors import DataError

TEXTS = [[5, 6, 7], [8, 9], [4, 3, 2, 1], [7, 7], [1, 9, 8, 3, 6]]


def lists(batch):
    return {name: array.tolist() for name, array in batch.items()}


def test_rows_are_filled_and_segments_numbered():
    texts = [[5, 6, 7], [8, 9], [1], [2, 3, 4, 5]]
    batch = DataCollatorForPacking(5, rows=3, pad_token_id=99)(texts)
    no = -100
    assert lists(batch) == {
        "input_ids": [[5, 6, 7, 8, 9], [1, 2, 3, 4, 5], [99] * 5],
        "position_ids": [[0, 1, 2, 0, 1], [0, 0, 1, 2, 3], [0] * 5],
        "segment_ids": [[1, 1, 1, 2, 2], [1, 2, 2, 2, 2], [0] * 5],
        "labels": [[6, 7, no, 9, no], [no, 3, 4, 5, no], [no] * 5],
    }


def test_a_text_goes_into_the_first_row_with_room():
    batch = DataCollatorForPacking(4)([[1] * 3, [2] * 3, [3], [4]])
    assert batch["input_ids"].tolist() == [[1, 1, 1, 3], [2, 2, 2, 4]]


def test_labels_of_the_samples_are_packed():
    batch = DataCollatorForPacking(4)([{"input_ids": [5, 6, 7], "labels": [-100, 6, 8]}])
    assert batch["labels"].tolist() == [[6, 8, -100, -100]]


def test_the_mask_keeps_texts_apart():
    mask = causal_segments(np.array([[1, 1, 2, 0]])).astype(int).tolist()
    assert mask == [[[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]]
    batch = DataCollatorForPacking(4, return_attention_mask=True)([[5, 6], [7]])
    np.testing.assert_array_equal(batch["attention_mask"], np.array(mask, bool))


def test_other_fields_are_packed_like_the_tokens():
    samples = [
        {"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1], "token_type_ids": [0, 1, 1]},
        {"input_ids": [8, 9], "attention_mask": [1, 1], "token_type_ids": [1, 2]},
    ]
    vectors = [np.full((3, 2), 0.5), np.full((2, 2), 0.25)]
    samples = [one | {"vectors": v} for one, v in zip(samples, vectors, strict=True)]
    batch = DataCollatorForPacking(6)(samples)
    assert batch["token_type_ids"].tolist() == [[0, 1, 1, 1, 2, 0]]
    assert batch["vectors"].tolist() == [[[0.5] * 2] * 3 + [[0.25] * 2] * 2 + [[0.0] * 2]]
    assert "attention_mask" not in batch


@pytest.mark.parametrize("weights", [[[9.0, 1.0, 2.0], [9.0, 3.0]], [1.5, 3.0]])
def test_weights_stand_where_the_token_is_predicted(weights):
    samples = [
        {"input_ids": ids, "sample_weight": weight}
        for ids, weight in zip([[5, 6, 7], [8, 9]], weights, strict=True)
    ]
    batch = DataCollatorForPacking(6)(samples)
    assert batch["labels"].tolist() == [[6, 7, -100, 9, -100, -100]]
    first = [1.0, 2.0] if isinstance(weights[0], list) else [1.5, 1.5]
    assert batch["sample_weight"].tolist() == [[*first, 0.0, 3.0, 0.0, 0.0]]


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([{"input_ids": [1, 2], "score": 0.5}], r"'score' cannot be packed.*shape \(\) for a text"),
        ([{"input_ids": [1, 2], "mask": [1]}], r"'mask' cannot be packed.*text of 2 tokens"),
        ([{"input_ids": [1, 0], "attention_mask": [1, 0]}], "without padding"),
        ([{"input_ids": [1, 2], "position_ids": [0, 1]}], "Packing makes 'position_ids' itself"),
        ([[1] * 5], "5 tokens, more than max_length=4"),
        ([[1] * 3, [2] * 3, [3] * 3], "need 3 rows of 4 tokens, but rows=2"),
        ([{"x": [1]}], "need the field 'input_ids'"),
        ([{"input_ids": [1, 2], "labels": [1]}], "as many labels as input_ids"),
    ],
)
def test_texts_are_checked(samples, message):
    with pytest.raises(DataError, match=message):
        DataCollatorForPacking(4, rows=2)(samples)


# -------------------------------------------------------------------------------- through a Trainer


def causal_transformer(*names):
    """One layer of causal attention; its inputs are ``input_ids`` and those of ``names``."""
    inputs = {"input_ids": keras.Input((None,), dtype="int32", name="input_ids")}
    x = keras.layers.Embedding(10, 8)(inputs["input_ids"])
    mask = None
    if "position_ids" in names:
        inputs["position_ids"] = keras.Input((None,), dtype="int32", name="position_ids")
        x = x + keras.layers.Embedding(12, 8)(inputs["position_ids"])
    if "attention_mask" in names:
        inputs["attention_mask"] = mask = keras.Input(
            (None, None), dtype="bool", name="attention_mask"
        )
    attended = keras.layers.MultiHeadAttention(2, 4)(x, x, attention_mask=mask)
    x = keras.layers.LayerNormalization()(x + attended)
    x = x + keras.layers.Dense(8, activation="gelu")(x)
    return with_weights(keras.Model(inputs, keras.layers.Dense(10)(x)))


def trainer_of(folder, model, data, collate=None, callbacks=(), **options):
    options = {"max_steps": 1, "learning_rate": 1.0, "optim": "sgd"} | options
    return Trainer(
        model,
        arguments(folder, **options),
        collate,
        data,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        callbacks=list(callbacks),
    )


@pytest.mark.core
def test_packed_and_unpacked_batches_have_equal_losses_and_gradients(tmp_path):
    """One update of plain gradient descent shows the gradient. One text a row is padded by hand."""
    names = ("position_ids", "attention_mask")
    apart = {
        "input_ids": np.zeros((5, 5), "int32"),
        "position_ids": np.tile(np.arange(5), (5, 1)),
        "attention_mask": np.tile(np.tri(5, dtype=bool), (5, 1, 1)),
        "labels": np.full((5, 5), -100),
    }
    for row, text in enumerate(TEXTS):
        apart["input_ids"][row, : len(text)] = text
        apart["labels"][row, : len(text) - 1] = text[1:]
    runs = []
    for folder, data, collate in (
        ("packed", [{"input_ids": text} for text in TEXTS], DataCollatorForPacking(9, rows=2)),
        ("apart", apart, None),
    ):
        trainer = trainer_of(
            tmp_path / folder,
            causal_transformer(*names),
            data,
            collate,
            per_device_train_batch_size=5,
        )
        runs.append((trainer.fit().training_loss, weights(trainer.model)))
    (loss, packed), (other, unpacked) = runs
    assert loss == pytest.approx(other, abs=1e-6)
    for one, two in zip(packed, unpacked, strict=True):
        np.testing.assert_allclose(one, two, atol=1e-6)


@pytest.mark.neutral
def test_a_run_over_packed_rows_resumes_exactly(tmp_path, caplog):
    def make(folder, *callbacks):
        return trainer_of(
            tmp_path / folder,
            causal_transformer("attention_mask"),
            [{"input_ids": text} for text in TEXTS],
            DataCollatorForPacking(9, rows=1),
            per_device_train_batch_size=2,
            learning_rate=0.1,
            max_steps=4,
            save_strategy="steps",
            save_steps=2,
            callbacks=callbacks,
        )

    whole, resumed = make("whole"), make("part")
    whole.fit()
    make("part", StopAt(2)).fit()
    resumed.fit(resume_from_checkpoint=True)
    assert same(weights(whole.model), weights(resumed.model))
    assert "segment_ids" not in caplog.text  # nothing is said about what the model need not take


def test_a_model_that_cannot_keep_texts_apart_is_warned_about(tmp_path, caplog):
    data = [{"input_ids": text} for text in TEXTS]
    trainer_of(
        tmp_path, causal_transformer(), data, DataCollatorForPacking(9)
    ).get_train_dataloader()
    assert "takes neither attention_mask nor segment_ids (it takes input_ids)" in caplog.text
