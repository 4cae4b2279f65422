"""Several outputs are token-exact, each with its own sum and count: against NumPy float64."""

import functools

import keras
import numpy as np
import pytest
from helpers import arguments, fit, linear_model, make_data, train_logs, weights, with_weights
from keras import ops

from kbtrain import ConfigurationError, DataError, Trainer

CROSS_ENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
TOKENS, CLASSES = 6, 4
FACTORS = {"a": 1.0, "b": 0.25}


def token_model(mask_zero=False, kind=dict):
    inputs = keras.Input((TOKENS,), dtype="int32", name="tokens")
    hidden = keras.layers.Embedding(9, 4, mask_zero=mask_zero)(inputs)
    outputs = [keras.layers.Dense(CLASSES, name=name)(hidden) for name in "ab"]
    outputs = dict(zip("ab", outputs, strict=True)) if kind is dict else outputs
    return with_weights(keras.Model(inputs, outputs), 3, scale=1.0)


def token_data(samples, kind):
    """Lengths that are very uneven, and not those of the other output."""
    generator = np.random.default_rng(2)
    x = generator.integers(1, 9, size=(samples, TOKENS)).astype(np.int32)
    y = {name: generator.integers(0, CLASSES, (samples, TOKENS)).astype("int32") for name in "ab"}
    lengths = {"a": [1, 6, 2, 5, 1, 1, 6, 3], "b": [6, 1, 1, 6, 5, 4, 1, 1]}
    if kind == "Keras mask":
        return np.where(_padded(lengths["a"], samples), 0, x), y
    for name in "ab":
        y[name] = np.where(_padded(lengths[name], samples), -100, y[name])
    weight = {name: generator.random(samples).astype("float32") for name in "ab"}
    return (x, y, weight) if kind == "sample weights" else (x, y)


def _padded(lengths, samples):
    return np.arange(TOKENS)[None] >= np.resize(lengths, samples)[:, None]


def numpy_losses(model, data, mask_zero=False, smoothing=0.0):
    """The token-exact mean of each output in float64."""
    x, y = data[:2]
    found = {}
    for name, logits in model(x).items():
        logits = ops.convert_to_numpy(logits).astype(np.float64)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        labels = np.where(y[name] == -100, 0, y[name])
        each = -np.take_along_axis(log_p, labels[..., None], -1)[..., 0]
        each = (1 - smoothing) * each - smoothing * log_p.mean(-1)
        keep = (y[name] != -100) & ((x != 0) | (not mask_zero))
        weight = data[2][name][:, None] if len(data) == 3 else 1.0
        found[name] = (each * keep * weight).sum() / keep.sum()
    return found


def total(losses):
    return sum(FACTORS[name] * value for name, value in losses.items())


KINDS = ("ignored labels", "Keras mask", "sample weights")


