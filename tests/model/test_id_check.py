"""Token ids that an embedding has no row for are named before anything is trained on them."""

import keras
import numpy as np
import pytest
from helpers import arguments

from kbtrain import DataError, Trainer

IDS = np.arange(16, dtype="int32").reshape(8, 2) % 5


def model(*tables):
    """A model with an embedding for each number of rows, read from an input of its own."""
    inputs = [keras.Input((2,), dtype="int32", name=f"ids{i}") for i in range(len(tables))]
    read = [keras.layers.Embedding(n, 2)(x) for n, x in zip(tables, inputs, strict=True)]
    joined = read[0] if len(read) == 1 else keras.layers.Add()(read)
    return keras.Model(inputs, keras.layers.Dense(1)(keras.layers.Flatten()(joined)))


def trainer(folder, tables, x, **changes):
    data = {"train_dataset": (x, np.zeros(8, "float32")), "loss": "mse"}
    return Trainer(model(*tables), arguments(folder, max_steps=2, **changes), **data)


def wrong(row, value):
    ids = IDS.copy()
    ids[row, 1] = value
    return ids


@pytest.mark.core
@pytest.mark.parametrize("value", [5, -1])
def test_a_wrong_id_is_named_with_its_place(tmp_path, value):
    changes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    words = rf"its input_dim is 5, .* the id {value} \(update 2, micro-batch 0, row 1, position 1\)"
    with pytest.raises(DataError, match=words):
        trainer(tmp_path, [5], wrong(5, value), **changes).fit()


@pytest.mark.parametrize("form", [list, tuple, lambda x: {"ids0": x[0], "ids1": x[1]}])
def test_each_input_is_compared_with_its_own_table(tmp_path, form):
    right = form([IDS, wrong(0, 6)])
    assert trainer(tmp_path / "right", [5, 7], right).fit().global_step == 2
    with pytest.raises(DataError, match="input_dim is 7"):
        trainer(tmp_path / "wrong", [5, 7], form([IDS, wrong(0, 7)])).fit()
    with pytest.raises(DataError, match="input_dim is 5"):
        trainer(tmp_path / "wrong", [5, 7], form([wrong(0, 6), IDS])).fit()


def test_a_prediction_is_checked_too(tmp_path):
    trained = trainer(tmp_path, [5], IDS)
    trained.fit()
    with pytest.raises(DataError, match="the id 9"):
        trained.predict((wrong(3, 9), np.zeros(8, "float32")))


def test_a_layer_in_between_may_change_the_ids(tmp_path):
    x = keras.Input((2,), dtype="int32")
    table = keras.layers.Embedding(5, 2)(keras.layers.Lambda(lambda t: t % 5)(x))
    changing = keras.Model(x, keras.layers.Dense(1)(keras.layers.Flatten()(table)))
    data = {"train_dataset": (wrong(0, 8), np.zeros(8, "float32")), "loss": "mse"}
    assert Trainer(changing, arguments(tmp_path, max_steps=2), **data).fit().global_step == 2
