"""Every loss of Keras gives the number that `Model.compile` gives, whatever the ranks of labels.

The expected numbers are those of plain Keras on the same labels and outputs.
"""

import inspect
import re

import keras
import numpy as np
import pytest
from helpers import arguments, fit, linear_model, make_data, train_logs, weights
from keras import ops

from kbtrain import ConfigurationError, DataError, Trainer
from kbtrain.model.losses.keras_losses import keras_loss_pair, resolve_loss, same_rank
from kbtrain.model.losses.pairs import mean

FUNCTIONS = sorted({n for n in dir(keras.losses) if n[0].islower()} - {"get", "serialize",
                                                                     "deserialize"})  # fmt: skip
CLASSES = sorted(
    n for n in dir(keras.losses)
    if inspect.isclass(getattr(keras.losses, n)) and n != "Loss"
)  # fmt: skip
SHAPES = [
    ((6,), (6, 1), "int64"),
    ((6, 1), (6,), "float32"),
    ((6,), (6,), "int64"),
    ((6, 5), (6, 5, 1), "float32"),
    ((6, 5, 1), (6, 5), "int64"),
    ((6, 5, 1), (6, 5, 1), "float32"),
    ((6,), (6, 4), "int64"),
    ((6, 5, 1), (6, 5, 4), "float32"),
]


def arrays(labels, outputs, dtype):
    generator = np.random.default_rng(len(labels) + 7 * len(outputs))
    classes = outputs[-1] if len(outputs) > 1 and outputs[-1] > 1 else 2
    y = generator.integers(0, classes, labels).astype(dtype)
    values = generator.uniform(0.05, 0.95, outputs).astype("float32")
    # Keras itself multiplies losses (6, 5, 1) and weights (6,) to (6, 5, 6).
    one_each = (6, 1, 1) if labels == outputs == (6, 5, 1) else (6,)
    return y, values, generator.uniform(0.1, 2.0, one_each).astype("float32")


class Echo(keras.Model):
    """Returns its input, so that the outputs are known."""

    def call(self, x):
        return x


def keras_value(loss, y, outputs, weight):
    """The loss of the batch by plain Keras; None where it does not take the shapes."""
    model = Echo()
    model.compile(loss=loss, run_eagerly=True)
    tensors = [None if a is None else ops.convert_to_tensor(a) for a in (y, outputs, weight)]
    try:
        value = model.compute_loss(y=tensors[0], y_pred=tensors[1], sample_weight=tensors[2])
        return float(ops.convert_to_numpy(value))
    except Exception:
        return None


def our_value(loss, y, outputs, weight):
    tensors = [None if a is None else ops.convert_to_tensor(a) for a in (y, outputs, weight)]
    pair = keras_loss_pair(resolve_loss(loss), *tensors)
    return float(ops.convert_to_numpy(mean(pair.sum, pair.count)))


def compare(loss, weighted=True, shapes=SHAPES):
    """All shapes, with and without weights; how many of them Keras takes."""
    compared = 0
    for labels, outputs, dtype in shapes:
        y, values, weight = arrays(labels, outputs, dtype)
        for each in (None, weight) if weighted else (None,):
            expected = keras_value(loss, y, values, each)
            if expected is None:
                continue
            where = (labels, outputs, dtype, each is not None)
            found = our_value(loss, y, values, each)
            assert found == pytest.approx(expected, rel=2e-5, abs=1e-6), where
            compared += 1
    return compared


@pytest.mark.filterwarnings("ignore")  # Keras warns of a loss over one class
@pytest.mark.parametrize("name", [*FUNCTIONS, "crossentropy"])
def test_every_name(name):
    # One loss of Keras makes (6, 6) losses of labels (6, 1), with which weights mean nothing.
    weighted = "generalized" not in name
    assert compare(name, weighted) > 0 or name in (
        "ctc",
        "circle",
        "categorical_generalized_cross_entropy",
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CLASSES)
def test_every_class(name):
    loss = getattr(keras.losses, name)()
    assert compare(loss, False, SHAPES[::3]) > 0 or name in ("CTC", "Circle")


def square(y_true, y_pred):
    return ops.square(y_true - y_pred)


def mean_of_square(y_true, y_pred):
    return ops.mean(square(y_true, y_pred))


class Squares(keras.losses.Loss):
    def call(self, y_true, y_pred):
        return ops.mean(ops.square(y_true - y_pred), axis=-1)


@pytest.mark.parametrize("loss", [square, mean_of_square, lambda y, z: ops.abs(y - z)])
def test_a_function_of_the_users_own(loss):
    assert compare(loss) > 9


def test_an_object_of_the_users_own_is_not_helped_as_in_keras():
    y, outputs, _ = arrays((6, 5), (6, 5), "int64")
    assert our_value(Squares(), y, outputs, None) == pytest.approx(
        keras_value(Squares(), y, outputs, None), rel=1e-6
    )


@pytest.mark.parametrize("ranks", [((6,), (6, 1)), ((6, 1), (6,)), ((6, 5), (6, 5, 1))])
def test_ranks_are_brought_to_each_other(ranks):
    first, second = (ops.zeros(shape) for shape in ranks)
    assert same_rank(first, second)[0].shape == same_rank(first, second)[1].shape
    long = ops.zeros((6, 4))
    assert [tuple(t.shape) for t in same_rank(ops.zeros((6,)), long)] == [(6,), (6, 4)]


