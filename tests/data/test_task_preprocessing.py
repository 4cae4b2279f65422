"""Models that preprocess raw samples by themselves, as KerasHub's tasks do in ``fit``."""

import keras
import numpy as np
import pytest
from helpers import arguments, weights

from kbtrain import DataError, Trainer

TEXTS = ["a", "bb", "ccc", "dddd", "a b"]
LABELS = np.arange(5, dtype=np.float32)[:, None]


class Lengths(keras.Model):
    """A linear function of the number of letters and of words, which it counts itself."""

    def __init__(self):
        inputs = {name: keras.Input((1,), name=name) for name in ("letters", "words")}
        outputs = keras.layers.Dense(1)(keras.layers.Concatenate()(list(inputs.values())))
        super().__init__(inputs, outputs)
        self.preprocessor = True

    def preprocess_samples(self, x, y=None, sample_weight=None):
        assert isinstance(x, list), "texts come as a list, as KerasHub's tokenizers take them"
        letters = np.array([[len(text)] for text in x], np.float32)
        words = np.array([[len(text.split())] for text in x], np.float32)
        return keras.utils.pack_x_y_sample_weight(
            {"letters": letters, "words": words}, y, sample_weight
        )


def expected(model):
    kernel, bias = weights(model)
    counts = np.array([[len(t), len(t.split())] for t in TEXTS], np.float32)
    return counts @ kernel + bias


@pytest.mark.parametrize("kind", ["columns", "array", "samples", "dicts"])
def test_raw_texts(tmp_path, kind):
    data = {
        "columns": (TEXTS, LABELS),
        "array": (np.array(TEXTS), LABELS),
        "samples": list(zip(TEXTS, LABELS, strict=True)),
        "dicts": [{"text": t, "labels": y} for t, y in zip(TEXTS, LABELS, strict=True)],
    }[kind]
    model = Lengths()
    args = arguments(tmp_path, max_steps=2, per_device_train_batch_size=2)
    args = args.replace(per_device_eval_batch_size=2)
    trainer = Trainer(model, args, train_dataset=data, eval_dataset=data, loss="mse")
    trainer.fit()
    loss = np.mean((expected(model) - LABELS) ** 2)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-5)
    predictions = trainer.predict(TEXTS).predictions
    np.testing.assert_allclose(predictions, expected(model), rtol=1e-5)


def test_what_is_preprocessed_already_is_left_alone(tmp_path):
    letters = np.array([[len(t)] for t in TEXTS], np.float32)
    words = np.array([[len(t.split())] for t in TEXTS], np.float32)
    model = Lengths()
    predictions = Trainer(model, arguments(tmp_path)).predict({"letters": letters, "words": words})
    np.testing.assert_allclose(predictions.predictions, expected(model), rtol=1e-5)


def test_columns_of_different_lengths(tmp_path):
    trainer = Trainer(Lengths(), arguments(tmp_path), eval_dataset=(TEXTS, LABELS[:3]), loss="mse")
    with pytest.raises(DataError, match=r"same length.*\[3, 5\]"):
        trainer.evaluate()
