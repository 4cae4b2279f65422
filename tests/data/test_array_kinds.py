"""Sparse matrices, tables and texts: kinds of arrays that are not NumPy's own."""

from decimal import Decimal

import keras
import numpy as np
import pytest
from helpers import arguments, make_data, with_weights
from scipy import sparse

from kbtrain import Trainer, backends
from kbtrain.data import LabelKeys, as_source, default_collate, to_batch
from kbtrain.data.sources.validation_split import split_for_validation
from kbtrain.data.tree import as_array
from kbtrain.errors import DataError

X, Y = make_data(12, 3)
X[X < 0.3] = 0.0
TAKES_STRINGS = backends.load().TAKES_STRINGS


def model():
    return with_weights(keras.Sequential([keras.Input((3,), name="x"), keras.layers.Dense(1)]))


def trained(tmp_path, data, **changes):
    changes = {"per_device_train_batch_size": 4, "max_steps": 3} | changes
    args = arguments(tmp_path, **changes)
    ours = model()
    Trainer(ours, args, train_dataset=data, loss="mse").fit()
    return [keras.ops.convert_to_numpy(v) for v in ours.trainable_variables]


@pytest.mark.parametrize("form", ["csr_array", "coo_matrix"])
def test_sparse_inputs_are_the_dense_ones(tmp_path, form):
    matrix = getattr(sparse, form)(X)
    changes = {"train_sampling_strategy": "random"}
    expected = trained(tmp_path, (X, Y), **changes)
    for data in ((matrix, Y), {"x": matrix, "labels": Y}):
        for ours, theirs in zip(trained(tmp_path, data, **changes), expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("kind", ["samples", "batches"])
def test_sparse_samples_and_batches(tmp_path, kind):
    matrix = sparse.csr_matrix(X)
    data = {
        "samples": [(matrix[i], Y[i]) for i in range(12)],
        "batches": ((matrix[i : i + 4], Y[i : i + 4]) for i in (0, 4, 8)),
    }[kind]
    expected = trained(tmp_path, (X, Y))
    for ours, theirs in zip(trained(tmp_path, data), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_rows_of_a_sparse_matrix():
    source = as_source(sparse.csc_matrix(X))
    np.testing.assert_array_equal(source.gather(range(2, 5)), X[2:5])
    np.testing.assert_array_equal(source.gather(np.array([7, 1, 7])), X[[7, 1, 7]])
    _, held_out = split_for_validation((sparse.csr_matrix(X), Y), 0.25)
    np.testing.assert_array_equal(held_out.gather(np.array([2, 0]))[0], X[[11, 9]])
    assert default_collate([sparse.csr_matrix(X)[i] for i in range(2)]).shape == (2, 3)


class Table:
    """What a frame or series of pandas shows of itself."""

    __module__ = "pandas"

    def __init__(self, values, dtypes):
        self.values, self.ndim = np.array(values, object), np.ndim(values)
        self.dtypes = np.array(dtypes, object)
        self.dtype = dtypes[0]

    def __array__(self, dtype=None, copy=None):
        return self.values if dtype is None else self.values.astype(dtype)

    def to_numpy(self, dtype):
        return self.values.astype(dtype)


@pytest.mark.parametrize(
    ("values", "dtypes", "expected"),
    [
        ([[1.5, True], [2.5, False]], [np.dtype("f8"), np.dtype("?")], [[1.5, 1.0], [2.5, 0.0]]),
        ([1, 2], [np.dtype("i8")], [1, 2]),
        ([[1, 2.5]], [np.dtype("i4"), np.dtype("f4")], [[1.0, 2.5]]),
    ],
)
def test_tables_of_numbers_of_several_kinds(values, dtypes, expected):
    array = as_array(Table(values, dtypes), "x")
    np.testing.assert_array_equal(array, expected)
    assert array.dtype == np.array(expected).dtype


def test_missing_values_of_a_table_are_named():
    with pytest.raises(DataError, match="x cannot be converted"):
        as_array(Table([1, None], [np.dtype("i8")]), "x")
    with pytest.raises(DataError, match="x holds Python objects"):
        as_array(Table([1, object()], [np.dtype("O")]), "x")


# ----------------------------------------------------------------------------------------- texts


TEXTS = ["good film", "bad film bad", "good", "bad"]
CLASSES = np.array([1, 0, 1, 0])


def forms():
    array = np.array(TEXTS)
    return {
        "array": (array, CLASSES),
        "bytes": (array.astype("S"), CLASSES),
        "samples": list(zip(TEXTS, CLASSES, strict=True)),
        "batches": (pair for pair in [(array[:3], CLASSES[:3]), (array[3:], CLASSES[3:])]),
    }


def text_model():
    vectorize = keras.layers.TextVectorization(
        vocabulary=["good", "bad", "film"], output_sequence_length=3
    )
    layers = [keras.Input((), dtype="string"), vectorize, keras.layers.Embedding(6, 2)]
    layers += [keras.layers.GlobalAveragePooling1D(), keras.layers.Dense(2)]
    return with_weights(keras.Sequential(layers))


class Plain(keras.Model):
    """In place of a model of texts, which cannot be made on every backend."""

    def call(self, x):
        return x


@pytest.mark.parametrize("form", list(forms()))
def test_texts_are_inputs_where_the_backend_has_them(tmp_path, form):
    data = forms()[form]
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    args = arguments(
        tmp_path,
        max_steps=2,
        per_device_train_batch_size=3,
        per_device_eval_batch_size=3,
        learning_rate=1e-9,
        jit_compile=form == "array",  # XLA has no strings, and would end the process
    )
    model = text_model() if TAKES_STRINGS else Plain()
    trainer = Trainer(model, args, train_dataset=data, loss=loss)
    if not TAKES_STRINGS:
        with pytest.raises(DataError, match="a model needs numbers|sample or a whole batch"):
            trainer.fit()
        return
    trainer.fit()
    dense, ids = model.layers[1:], [[2, 4, 0], [3, 4, 3], [2, 0, 0], [3, 0, 0]]
    table, kernel, bias = [keras.ops.convert_to_numpy(w) for layer in dense for w in layer.weights]
    logits = table[np.array(ids)].mean(axis=1).astype(float) @ kernel + bias
    expected = np.mean(np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(4), CLASSES])
    result = trainer.evaluate((np.array(TEXTS), CLASSES))
    assert result["eval_loss"] == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(trainer.predict(TEXTS).predictions, logits, atol=1e-5)


def test_texts_of_a_batch():
    keys = LabelKeys(strings=True)
    batch = to_batch({"text": ["a", "bc"], "n": [1, 2]}, label_names=keys)
    assert batch["text"].dtype == object
    assert batch["text"].tolist() == ["a", "bc"]
    assert default_collate(["a", "bc"], keys).tolist() == ["a", "bc"]
    for form in (np.array(["a", "bc"]), np.array(["a", "bc"], object)):
        assert as_source({"t": form}, label_names=keys).gather(range(1, 2))["t"].tolist() == ["bc"]
        with pytest.raises(DataError, match="holds strings"):
            as_source({"t": form})


def test_a_ragged_tensor_is_to_be_padded():
    ragged = type("RaggedTensor", (), {})()
    with pytest.raises(DataError, match=r"to_tensor\(\)"):
        as_array(ragged, "x")


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([1, 2], "int64"),
        ([1, 2.5], "float64"),
        ([[1, 2], [3, 4]], "int64"),
        ([True, False], "bool"),
        ([np.float32(0.5), np.float32(2)], "float32"),
        (5, "int64"),
    ],
)
def test_numbers_that_are_stored_as_objects(values, dtype):
    found = as_array(np.array(values, dtype=object), "x")
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, np.array(values))


@pytest.mark.parametrize(
    "values", [[1, None], [1, "a"], [2**63, -1], [10**30], [1, [2]], [Decimal("0.5")]]
)
def test_objects_that_are_not_all_numbers(values):
    array = np.empty(len(values), object)
    array[:] = values
    with pytest.raises(DataError, match="x holds Python objects"):
        as_array(array, "x")
