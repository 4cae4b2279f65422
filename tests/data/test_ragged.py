"""Inputs that are a ``tf.RaggedTensor``: as in Keras on TensorFlow, refused elsewhere."""

import keras
import numpy as np
import pytest
from helpers import arguments, make_data, same, weights, with_weights
from keras import ops

from kbtrain import DataError, Trainer
from kbtrain.data import LabelKeys, as_source
from kbtrain.data.batch import to_batch
from kbtrain.data.ragged import Ragged, as_ragged, has_ragged, map_ragged

ON_TENSORFLOW = keras.backend.backend() == "tensorflow"
ROWS = [[1], [2, 3, 4], [5, 6], [7, 8, 9, 1], [2, 3], [4, 5, 6, 7, 8]]
Y = make_data(6)[1]


class RaggedTensor:
    """What kbtrain asks of TensorFlow's, for one ragged axis."""

    ragged_rank = 1

    def __init__(self, rows):
        self.rows, self.shape = rows, (len(rows), None)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, rows):
        return RaggedTensor(self.rows[rows])

    def row_lengths(self):
        return np.array([len(row) for row in self.rows])

    def to_tensor(self, shape):
        dense = np.zeros((len(self.rows), shape[1]), np.int64)
        for line, row in zip(dense, self.rows, strict=True):
            line[: len(row)] = row
        return dense


def ragged(rows=ROWS):
    if not ON_TENSORFLOW:
        return RaggedTensor(rows)
    import tensorflow as tf

    return tf.ragged.constant(rows, dtype="int64")