# --- through the Trainer --------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("loss", ["hinge", "binary_crossentropy", square])
def test_flat_labels_train_and_evaluate_as_in_keras(tmp_path, loss, compiled):
    x, _ = make_data(12)
    y = (x[:, 0] > 0).astype("int32")  # (N,), against outputs (N, 1)
    plain, model = linear_model(activation="sigmoid"), linear_model(activation="sigmoid")
    for each in (plain, model)[: 1 + compiled]:
        each.compile(optimizer=keras.optimizers.SGD(0.1), loss=loss, metrics=["accuracy", "mae"])
    given = {"loss": None} if compiled else {"loss": loss, "metrics": ["accuracy", "mae"]}
    expected = plain.evaluate(x, y, batch_size=5, verbose=0, return_dict=True)
    args = arguments(
        tmp_path, learning_rate=None, max_steps=2, per_device_train_batch_size=6,
        per_device_eval_batch_size=5,
    )  # fmt: skip
    optimizers = (None if compiled else keras.optimizers.SGD(0.1), None)
    trainer = Trainer(model, args, train_dataset=(x, y), eval_dataset=(x, y),
                      optimizers=optimizers, **given)  # fmt: skip
    found = trainer.evaluate()
    for name, value in expected.items():
        assert found[f"eval_{name}"] == pytest.approx(value, rel=1e-5), name
    trainer.fit()
    plain.fit(x, y, batch_size=6, shuffle=False, verbose=0)
    for one, other in zip(weights(model), weights(plain), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


class Contrast(keras.losses.Loss):
    """Reduces its batch itself."""

    def __call__(self, y_true, y_pred, sample_weight=None):
        losses = ops.square(ops.cast(y_true, "float32") - y_pred)
        return ops.mean(losses if sample_weight is None else losses * sample_weight)


class WithoutWeights(keras.losses.Loss):
    def __call__(self, y_true, y_pred):
        return ops.mean(ops.square(y_true - y_pred))


def test_a_loss_with_a_call_of_its_own_is_called(tmp_path):
    x, y = make_data(8)
    model = linear_model()
    each = (ops.convert_to_numpy(model(x)) - y) ** 2
    weight = np.linspace(0.0, 1.0, 8, dtype="float32")[:, None]
    args = arguments(tmp_path, per_device_eval_batch_size=8, max_steps=1)
    trainer = Trainer(model, args, eval_dataset=(x, y), loss=Contrast())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(each.mean(), rel=1e-6)
    found = trainer.evaluate((x, y, weight))["eval_loss"]
    assert found == pytest.approx((each * weight).mean(), rel=1e-6)
    expected = pytest.approx(each.mean(), rel=1e-6)
    assert train_logs(fit(linear_model(), args, (x, y), loss=WithoutWeights())) == [expected]
    with pytest.raises(ConfigurationError, match="WithoutWeights.__call__ takes none"):
        fit(linear_model(), args, (x, y, weight), loss=WithoutWeights())


def test_labels_that_keras_does_not_take_are_named():
    y, outputs = ops.zeros((6, 3)), ops.zeros((6, 4))
    with pytest.raises(DataError, match=r"float32\[6, 3\] and model outputs float32\[6, 4\]"):
        keras_loss_pair(resolve_loss("mse"), y, outputs)


@pytest.mark.parametrize("value", [None, 0.5, np.float32(0.5), "0.5"], ids=repr)
def test_a_loss_that_is_no_tensor_is_refused(tmp_path, value):
    data = {"train_dataset": make_data(8), "loss": lambda y_true, y_pred: value}
    trainer = Trainer(linear_model(), arguments(tmp_path, max_steps=1), **data)
    with pytest.raises(ConfigurationError, match="must return a tensor.*nothing would be trained"):
        trainer.fit()


def test_an_error_of_a_loss_is_the_users_own_and_names_the_loss(tmp_path):
    def one_argument(outputs):
        return ops.mean(outputs)

    data = {"train_dataset": make_data(8), "loss": one_argument}
    trainer = Trainer(linear_model(), arguments(tmp_path, max_steps=1), **data)
    with pytest.raises(TypeError, match="takes 1 positional argument") as caught:
        trainer.fit()
    assert "Exception encountered" not in str(caught.value)
    notes = " ".join(caught.value.__notes__)
    assert re.search(r"loss one_argument for labels float32\[.*\] and model outputs", notes)
    assert "loss(y_true, y_pred)" in notes


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_probabilities_where_a_loss_expects_logits_are_warned_about(tmp_path, caplog, activation):
    kind = {"softmax": "SparseCategoricalCrossentropy", "sigmoid": "BinaryCrossentropy"}[activation]
    loss = getattr(keras.losses, kind)(from_logits=True)
    for last, warned in ((None, False), (activation, True)):
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, activation=last)])
        caplog.clear()
        Trainer(model, arguments(tmp_path), train_dataset=make_data(8), loss=loss)
        assert (f"{kind}(from_logits=True) expects logits" in caplog.text) is warned
