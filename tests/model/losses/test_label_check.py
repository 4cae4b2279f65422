"""Integer labels that the model has no class for: the same clear error on every backend."""

import keras
import numpy as np
import pytest
from helpers import arguments, same, weights

from kbtrain import DataError, Trainer

FROM_LOGITS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def classifier(classes=3):
    return keras.Sequential([keras.Input((5,)), keras.layers.Dense(classes)])


def data(labels, *more):
    x = np.random.default_rng(1).normal(size=(12, 5)).astype("float32")
    return x, labels, *more


def labels(dtype="int64", **wrong):
    """0, 1, 2, 0, 1, 2, ... with other values at some rows (``r5=7``)."""
    y = np.arange(12).astype(dtype) % 3
    for row, value in wrong.items():
        y[int(row[1:])] = value
    return y


def trainer(tmp_path, dataset, loss=FROM_LOGITS, model=None, **changes):
    settings = {"per_device_train_batch_size": 4, "jit_compile": False,
                "train_sampling_strategy": "sequential"} | changes  # fmt: skip
    return Trainer(
        model or classifier(), arguments(tmp_path, **settings), train_dataset=dataset, loss=loss
    )


@pytest.mark.parametrize(
    ("y", "changes", "match"),
    [
        (labels(r0=3), {}, r"has 3, .* 0 to 2.* the label 3 \(update 1, row 0\)"),
        (labels(r3=-1), {}, r"the label -1 \(update 1, row 3\)"),
        (labels("uint8", r2=200), {}, r"the label 200 \(update 1, row 2\)"),
        (labels("float32", r1=3), {}, r"the label 3.0 \(update 1, row 1\)"),
        (labels() + 1, {}, r"label 3 \(update 1, row 2\). If the labels begin at 1, subtract 1"),
        (labels(r9=5), {"gradient_accumulation_steps": 3}, r"update 1, micro-batch 2, row 1"),
        (labels(r2=3)[:, None], {}, r"update 1, row 2, position 0"),
        (labels(r1=4), {"label_smoothing_factor": 0.1}, "the label 4"),
    ],
)  # fmt: skip
def test_a_label_without_a_class_is_named(y, changes, match, tmp_path):
    run = trainer(tmp_path, data(y), **changes)
    before = weights(run.model)
    with pytest.raises(DataError, match=match):
        run.fit()
    assert same(weights(run.model), before)


def test_in_a_later_update_and_in_an_evaluation(tmp_path):
    run = trainer(tmp_path, data(labels(r9=3)))
    with pytest.raises(DataError, match=r"the label 3 \(update 3, row 1\)"):
        run.fit()
    with pytest.raises(DataError, match=r"the label 3 \(batch 1, row 1\)"):
        run.evaluate(data(labels(r9=3)))


def test_one_of_several_outputs(tmp_path):
    inputs = keras.Input((5,))
    model = keras.Model(inputs, {"kind": keras.layers.Dense(3, name="kind")(inputs),
                                 "size": keras.layers.Dense(1, name="size")(inputs)})  # fmt: skip
    y = {"kind": labels(r0=3), "size": np.full((12, 1), 9.0, "float32")}
    run = trainer(tmp_path, data(y), {"kind": FROM_LOGITS, "size": "mse"}, model)
    with pytest.raises(DataError, match="the output 'kind' has 3"):
        run.fit()


def test_what_is_left_out_may_be_anything(tmp_path):
    assert trainer(tmp_path / "a", data(labels(r1=-100)), max_steps=1).fit().global_step == 1
    ignoring = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=2)
    assert trainer(tmp_path / "b", data(labels()), ignoring, max_steps=1).fit().global_step == 1


def test_labels_that_a_loss_of_the_users_reads_are_not_checked(tmp_path):
    def shifted(y, outputs):
        return FROM_LOGITS(y - 1, outputs)

    assert trainer(tmp_path, data(labels() + 1), shifted, max_steps=1).fit().global_step == 1
