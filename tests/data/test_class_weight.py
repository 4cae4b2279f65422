"""Arguments of Keras' ``fit``: class_weight, validation_split, and where the others are."""

import h5py
import keras
import numpy as np
import pytest
from helpers import arguments, make_data, weights, with_weights

from kbtrain import Trainer, TrainingArguments
from kbtrain.data import ArraySource, DataLoader, LabelKeys, weighted
from kbtrain.data.class_weight import ClassWeights
from kbtrain.data.sources.validation_split import split_for_validation
from kbtrain.errors import ConfigurationError, DataError

X, _ = make_data(12, 3)
CLASSES = np.arange(12) % 3
WEIGHTS = {0: 0.5, 2: 4.0}
OF_CLASS = np.array([WEIGHTS.get(c, 1.0) for c in CLASSES])
SAMPLE_WEIGHT = np.linspace(0.1, 2.0, 12, dtype=np.float32)


def classifier():
    layers = [keras.Input((3,)), keras.layers.Dense(3, activation="softmax")]
    return with_weights(keras.Sequential(layers))


def losses():
    """The cross-entropy of each sample, float64."""
    kernel, bias = [w.astype(float) for w in weights(classifier())]
    logits = X.astype(float) @ kernel + bias
    return np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(12), CLASSES]


def kept_by_keras(y, loss, **fit_arguments):
    """Weights after an epoch of Keras' own fit."""
    model = classifier()
    model.compile(keras.optimizers.SGD(0.1), loss)
    model.fit(X, y, batch_size=4, shuffle=False, verbose=0, **fit_arguments)
    return weights(model)


@pytest.mark.parametrize("kind", ["numbers", "column", "one-hot", "floats"])
@pytest.mark.parametrize("form", ["arrays", "samples", "batches"])
def test_class_weight_is_that_of_keras(tmp_path, kind, form):
    y = {
        "numbers": CLASSES,
        "column": CLASSES[:, None],
        "one-hot": np.eye(3, dtype=np.float32)[CLASSES],
        "floats": CLASSES.astype(np.float32),
    }[kind]
    loss = "categorical_crossentropy" if kind == "one-hot" else "sparse_categorical_crossentropy"
    expected = kept_by_keras(y, loss, class_weight=WEIGHTS)
    data = {
        "arrays": lambda: (X, y),
        "samples": lambda: list(zip(X, y, strict=True)),
        "batches": lambda: [(X[i : i + 4], y[i : i + 4]) for i in (0, 4, 8)],
    }[form]()
    model = classifier()
    args = arguments(tmp_path, num_train_epochs=1, per_device_train_batch_size=4, max_grad_norm=0)
    trainer = Trainer(
        model,
        args,
        train_dataset=Batches(data) if form == "batches" else data,
        loss=loss,
        class_weight=WEIGHTS,
        optimizers=(keras.optimizers.SGD(0.1), None),
        eval_dataset=(X, y),
    )
    trainer.fit()
    for ours, theirs in zip(weights(model), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


class Batches(keras.utils.PyDataset):
    def __init__(self, batches):
        super().__init__()
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        return self.batches[index]


def test_evaluation_has_no_class_weight_and_sample_weights_are_multiplied(tmp_path):
    args = arguments(tmp_path, max_steps=1, per_device_train_batch_size=12)
    data = (X, CLASSES, SAMPLE_WEIGHT)
    trainer = Trainer(
        classifier(),
        args,
        train_dataset=data,
        eval_dataset=data,
        loss="sparse_categorical_crossentropy",
        class_weight=WEIGHTS,
    )
    loss = trainer.evaluate()["eval_loss"]
    assert loss == pytest.approx(np.mean(losses() * SAMPLE_WEIGHT), rel=1e-5)
    loss = trainer.fit().training_loss
    assert loss == pytest.approx(np.mean(losses() * SAMPLE_WEIGHT * OF_CLASS), rel=1e-5)


def test_weights_of_a_dict():
    weigh = ClassWeights(WEIGHTS)
    batch = weigh({"a": X, "labels": CLASSES, "sample_weight": SAMPLE_WEIGHT[:, None]})
    np.testing.assert_allclose(batch["sample_weight"][:, 0], SAMPLE_WEIGHT * OF_CLASS, rtol=1e-6)
    taken = ClassWeights(WEIGHTS, LabelKeys(inputs=frozenset({"sample_weight"})))
    x, _, weight = taken({"sample_weight": X, "labels": CLASSES})
    assert list(x) == ["sample_weight"]
    np.testing.assert_allclose(weight, OF_CLASS)


def test_weights_of_arrays_are_computed_once():
    loader = DataLoader(ArraySource((X, CLASSES)), 4)
    other = weighted(loader, WEIGHTS, LabelKeys())
    assert other.vectorised
    np.testing.assert_allclose(np.concatenate([b[2] for b in other]), OF_CLASS)
    assert len(next(iter(loader))) == 2
    assert weighted(loader, None, LabelKeys()) is loader


@pytest.mark.parametrize("value", [[1.0, 2.0], {"a": 1.0}, {0: "x"}, {0: -1.0}, {0: np.nan}])
def test_class_weight_of_another_kind(tmp_path, value):
    with pytest.raises(ConfigurationError, match="class_weight must be a dict"):
        Trainer(classifier(), arguments(tmp_path), loss="mse", class_weight=value)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((X,), "no labels"),
        ((X, {"a": CLASSES, "b": CLASSES}), "a dict of labels"),
        ((X, np.zeros((12, 4, 3))), r"shape \(12, 4, 3\)"),
    ],
)
def test_class_weight_needs_a_class_for_each_sample(batch, message):
    with pytest.raises(DataError, match=message):
        ClassWeights(WEIGHTS)(batch)


