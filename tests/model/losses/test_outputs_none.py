"""Outputs of a model that are None keep their place: numbers of plain Keras' fit and evaluate."""

import keras
import numpy as np
import pytest
from helpers import arguments, fit, make_data, weights, with_weights
from keras import ops

from kbtrain import ConfigurationError, Trainer
from kbtrain.model.losses.pairing import Outputs, beside_tensors

X, Y = make_data(10)
OTHER = make_data(10, seed=1)[1]
WEIGHTS = np.arange(1, 11, dtype="float32")

FORMS = {
    "first": lambda a, b: (a - b, None),
    "second": lambda a, b: [None, a - b],
    "dict": lambda a, b: {"n": None, "z": a - b},
    "three": lambda a, b: (a, None, a - b),
    "nested": lambda a, b: ((None, a), b),
    "nested in a dict": lambda a, b: {"p": (None, a), "q": b},
}

CASES = [
    ("first", ["mse", None], None, Y),
    ("first", ["mse", None], [2.0, None], [Y, None]),
    ("first", ["mse", None], [2.0, 5.0], (Y, OTHER)),
    ("second", [None, "mse"], [None, 2.0], [None, Y]),
    ("second", [None, "mse"], [5.0, 2.0], [OTHER, Y]),
    ("dict", {"z": "mse", "n": None}, {"z": 2.0, "n": 5.0}, {"z": Y, "n": OTHER}),
    ("dict", {"z": "mse"}, None, Y),
    ("three", ["mse", None, "mae"], [2.0, None, 3.0], [Y, None, OTHER]),
    ("three", [None, None, "mse"], None, [None, None, Y]),
    ("nested", ((None, "mse"), "mae"), None, ((None, Y), OTHER)),
    ("nested in a dict", {"p": (None, "mse"), "q": "mae"}, None, {"p": (None, Y), "q": OTHER}),
]


class Two(keras.Model):
    """Two dense layers, and what is made of them."""

    def __init__(self, form):
        super().__init__()
        self.a, self.b, self.form = keras.layers.Dense(1), keras.layers.Dense(1), FORMS[form]

    def call(self, x):
        return self.form(self.a(x), self.b(x))


def two(form):
    model = Two(form)
    model(X[:1])
    for layer in (model.a, model.b):
        layer.built or layer.build((None, 3))
    return with_weights(model)


def metrics_of(losses):
    if isinstance(losses, dict):
        return {key: metrics_of(loss) for key, loss in losses.items() if loss is not None}
    if isinstance(losses, list | tuple):
        return [metrics_of(loss) for loss in losses]
    return None if losses is None else [keras.metrics.MeanAbsoluteError(name="m")]


def given(form, losses, loss_weights, weighted):
    if form.startswith("nested"):
        # Keras takes metrics of such outputs on PyTorch only.
        return {"loss": losses, "loss_weights": loss_weights}
    kind = "weighted_metrics" if weighted else "metrics"
    return {"loss": losses, "loss_weights": loss_weights, kind: metrics_of(losses)}


@pytest.mark.parametrize(
    ("form", "losses", "loss_weights", "y", "weighted"),
    [
        *((*case, False) for case in CASES),
        # Sample weights meet each form once.
        *((*case, True) for case in {case[0]: case for case in CASES}.values()),
    ],
)
def test_fit_and_evaluate_as_keras(tmp_path, form, losses, loss_weights, y, weighted):
    data = (X, y, WEIGHTS) if weighted else (X, y)
    reference, model = two(form), two(form)
    reference.compile(
        keras.optimizers.SGD(0.1),
        **given(form, losses, loss_weights, weighted),
        run_eagerly=True,  # numbers are asked for, not speed: nothing to compile
    )
    reference.fit(*data[:2], 5, 1, 0, shuffle=False, sample_weight=WEIGHTS if weighted else None)
    expected = reference.evaluate(
        *data[:2], 5, 0, sample_weight=WEIGHTS if weighted else None, return_dict=True
    )
    args = arguments(
        tmp_path, learning_rate=0.1, lr_scheduler_type="constant", num_train_epochs=1,
        max_grad_norm=0, per_device_train_batch_size=5, per_device_eval_batch_size=5,
    )  # fmt: skip
    arguments_given = given(form, losses, loss_weights, weighted)
    optimizers = (keras.optimizers.SGD(0.1), None)
    trainer = fit(model, args, data, optimizers=optimizers, **arguments_given)
    for got, right in zip(weights(model), weights(reference), strict=True):
        np.testing.assert_allclose(got, right, rtol=1e-5, atol=1e-6)
    found = trainer.evaluate(data)
    for name, value in expected.items():
        assert found[f"eval_{name}"] == pytest.approx(value, rel=1e-5), name