class Mean(keras.Model):
    """The mean over the tokens of each text, or over all that the batch is padded to."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.table, self.dense = keras.layers.Embedding(10, 3), keras.layers.Dense(1)

    def call(self, x):
        if self.kind == "dict":
            return self.dense(ops.mean(self.table(x["ids"].to_tensor()), 1)) + x["n"]
        if self.kind == "padded":
            return self.dense(ops.mean(self.table(x.to_tensor()), 1))
        import tensorflow as tf

        return self.dense(tf.reduce_mean(self.table(x), 1))


def functional():
    ids = keras.Input((None,), dtype="int64", ragged=True)
    hidden = keras.layers.GlobalAveragePooling1D()(keras.layers.Embedding(10, 3)(ids))
    return keras.Model(ids, keras.layers.Dense(1)(hidden))


def made(kind, x):
    model = functional() if kind == "functional" else Mean(kind)
    model(x)
    return with_weights(model)


def inputs_of(kind):
    return {"ids": ragged(), "n": Y} if kind == "dict" else ragged()


def as_data(source, x):
    if source == "arrays":
        return (x, Y)
    if source == "tf.data":
        import tensorflow as tf

        return tf.data.Dataset.from_tensor_slices((x, Y)).batch(4)

    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return 2

        def __getitem__(self, i):
            rows = slice(4 * i, 4 * i + 4)
            part = {key: x[key][rows] for key in x} if isinstance(x, dict) else x[rows]
            return part, Y[rows]

    return Batches() if source == "PyDataset" else (lambda: (Batches()[i] for i in range(2)))


def args(tmp_path, **changes):
    """Two epochs of a batch of four and one of two."""
    given = {
        "max_steps": 4,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "max_grad_norm": 0,
    }
    return arguments(tmp_path, **(given | changes))


def sgd():
    return (keras.optimizers.SGD(0.1), None)


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        ("padded", "arrays"),
        ("dict", "arrays"),
        ("functional", "PyDataset"),
        ("ragged", "generator"),
        *([("ragged", "tf.data"), ("dict", "tf.data")] if ON_TENSORFLOW else []),
    ],
)
def test_fit_evaluate_and_predict_as_keras(tmp_path, kind, source):
    x = inputs_of(kind)
    data, given = as_data(source, x), {"optimizers": sgd(), "loss": "mse"}
    if not ON_TENSORFLOW:
        with pytest.raises(DataError, match=r"RaggedTensor.*to_tensor\(\)"):
            Trainer(Mean(kind), args(tmp_path), train_dataset=data, **given).fit()
        return
    reference, model = made(kind, x), made(kind, x)
    reference.compile(keras.optimizers.SGD(0.1), "mse", run_eagerly=True)
    whole = {"y": Y, "batch_size": 4}
    reference.fit(x, **whole, epochs=2, shuffle=False, verbose=0)
    trainer = Trainer(model, args(tmp_path), train_dataset=data, eval_dataset=data, **given)
    trainer.fit()
    for got, right in zip(weights(model), weights(reference), strict=True):
        np.testing.assert_allclose(got, right, rtol=1e-5, atol=1e-6)
    expected = reference.evaluate(x, **whole, verbose=0)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    expected = reference.predict(x, batch_size=4, verbose=0)
    np.testing.assert_allclose(trainer.predict(x).predictions, expected, rtol=1e-5, atol=1e-6)


def test_accumulation_and_resume(tmp_path):
    if not ON_TENSORFLOW:
        pytest.raises(DataError, to_batch, ragged()).match("Models on TensorFlow")
        return
    runs = {}
    for name, changes in {
        "at once": {"per_device_train_batch_size": 6},
        "in parts": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3},
        "saved": {"save_strategy": "steps", "save_steps": 2},
    }.items():
        model = made("ragged", ragged())
        given = {
            "max_steps": -1,
            "num_train_epochs": 4,
            "train_sampling_strategy": "random",
        } | changes
        Trainer(
            model, args(tmp_path / name, **given), train_dataset=(ragged(), Y),
            optimizers=sgd(), loss="mse",
        ).fit()  # fmt: skip
        runs[name] = weights(model)
    for got, right in zip(runs["in parts"], runs["at once"], strict=True):
        np.testing.assert_allclose(got, right, rtol=1e-5, atol=1e-6)
    model = made("ragged", ragged())
    Trainer(
        model, args(tmp_path / "saved", **given), train_dataset=(ragged(), Y),
        optimizers=sgd(), loss="mse",
    ).fit(str(tmp_path / "saved" / "checkpoint-4"))  # fmt: skip
    assert same(weights(model), runs["saved"])


def test_what_reaches_compute_metrics(tmp_path):
    if not ON_TENSORFLOW:
        with pytest.raises(DataError, match=r"to_tensor\(\)"):
            as_source((ragged(), Y))
        return
    seen = []
    model = made("ragged", ragged())
    data = as_data("PyDataset", ragged())
    result = Trainer(
        model, args(tmp_path), eval_dataset=data, loss="mse",
        compute_metrics=lambda p: seen.append(p.predictions) or {"n": len(p.label_ids)},
    ).evaluate()  # fmt: skip
    assert result["eval_n"] == 6
    right = [reference.mean(0) for reference in (weights(model)[0][row] for row in ROWS)]
    kernel, bias = weights(model)[1:]
    np.testing.assert_allclose(seen[0], np.array(right) @ kernel + bias, rtol=1e-5, atol=1e-6)


def test_labels_are_not_ragged():
    keys = LabelKeys(strings=True)
    with pytest.raises(DataError, match="y is a RaggedTensor.*Only inputs may be ragged"):
        to_batch((np.ones((6, 2)), ragged()), label_names=keys)
    with pytest.raises(DataError, match="sample_weight is a RaggedTensor"):
        as_source((np.ones((6, 2)), Y, ragged()), label_names=keys)


def test_padded_arrays():
    keys = LabelKeys(strings=True)
    (found,) = to_batch(ragged(), label_names=keys)
    assert found.lengths[0].tolist() == [1, 3, 2, 4, 2, 5]
    assert found.dense.shape == (6, 8)  # few widths: each one is compiled for
    for line, row in zip(found.dense, ROWS, strict=True):
        assert line[: len(row)].tolist() == row
    assert found.dense.sum() == sum(map(sum, ROWS))
    assert to_batch((ragged([[1], [2]]), Y[:2]), label_names=keys)[0].dense.shape == (2, 1)
    assert to_batch((ragged([[], []]), Y[:2]), label_names=keys)[0].lengths[0].tolist() == [0, 0]
    some = as_source({"a": ragged(), "b": Y}, label_names=keys).gather(np.array([3, 0]))
    assert some["a"].dense[:, :4].tolist() == [[7, 8, 9, 1], [1, 0, 0, 0]]
    assert has_ragged(some)
    assert not has_ragged({"a": (Y, [Y])})
    sizes = map_ragged(lambda dense, lengths: lengths[0].sum(), [some, Y])
    assert sizes[0]["a"] == 5
    assert sizes[1] is Y


NESTED = [
    [[[1.0, 2.0]], [[3.0, 4.0], [5.0, 6.0]]],
    [],
    [[[7.0, 8.0], [9.0, 1.0], [2.0, 3.0]], [], [[4.0, 5.0]]],
]


def test_two_ragged_axes_and_one_that_is_not():
    """There and back: (3, None, None, 2)."""
    if not ON_TENSORFLOW:
        assert map_ragged(lambda dense, lengths: len(lengths), Ragged(Y, (Y, Y))) == 2
        return
    import tensorflow as tf

    from kbtrain import backends

    for dtype in ("int32", "int64"):
        value = tf.ragged.constant(NESTED, ragged_rank=2, row_splits_dtype=dtype)
        found = as_ragged(value)
        assert found.dense.shape == (3, 4, 4, 2)
        back = backends.load().ragged(found.dense, [tf.constant(n) for n in found.lengths])
        assert back.to_list() == value.to_list() == NESTED
        assert back.row_splits.dtype == dtype
        assert back.shape.as_list() == [3, None, None, 2]


def test_numbers_of_a_symbolic_one_are_not_known():
    if not ON_TENSORFLOW:
        with pytest.raises(DataError, match="RaggedTensor"):
            as_source({"x": ragged()})
        return
    from kbtrain import backends

    spec = backends.load().ragged(keras.KerasTensor((4, 8, 2)), [keras.KerasTensor((4,))])
    assert spec.ragged
    assert spec.shape == (4, None, 2)