# -------------------------------------------------------------------------- validation_split


@pytest.mark.parametrize("fraction", [0.25, 0.3, 0.1])
def test_validation_split_is_that_of_keras(tmp_path, fraction):
    model = classifier()
    model.compile(keras.optimizers.SGD(0.1), "sparse_categorical_crossentropy")
    history = model.fit(
        X, CLASSES, batch_size=4, shuffle=False, verbose=0, validation_split=fraction
    )
    ours = classifier()
    trainer = Trainer(
        ours,
        arguments(
            tmp_path,
            num_train_epochs=1,
            per_device_train_batch_size=4,
            eval_strategy="epoch",
            max_grad_norm=0,
        ),
        train_dataset=(X, CLASSES),
        validation_split=fraction,
        loss="sparse_categorical_crossentropy",
        optimizers=(keras.optimizers.SGD(0.1), None),
    )
    trainer.fit()
    for one, other in zip(weights(ours), weights(model), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    expected = history.history["val_loss"][0]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-4)


def test_parts_of_a_dict_and_of_a_file(tmp_path):
    train, held_out = split_for_validation(
        {"a": X, "labels": CLASSES, "sample_weight": SAMPLE_WEIGHT}, 0.25
    )
    assert (len(train), len(held_out)) == (9, 3)
    batch = held_out.gather(np.array([2, 0]))
    np.testing.assert_array_equal(batch["labels"], CLASSES[[11, 9]])
    np.testing.assert_array_equal(batch["sample_weight"], SAMPLE_WEIGHT[[11, 9]])
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["x"] = X
        train, held_out = split_for_validation((file["x"], CLASSES), 0.25)
        np.testing.assert_array_equal(held_out.gather(np.array([2, 0, 2]))[0], X[[11, 9, 11]])
        np.testing.assert_array_equal(held_out.gather(range(1, 3))[0], X[10:])
        np.testing.assert_array_equal(train.gather(range(7, 9))[0], X[7:9])


@pytest.mark.parametrize(
    ("data", "fraction", "message"),
    [
        ((X, CLASSES), 1.5, "above 0 and below 1"),
        ((X, CLASSES), True, "above 0 and below 1"),
        ((X[:1], CLASSES[:1]), 0.01, "none to train on"),
        ([(X[0], 0)] * 5, 0.2, "for arrays.*train_test_split"),
        (iter([]), 0.2, "for arrays"),
    ],
)
def test_what_cannot_be_split(tmp_path, data, fraction, message):
    with pytest.raises(ConfigurationError, match=message):
        Trainer(
            classifier(),
            arguments(tmp_path),
            train_dataset=data,
            validation_split=fraction,
            loss="mse",
        )


def test_two_evaluation_sets_are_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="either eval_dataset or validation_split"):
        Trainer(
            classifier(),
            arguments(tmp_path),
            train_dataset=(X, CLASSES),
            eval_dataset=(X, CLASSES),
            validation_split=0.5,
            loss="mse",
        )


# ----------------------------------------------------------------------- where the others are


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"epochs": 3}, "num_train_epochs"),
        ({"batch_size": 3}, "per_device_train_batch_size"),
        ({"validation_split": 0.2}, r"Trainer\(validation_split="),
        ({"validation_data": (X, CLASSES)}, "eval_dataset"),
        ({"class_weight": WEIGHTS}, r"Trainer\(class_weight="),
        ({"x": X, "y": CLASSES}, "train_dataset="),
        ({"verbose": 0}, "disable_tqdm"),
        ({"callbacks": []}, r"Trainer\(callbacks="),
        ({"steps_per_epoch": 3}, "field of TrainingArguments"),
    ],
)
def test_what_belongs_elsewhere(tmp_path, given, message):
    trainer = Trainer(classifier(), arguments(tmp_path), loss="mse")
    with pytest.raises(ConfigurationError, match=message):
        trainer.fit(**given)


def test_data_by_position(tmp_path):
    trainer = Trainer(classifier(), arguments(tmp_path), loss="mse")
    with pytest.raises(ConfigurationError, match=r"train_dataset=\(x, y\).*ndarray"):
        trainer.fit(X, CLASSES)
    with pytest.raises(ConfigurationError, match=r"evaluate\(\(x, y\)\)"):
        trainer.evaluate(X, CLASSES)
    with pytest.raises(ConfigurationError, match=r"evaluate\(\(x, y\)\)"):
        trainer.evaluate(x=X, y=CLASSES)
    with pytest.raises(ConfigurationError, match="per_device_eval_batch_size"):
        trainer.predict(X, batch_size=4)


def test_the_constructors(tmp_path):
    with pytest.raises(ConfigurationError, match="eval_dataset"):
        Trainer(classifier(), arguments(tmp_path), validation_data=(X, CLASSES))
    with pytest.raises(ConfigurationError, match=r"Trainer\(class_weight="):
        TrainingArguments(str(tmp_path), class_weight=WEIGHTS)