@pytest.mark.parametrize("by", ["Trainer", "compile"])
def test_accumulated_updates_and_a_short_batch(tmp_path, by):
    losses, loss_weights, y = ["mse", None, "mae"], [2.0, None, 3.0], [Y, None, OTHER]
    runs = []
    for size, accumulation in ((10, 1), (4, 3)):
        model, more = two("three"), {"loss": losses, "loss_weights": loss_weights}
        if by == "compile":
            model.compile(keras.optimizers.SGD(0.1), **more)
            more = {"loss": None}
        args = arguments(
            tmp_path, learning_rate=None, max_steps=2, max_grad_norm=0,
            per_device_train_batch_size=size, gradient_accumulation_steps=accumulation,
        )  # fmt: skip
        trainer = fit(model, args, (X, y), **more)
        runs.append((weights(model), trainer.evaluate((X, y))["eval_loss"]))
    for one, other in zip(runs[0][0], runs[1][0], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    assert runs[0][1] == pytest.approx(runs[1][1], rel=1e-5)


def test_lists_that_leave_out_what_is_none(tmp_path):
    """Not as in Keras, which takes no such list."""
    model = two("three")
    a, _, b = (None if o is None else ops.convert_to_numpy(o) for o in model(X))
    kwargs = {"loss": ["mse", "mae"], "metrics": [["mae"], ["mae"]]}
    found = Trainer(model, arguments(tmp_path), eval_dataset=(X, [Y, OTHER]), **kwargs).evaluate()
    mse, mae = np.mean((a - Y) ** 2), np.mean(abs(b - OTHER))
    assert found["eval_loss"] == pytest.approx(mse + mae, rel=1e-5)


def test_sample_weights_by_output(tmp_path):
    model = two("first")
    a = ops.convert_to_numpy(model(X)[0])
    data = (X, [Y, None], [WEIGHTS, None])
    found = Trainer(
        model, arguments(tmp_path), eval_dataset=data, loss=["mse", None],
        weighted_metrics=[["mae"], None],
    ).evaluate()  # fmt: skip
    errors = (a - Y)[:, 0]
    assert found["eval_loss"] == pytest.approx(np.mean(errors**2 * WEIGHTS), rel=1e-5)
    right = np.sum(abs(errors) * WEIGHTS) / WEIGHTS.sum()
    assert found["eval_mae"] == pytest.approx(right, rel=1e-5)


def test_a_label_outside_of_the_classes_is_named(tmp_path):
    class Classes(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(3)

        def call(self, x):
            return None, self.dense(x)

    loss = [None, keras.losses.SparseCategoricalCrossentropy(from_logits=True)]
    args = arguments(tmp_path, max_steps=1)
    with pytest.raises(Exception, match="outside the model's classes.*the label 3"):
        fit(Classes(), args, (X, [None, np.arange(10) % 4]), loss=loss)


@pytest.mark.parametrize("form", FORMS)
def test_predictions_keep_their_places(tmp_path, form):
    model = two(form)
    expected = keras.tree.map_structure(
        lambda leaf: None if leaf is None else ops.convert_to_numpy(leaf), model(X)
    )
    found = Trainer(model, arguments(tmp_path)).predict(X).predictions
    assert keras.tree.flatten_with_path(found)[0][0] == keras.tree.flatten_with_path(expected)[0][0]
    for got, right in zip(keras.tree.flatten(found), keras.tree.flatten(expected), strict=True):
        if right is None:
            assert got is None
        else:
            np.testing.assert_allclose(got, right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("loss", "y", "message"),
    [
        (["mse", "mse"], [Y, OTHER], "'output_1' has no model output: it is None"),
        ("mse", (Y, OTHER), "'output_1', which is not a tensor"),
        (["mse", None, None], Y, "there are 2 outputs"),
    ],
)
def test_what_has_no_output(tmp_path, loss, y, message):
    with pytest.raises(ConfigurationError, match=message):
        fit(two("first"), arguments(tmp_path, max_steps=1), (X, y), loss=loss)


def test_structures_without_what_is_none():
    a, b = ops.zeros(()), ops.ones(())
    assert beside_tensors((None, a), ["x", "y"]) == ("y",)
    assert beside_tensors({"n": None, "p": [None, a], "b": b}, {"n": 1, "p": [2, 3], "b": 4}) == {
        "p": [3],
        "b": 4,
    }
    assert beside_tensors((None, a), "one") == "one"
    assert Outputs(((None, a), b), None).tensors == [1, 2]
