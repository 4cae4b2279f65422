"""The warning about data that comes in many shapes."""

import logging

import numpy as np
import pytest
from helpers import arguments

import kbtrain.data.shape_monitor
from kbtrain import Trainer
from kbtrain.data import Batches, as_loader
from kbtrain.data.shape_monitor import MANY_SHAPES


def batches(lengths):
    return [
        ({"ids": np.zeros((2, n), np.int32), "age": np.zeros((2, 1), np.float32)}, np.zeros(2))
        for n in lengths
    ]


def messages(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


def read(loader, accumulation):
    if accumulation == 0:
        return list(Batches(loader))
    return list(Batches(loader).blocks(0, 0, accumulation, lambda: 64))


@pytest.mark.parametrize("accumulation", [0, 1])
def test_the_shapes_and_the_remedy_are_named_once(caplog, accumulation):
    read(as_loader(batches(range(5, 25)), name="train_dataset"), accumulation)
    (message,) = messages(caplog)
    assert message.startswith(f"train_dataset has had batches of {MANY_SHAPES + 1} different")
    assert "x['ids'] (2, 5), (2, 6), (2, 7), (2, 8), (2, 9), (2, 10) and 3 more" in message
    assert "age" not in message
    assert "pad_to_multiple_of" in message


@pytest.mark.parametrize("accumulation", [0, 1])
def test_a_few_shapes_are_nothing_special(caplog, accumulation):
    read(as_loader(batches([*range(MANY_SHAPES)] * 5)), accumulation)
    assert messages(caplog) == []


def test_with_accumulation_it_is_the_combination_that_is_compiled(caplog):
    """Three lengths, and nine pairs of them: nine compilations."""
    pairs = [n for first in (4, 5, 6) for second in (4, 5, 6) for n in (first, second)]
    read(as_loader(batches(pairs)), 2)
    (message,) = messages(caplog)
    assert "x['ids'] (2, 4), (2, 5), (2, 6)." in message


def test_training_on_many_lengths_warns(caplog, tmp_path, monkeypatch):
    import keras

    monkeypatch.setattr(kbtrain.data.shape_monitor, "MANY_SHAPES", 1)
    inputs = keras.Input((None, 1))
    model = keras.Model(
        inputs, keras.layers.GlobalAveragePooling1D()(keras.layers.Dense(1)(inputs))
    )
    data = [(np.ones((2, n, 1), np.float32), np.ones((2, 1), np.float32)) for n in (2, 3)]

    class Own(Trainer):
        def get_train_dataloader(self):
            return data

    Own(model, arguments(tmp_path, max_steps=2), loss="mse").fit()
    assert "x (2, 2, 1), (2, 3, 1)" in messages(caplog)[0]