@pytest.mark.parametrize("kind", KINDS)
def test_four_micro_batches_of_two_equal_a_batch_of_eight(tmp_path, kind):
    data = token_data(12, kind)  # 8 + 4: the last group is short
    runs = []
    for batch, accumulation in ((8, 1), (2, 4)):
        model = token_model(kind == "Keras mask")
        first = (data[0][:8], *({n: v[:8] for n, v in part.items()} for part in data[1:]))
        expected = numpy_losses(model, first, kind == "Keras mask")
        trainer = fit(
            model,
            arguments(
                tmp_path,
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=accumulation,
                num_train_epochs=1,
                jit_compile=accumulation > 1,  # against the eager step, which compiles nothing
            ),
            data,
            loss={"a": CROSS_ENTROPY, "b": CROSS_ENTROPY},
            loss_weights=FACTORS,
        )
        assert train_logs(trainer)[0] == pytest.approx(total(expected), rel=2e-6)
        for name, value in expected.items():
            assert train_logs(trainer, f"{name}_loss")[0] == pytest.approx(value, rel=2e-6)
        runs.append((train_logs(trainer), train_logs(trainer, "grad_norm"), weights(model)))
    (losses, norms, values), (other_losses, other_norms, other_values) = runs
    np.testing.assert_allclose(other_losses, losses, rtol=2e-6)
    np.testing.assert_allclose(other_norms, norms, rtol=5e-6)
    for one, other in zip(values, other_values, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", KINDS)
def test_an_evaluation_does_not_depend_on_the_batch_size(tmp_path, kind, smoothing):
    data, model = token_data(11, kind), token_model(kind == "Keras mask")
    expected = numpy_losses(model, data, kind == "Keras mask", smoothing)
    for size in (1, 4, 11):
        found = Trainer(
            model,
            arguments(tmp_path, per_device_eval_batch_size=size, label_smoothing_factor=smoothing),
            eval_dataset=data,
            loss=CROSS_ENTROPY,
            loss_weights=FACTORS,
        ).evaluate()
        assert found["eval_loss"] == pytest.approx(total(expected), rel=1e-6), size
        for name, value in expected.items():
            assert found[f"eval_{name}_loss"] == pytest.approx(value, rel=1e-6), size


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", [dict, list])
def test_ignored_labels_are_no_part_of_any_outputs_metrics(tmp_path, kind, compiled):
    x, y = token_data(9, "ignored labels")
    model = token_model(kind=kind)
    outputs = model(x)
    outputs = outputs if kind is dict else dict(zip("ab", outputs, strict=True))
    right = {n: ops.convert_to_numpy(outputs[n]).argmax(-1) == y[n] for n in "ab"}
    metrics = [[keras.metrics.SparseCategoricalAccuracy(name="acc")] for _ in "ab"]
    given = {"loss": [CROSS_ENTROPY] * 2, "metrics": metrics}
    labels = y
    if kind is dict:
        given = {name: dict(zip("ab", values, strict=True)) for name, values in given.items()}
    else:
        labels = tuple(y.values())
    if compiled:
        model.compile(optimizer="sgd", **given)
        given = {}
    for size in (2, 9):
        args = arguments(tmp_path, per_device_eval_batch_size=size)
        found = Trainer(model, args, eval_dataset=(x, labels), **given).evaluate()
        for name in "ab":
            expected = right[name][y[name] != -100].mean()
            assert found[f"eval_{name}_acc"] == pytest.approx(expected, rel=1e-7)


def test_compute_metrics_gets_all_outputs_and_labels(tmp_path):
    x, y = token_data(9, "ignored labels")
    model, seen = token_model(), []

    def compute_metrics(prediction):
        seen.append(prediction)
        return {"ignored": (prediction.label_ids["b"] == -100).sum()}

    args = arguments(tmp_path, per_device_eval_batch_size=4, include_for_metrics=["loss"])
    given = {"loss": CROSS_ENTROPY, "loss_weights": FACTORS, "compute_metrics": compute_metrics}
    found = Trainer(model, args, eval_dataset=(x, y), **given).evaluate()
    assert found["eval_ignored"] == (y["b"] == -100).sum()
    (prediction,) = seen
    for name in "ab":
        np.testing.assert_array_equal(prediction.label_ids[name], y[name])
        assert prediction.predictions[name].shape == (9, TOKENS, CLASSES)
    last = (x[8:], {name: labels[8:] for name, labels in y.items()})
    assert prediction.losses[8] == pytest.approx(total(numpy_losses(model, last)), rel=1e-5)


@pytest.mark.parametrize("kind", [dict, list])
def test_a_label_without_a_class_is_named_with_its_output(tmp_path, kind):
    x, y = token_data(4, "ignored labels")
    y["b"][2, 0] = CLASSES
    labels, loss = (y, CROSS_ENTROPY) if kind is dict else (list(y.values()), [CROSS_ENTROPY] * 2)
    args = arguments(tmp_path, max_steps=1, per_device_train_batch_size=4)
    with pytest.raises(DataError, match=r"output 'b' has 4, .*row 2, position 0"):
        fit(token_model(kind=kind), args, (x, labels), loss=loss)


def test_label_names_go_to_a_list_of_losses(tmp_path):
    x, y = token_data(6, "ignored labels")
    model = token_model(kind=list)
    named = keras.Model(model.inputs[0], dict(zip("ab", model.outputs, strict=True)))
    expected = numpy_losses(named, (x, y))
    data = [{"tokens": x[i], "first": y["a"][i], "last": y["b"][i]} for i in range(6)]
    args = arguments(tmp_path, label_names=["first", "last"])
    given = {"loss": [CROSS_ENTROPY] * 2, "loss_weights": [1.0, 0.25]}
    found = Trainer(model, args, eval_dataset=data, **given).evaluate()
    assert found["eval_loss"] == pytest.approx(total(expected), rel=1e-6)
    assert found["eval_b_loss"] == pytest.approx(expected["b"], rel=1e-6)


# --- regression: outputs without a label, weights, bookkeeping ------------------------------------


def two_outputs(kind=list):
    inputs = keras.Input((3,))
    outputs = [keras.layers.Dense(1, name=name)(inputs) for name in "ab"]
    return with_weights(
        keras.Model(inputs, outputs if kind is list else dict(zip("ab", outputs, strict=True)))
    )


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("labels", ["pair", "alone"])
def test_an_output_without_a_loss_needs_no_label(tmp_path, labels, compiled):
    x, y = make_data(8)
    runs = []
    for accumulation in (1, 2):
        model = two_outputs()
        given = {"loss": ["mse", None]}
        if compiled:
            model.compile(optimizer=keras.optimizers.SGD(0.1), metrics=[["mae"], None], **given)
            given = {"loss": None}
        expected = np.mean((ops.convert_to_numpy(model(x)[0]) - y) ** 2)
        args = arguments(
            tmp_path,
            max_steps=1,
            per_device_train_batch_size=8 // accumulation,
            gradient_accumulation_steps=accumulation,
        )
        trainer = fit(model, args, (x, [y, None] if labels == "pair" else y), **given)
        assert train_logs(trainer) == [pytest.approx(expected, rel=1e-6)]
        runs.append(weights(model))
    for one, other in zip(*runs, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_weights_of_compile_hold_for_another_loss(tmp_path):
    x, y = make_data(8)
    model = two_outputs(dict)
    model.compile(optimizer="sgd", loss={"a": "mse", "b": "mse"}, loss_weights={"a": 2.0, "b": 0.5})
    a, b = (ops.convert_to_numpy(v) - y for v in (model(x)["a"], model(x)["b"]))
    data, mae = (x, {"a": y, "b": y}), {"a": "mae", "b": "mae"}
    found = Trainer(model, arguments(tmp_path), eval_dataset=data, loss=mae).evaluate()
    assert found["eval_loss"] == pytest.approx(2 * abs(a).mean() + 0.5 * abs(b).mean(), rel=1e-6)
    given = {"loss": mae, "loss_weights": {"a": 1.0, "b": 3.0}}
    found = Trainer(model, arguments(tmp_path), eval_dataset=data, **given).evaluate()
    assert found["eval_loss"] == pytest.approx(abs(a).mean() + 3 * abs(b).mean(), rel=1e-6)


class Several(keras.Model):
    """Returns a list, whose outputs have no names."""

    def __init__(self):
        super().__init__()
        self.heads = [keras.layers.Dense(1), keras.layers.Dense(1)]

    def call(self, x):
        return [head(x) for head in self.heads]


@pytest.mark.parametrize("losses", [["mse", "mae"], ["mse", "mse"]])
def test_outputs_without_names_are_named_by_different_losses(tmp_path, losses):
    x, y = make_data(8)
    model = Several()
    model.compile(loss=losses)
    expected = model.evaluate(x, [y[:, 0], y], batch_size=8, verbose=0, return_dict=True)
    found = Trainer(model, arguments(tmp_path), eval_dataset=(x, [y[:, 0], y])).evaluate()
    assert found["eval_loss"] == pytest.approx(expected["loss"], rel=1e-6)
    names = ["mse", "mae"] if losses == ["mse", "mae"] else ["output_0", "output_1"]
    assert [f"eval_{name}_loss" in found for name in names] == [True, True]
    if losses == ["mse", "mae"]:
        assert found["eval_mae_loss"] == pytest.approx(expected["mae_loss"], rel=1e-6)


@pytest.mark.parametrize("loss", ["mse", keras.losses.mean_squared_error, [keras.losses.Huber()]])
def test_labels_of_one_output_may_be_a_list(tmp_path, loss):
    x, y = make_data(8)
    model = linear_model()
    model.compile(loss=loss, metrics=["mae"])
    expected = model.evaluate(x, [y[:, 0]], batch_size=8, verbose=0, return_dict=True)
    found = Trainer(model, arguments(tmp_path), eval_dataset=(x, [y[:, 0]])).evaluate()
    assert found["eval_loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert found["eval_mae"] == pytest.approx(expected["mae"], rel=1e-6)


def test_a_function_of_the_users_own_may_take_a_dict_of_labels(tmp_path):
    def loss(y, outputs):
        return ops.abs(y["low"] - outputs) + ops.abs(y["high"] - outputs)

    x, y = make_data(8)
    model = linear_model()
    found = ops.convert_to_numpy(model(x))
    expected = (abs(y - found) + abs(y + 1 - found)).mean()
    data = (x, {"low": y, "high": y + 1})
    trainer = Trainer(model, arguments(tmp_path), eval_dataset=data, loss=loss)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "loss", [keras.losses.MeanAbsoluteError, functools.partial(keras.losses.huber, delta=0.5)]
)
def test_compile_takes_more_than_can_be_serialized(tmp_path, loss):
    x, y = make_data(8)
    model = linear_model()
    model.compile(loss=loss, loss_weights=[2.0])
    expected = model.evaluate(x, y, batch_size=8, verbose=0)
    found = Trainer(model, arguments(tmp_path), eval_dataset=(x, y)).evaluate()
    assert found["eval_loss"] == pytest.approx(expected, rel=1e-6)


def test_the_weight_of_one_output_counts(tmp_path):
    x, y = make_data(8)
    model = linear_model()
    expected = 0.5 * np.mean((ops.convert_to_numpy(model(x)) - y) ** 2)
    model.compile(optimizer="sgd", loss="mse", loss_weights=0.5)
    found = Trainer(model, arguments(tmp_path), eval_dataset=(x, y)).evaluate()
    assert found["eval_loss"] == pytest.approx(expected, rel=1e-6)


def test_what_keras_added_up_itself_is_no_result(tmp_path):
    x, y = make_data(8)
    model, data = two_outputs(dict), (x, {"a": y, "b": y + 3})
    model.compile(
        optimizer=keras.optimizers.SGD(0.0), loss={"a": "mse", "b": "mae"}, metrics={"a": ["mae"]}
    )
    expected = model.evaluate(*data, batch_size=8, verbose=0, return_dict=True)
    args = arguments(tmp_path, learning_rate=None, max_steps=1)
    trainer = Trainer(model, args, train_dataset=data, eval_dataset=data)
    trainer.fit()
    found = trainer.evaluate()
    (entry,) = (e for e in trainer.state.log_history if "loss" in e)
    for name, value in expected.items():
        assert found[f"eval_{name}"] == pytest.approx(value, rel=1e-5)
        assert entry[name] == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("given", [{"a": "mse", "c": "mse"}, ["mse", "mse", "mse"]])
def test_losses_of_other_outputs_are_refused_in_words(tmp_path, given):
    x, y = make_data(8)
    args = arguments(tmp_path, max_steps=1)
    with pytest.raises(ConfigurationError, match="output"):
        fit(two_outputs(), args, (x, [y, y]), loss=given)


# --- sums -----------------------------------------------------------------------------------------


class PerSample(keras.layers.Layer):
    """Adds a loss for each sample."""

    def call(self, x):
        self.add_loss(0.1 * ops.sum(ops.square(x), axis=-1))
        return x


def added():
    inputs = keras.Input((3,))
    return with_weights(keras.Model(inputs, PerSample()(keras.layers.Dense(2)(inputs))))


def summed():
    return linear_model(outputs=2, kernel_regularizer=keras.regularizers.L2(0.3))


@pytest.mark.parametrize("make", [added, summed])
def test_a_sum_over_the_batch_is_one_over_the_update(tmp_path, make):
    """Eight samples train as one batch of plain Keras does, in one micro-batch and in four."""
    x, y = make_data(8, outputs=2)
    loss = keras.losses.Huber(reduction="sum") if make is summed else "mse"
    plain = make()
    plain.compile(optimizer=keras.optimizers.SGD(0.05), loss=loss)
    value = plain.train_on_batch(x, y)
    for accumulation in (1, 4):
        model = make()
        trainer = fit(
            model,
            arguments(
                tmp_path,
                max_steps=1,
                per_device_train_batch_size=8 // accumulation,
                gradient_accumulation_steps=accumulation,
                max_grad_norm=0.0,
            ),
            (x, y),
            loss=loss,
            optimizers=(keras.optimizers.SGD(0.05), None),
        )
        assert train_logs(trainer) == [pytest.approx(float(value), rel=1e-5)]
        for one, other in zip(weights(model), weights(plain), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [added, summed])
@pytest.mark.parametrize("size", [3, 8])
def test_an_evaluation_of_sums_is_that_of_keras(tmp_path, make, size):
    x, y = make_data(8, outputs=2)
    model = make()
    loss = keras.losses.Huber(reduction="sum") if make is summed else "mse"
    model.compile(optimizer="sgd", loss=loss)
    expected = model.evaluate(x, y, batch_size=size, verbose=0)
    args = arguments(tmp_path, per_device_eval_batch_size=size)
    found = Trainer(model, args, eval_dataset=(x, y)).evaluate()
    assert found["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_the_loss_of_compile_is_of_no_matter_where_compute_loss_is_overridden(tmp_path):
    class Own(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(inputs[0])
            loss = ops.mean((outputs - inputs[1]) ** 2)
            return (loss, outputs) if return_outputs else loss

    x, y = make_data(8)
    model = linear_model()
    expected = np.mean((ops.convert_to_numpy(model(x)) - y) ** 2)
    model.compile("sgd", keras.losses.Huber(reduction="sum"), loss_weights=[3.0])
    trainer = Own(model, arguments(tmp_path, max_steps=1), train_dataset=(x, y))
    trainer.fit()
    assert train_logs(trainer) == [pytest.approx(expected, rel=1e-6)]


def test_a_compiled_model_without_labels_accumulates(tmp_path):
    class Reconstruction(keras.layers.Layer):
        def call(self, both):
            self.add_loss(ops.mean(ops.square(both[0] - both[1])))
            return both[1]

    x = make_data(8)[0]
    runs = []
    for accumulation in (1, 4):
        inputs = keras.Input((3,))
        model = keras.Model(inputs, Reconstruction()([inputs, keras.layers.Dense(3)(inputs)]))
        with_weights(model).compile(optimizer=keras.optimizers.SGD(0.1), metrics=[])
        args = arguments(
            tmp_path,
            max_steps=1,
            per_device_train_batch_size=8 // accumulation,
            gradient_accumulation_steps=accumulation,
        )
        runs.append((train_logs(fit(model, args, x, loss=None)), weights(model)))
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-6)
    for one, other in zip(runs[0][1], runs[1][1], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_adding_up_the_counts_leaves_no_trace(tmp_path):
    """Statistics, seeds and weights are those of a run that has nothing to count beforehand."""
    x, y = make_data(16)
    runs = []
    for losses in ({"a": "mse"}, {"a": "mse", "b": "mse"}):
        inputs = keras.Input((3,))
        hidden = keras.layers.BatchNormalization(momentum=0.7)(keras.layers.Dense(4)(inputs))
        hidden = keras.layers.Dropout(0.5, seed=3)(hidden)
        outputs = {name: keras.layers.Dense(1, name=name)(hidden) for name in "ab"}
        model = with_weights(keras.Model(inputs, outputs))
        args = arguments(
            tmp_path,
            max_steps=3,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
        )
        optimizers = (keras.optimizers.SGD(0.1), None)
        more = {"loss_weights": {"a": 1.0, "b": 0.0}} if "b" in losses else {}
        labels = {"a": y, "b": y}
        fit(model, args, (x, labels), loss=losses, optimizers=optimizers, **more)
        runs.append(weights(model))
    for one, other in zip(*runs, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-6)
