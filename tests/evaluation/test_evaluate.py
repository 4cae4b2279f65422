"""evaluate and predict: exact over the set, in order, and what reaches the host."""

import keras
import numpy as np
import pytest
from helpers import (
    arguments,
    batch_norm_model,
    linear_model,
    make_data,
    same,
    weights,
    with_weights,
)

from kbtrain import ConfigurationError, DataError, EvalPrediction, Trainer
from kbtrain.evaluation.gather import PADDING
from kbtrain.utils.timing import speed


def make(tmp_path, model=None, size=4, **kwargs):
    changes = kwargs.pop("args", {})
    return Trainer(
        model or linear_model(),
        arguments(tmp_path, per_device_eval_batch_size=size, **changes),
        **({"loss": "mse"} | kwargs),
    )


def linear(model, x):
    kernel, bias = weights(model)
    return x @ kernel + bias


# --- evaluate -------------------------------------------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize("size", [1, 3, 8, 64])
def test_loss_and_metrics_are_those_of_the_whole_set(tmp_path, size):
    x, y = make_data(11)
    trainer = make(tmp_path, size=size, eval_dataset=(x, y), metrics=["mean_absolute_error"])
    metrics = trainer.evaluate()
    error = linear(trainer.model, x) - y
    assert metrics["eval_loss"] == pytest.approx(np.mean(error**2), rel=1e-6)
    assert metrics["eval_mean_absolute_error"] == pytest.approx(np.mean(np.abs(error)), rel=1e-6)
    assert {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second"} <= metrics.keys()


@pytest.mark.core
def test_evaluation_changes_nothing(tmp_path):
    model = batch_norm_model(dropout=0.5)
    trainer = make(tmp_path, model, eval_dataset=make_data(8))
    before = weights(model)
    first = trainer.evaluate()["eval_loss"]
    assert same(weights(model), before)  # statistics and seed states too
    assert trainer.evaluate()["eval_loss"] == first  # no dropout


def test_named_sets_and_other_prefixes(tmp_path):
    x, y = make_data(8)
    trainer = make(tmp_path, eval_dataset={"near": (x, y), "far": (x, y + 10)})
    metrics = trainer.evaluate()
    losses = [np.mean((linear(trainer.model, x) - y - d) ** 2) for d in (0, 10)]
    assert metrics["eval_near_loss"] == pytest.approx(losses[0], rel=1e-6)
    assert metrics["eval_far_loss"] == pytest.approx(losses[1], rel=1e-6)
    other = trainer.evaluate((x, y), metric_key_prefix="test")
    assert other["test_loss"] == pytest.approx(losses[0], rel=1e-6)
    assert not any(name.startswith("eval") for name in other)


def test_a_dict_of_columns_is_one_set(tmp_path):
    x, y = make_data(8)
    inputs = {"a": keras.Input((3,), name="a"), "b": keras.Input((3,), name="b")}
    model = keras.Model(inputs, keras.layers.Dense(1)(inputs["a"] + inputs["b"]))
    for data in ({"a": x, "b": x, "labels": y}, ({"a": x, "b": x}, y)):
        assert make(tmp_path, model, eval_dataset=data).evaluate().keys() >= {"eval_loss"}


def test_nested_columns_are_one_set(tmp_path):
    x, y = make_data(8)
    inputs = {"both": {"a": keras.Input((3,), name="a"), "b": keras.Input((3,), name="b")}}
    outputs = keras.layers.Dense(1)(inputs["both"]["a"] + inputs["both"]["b"])
    data = {"both": {"a": x, "b": x}, "labels": y}
    trainer = make(tmp_path, keras.Model(inputs, outputs), eval_dataset=data)
    assert "eval_loss" in trainer.evaluate()


@pytest.mark.core
def test_compute_metrics_gets_the_whole_set_in_order(tmp_path):
    x, y = make_data(11)
    seen = []

    def compute(prediction):
        seen.append(prediction)
        predictions, labels = prediction
        return {"mae": np.abs(predictions - labels).mean(), "eval_kept": 1}

    trainer = make(tmp_path, eval_dataset=(x, y), compute_metrics=compute)
    metrics = trainer.evaluate()
    (prediction,) = seen
    assert isinstance(prediction, EvalPrediction)
    np.testing.assert_allclose(
        prediction.predictions, linear(trainer.model, x), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_array_equal(prediction.label_ids, y)
    assert prediction.inputs is None
    assert prediction.losses is None
    expected = np.abs(linear(trainer.model, x) - y).mean()
    assert metrics["eval_mae"] == pytest.approx(expected, rel=1e-5)
    assert isinstance(metrics["eval_mae"], float)
    assert metrics["eval_kept"] == 1


def test_inputs_and_losses_on_request(tmp_path):
    x, y = make_data(6)
    seen = []
    trainer = make(
        tmp_path,
        eval_dataset=(x, y),
        args={"include_for_metrics": ["inputs", "loss"]},
        compute_metrics=lambda p: seen.append(tuple(p)) or {},
    )
    trainer.evaluate()
    ((predictions, _, inputs, losses),) = seen
    np.testing.assert_array_equal(inputs, x)
    squares = ((predictions - y) ** 2)[:, 0]
    expected = [squares[:4].mean()] * 4 + [squares[4:].mean()] * 2
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_preprocess_runs_before_the_copy_to_the_host(tmp_path):
    x, _ = make_data(6)
    y = np.array([0, 1, 2, 0, 1, 2], np.int32)
    seen = []
    trainer = make(
        tmp_path,
        linear_model(outputs=3),
        eval_dataset=(x, y),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        preprocess_logits_for_metrics=lambda logits, labels: keras.ops.argmax(logits, axis=-1),
        compute_metrics=lambda p: seen.append(p.predictions) or {},
    )
    trainer.evaluate()
    np.testing.assert_array_equal(seen[0], linear(trainer.model, x).argmax(-1))


def test_prediction_loss_only_computes_no_metrics_of_the_host(tmp_path):
    trainer = make(
        tmp_path,
        eval_dataset=make_data(4),
        args={"prediction_loss_only": True},
        compute_metrics=lambda p: pytest.fail("not asked for"),
    )
    assert "eval_loss" in trainer.evaluate()


def test_extras_of_the_loss_are_averaged_by_count(tmp_path):
    x, y = make_data(7)
    trainer = make(
        tmp_path,
        eval_dataset=(x, y),
        size=3,
        loss=None,
        compute_loss_func=lambda o, y: ((o - y) ** 2, {"mean_output": keras.ops.mean(o)}),
    )
    metrics = trainer.evaluate()
    assert metrics["eval_mean_output"] == pytest.approx(linear(trainer.model, x).mean(), rel=1e-5)


def test_a_second_evaluation_begins_anew(tmp_path):
    data = make_data(8)
    trainer = make(tmp_path, eval_dataset=data, metrics=["mean_absolute_error"])
    first, second = trainer.evaluate(), trainer.evaluate()
    assert first["eval_mean_absolute_error"] == second["eval_mean_absolute_error"]


def test_evaluation_sees_the_newest_weights(tmp_path):
    x, y = make_data(8)
    trainer = make(tmp_path, eval_dataset=(x, y), train_dataset=(x, y), args={"max_steps": 3})
    before = trainer.evaluate()["eval_loss"]
    trainer.fit()
    after = trainer.evaluate()["eval_loss"]
    assert after == pytest.approx(np.mean((linear(trainer.model, x) - y) ** 2), rel=1e-5)
    assert after < before
    with_weights(trainer.model, seed=9)
    again = trainer.evaluate()["eval_loss"]
    assert again == pytest.approx(np.mean((linear(trainer.model, x) - y) ** 2), rel=1e-5)


def test_an_iterable_can_be_evaluated(tmp_path):
    x, y = make_data(7)
    trainer = make(tmp_path)
    metrics = trainer.evaluate(lambda: zip(x, y, strict=True))
    assert metrics["eval_loss"] == pytest.approx(
        np.mean((linear(trainer.model, x) - y) ** 2), rel=1e-5
    )


def test_a_nan_is_not_hidden(tmp_path):
    x, y = make_data(12)
    x[5] = np.nan
    metrics = make(tmp_path, metrics=["mean_absolute_error"]).evaluate((x, y))
    assert np.isnan(metrics["eval_loss"])
    assert np.isnan(metrics["eval_mean_absolute_error"])


@pytest.mark.parametrize("value", [1.0, np.nan])
def test_a_set_without_a_label_that_counts(tmp_path, value, caplog):
    def nothing(outputs, labels):
        return keras.ops.sum(outputs) * 0.0 * value, keras.ops.zeros(())

    trainer = make(tmp_path, loss=None, compute_loss_func=nothing)
    np.testing.assert_equal(trainer.evaluate(make_data(4))["eval_loss"], 0.0 * value)
    assert "No label of the evaluation counts" in caplog.text


def test_an_empty_loader_is_an_error(tmp_path):
    class Own(Trainer):
        def get_eval_dataloader(self, eval_dataset=None):
            return []

    with pytest.raises(DataError, match="no samples"):
        Own(linear_model(), arguments(tmp_path), eval_dataset=1, loss="mse").evaluate()


# --- predict --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["array", "tuple", "dict", "map", "generator"])
def test_predict_without_labels(tmp_path, kind):
    x, _ = make_data(7)
    # Metrics and a loss are there, but nothing to compute them with.
    trainer = make(
        tmp_path,
        metrics=["mean_absolute_error"],
        compute_metrics=lambda p: pytest.fail("no labels"),
    )
    data = {
        "array": x,
        "tuple": (x,),
        "dict": {"x": x},
        "map": list(x),
        "generator": lambda: iter(x),
    }
    if kind == "dict":
        inputs = keras.Input((3,), name="x")
        trainer = make(
            tmp_path, with_weights(keras.Model({"x": inputs}, keras.layers.Dense(1)(inputs)))
        )
    output = trainer.predict(data[kind])
    np.testing.assert_allclose(output.predictions, linear(trainer.model, x), rtol=1e-5, atol=1e-6)
    assert output.label_ids is None
    assert set(output.metrics) == {
        "test_runtime",
        "test_samples_per_second",
        "test_steps_per_second",
    }


@pytest.mark.core
def test_predict_with_labels_has_metrics(tmp_path):
    x, y = make_data(7)
    trainer = make(
        tmp_path,
        metrics=["mean_absolute_error"],
        compute_metrics=lambda p: {"n": len(p.predictions)},
    )
    output = trainer.predict((x, y))
    predictions, label_ids, metrics = output
    np.testing.assert_array_equal(label_ids, y)
    assert metrics["test_loss"] == pytest.approx(np.mean((predictions - y) ** 2), rel=1e-5)
    assert metrics["test_mean_absolute_error"] == pytest.approx(
        np.abs(predictions - y).mean(), rel=1e-5
    )
    assert metrics["test_n"] == 7


def test_predict_then_evaluate_then_fit(tmp_path):
    """The metrics are made when the first labels come, whatever came before."""
    x, y = make_data(8)
    trainer = make(
        tmp_path,
        metrics=["mean_absolute_error"],
        train_dataset=(x, y),
        eval_dataset=(x, y),
        args={"max_steps": 1, "learning_rate": 0.0},
    )
    predictions = trainer.predict(x).predictions
    error = np.abs(predictions - y).mean()
    assert trainer.evaluate()["eval_mean_absolute_error"] == pytest.approx(error, rel=1e-5)
    trainer.fit()
    (logged,) = (e for e in trainer.state.log_history if "mean_absolute_error" in e)
    assert logged["mean_absolute_error"] == pytest.approx(error, rel=1e-5)


def test_variable_lengths_are_padded(tmp_path):
    inputs = keras.Input((None, 1))
    model = with_weights(keras.Model(inputs, keras.layers.Dense(1, use_bias=False)(inputs)))
    rows = [np.arange(1.0, n + 1, dtype=np.float32)[:, None] for n in (2, 3, 1, 4)]
    labels = [row[:, 0].astype(np.int64) for row in rows]
    output = make(
        tmp_path, model, size=1, loss=None, compute_loss_func=lambda o, y: keras.ops.mean(o)
    ).predict(list(zip(rows, labels, strict=True)))
    assert output.predictions.shape == (4, 4, 1)
    assert output.label_ids.shape == (4, 4)
    factor = weights(model)[0][0, 0]
    for i, row in enumerate(rows):
        np.testing.assert_allclose(output.predictions[i, : len(row)], row * factor, rtol=1e-6)
        assert (output.predictions[i, len(row) :] == PADDING).all()
        assert (output.label_ids[i, len(row) :] == PADDING).all()


def test_several_outputs_keep_their_structure(tmp_path):
    x, _ = make_data(5)
    inputs = keras.Input((3,))
    model = keras.Model(
        inputs, {"a": keras.layers.Dense(1)(inputs), "b": keras.layers.Dense(2)(inputs)}
    )
    predictions = make(tmp_path, model, loss=None).predict(x).predictions
    assert {k: v.shape for k, v in predictions.items()} == {"a": (5, 1), "b": (5, 2)}


def test_predict_with_dropout_is_deterministic(tmp_path):
    x, _ = make_data(6)
    trainer = make(tmp_path, batch_norm_model(dropout=0.5))
    first, second = (trainer.predict(x).predictions for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_speed_is_rounded_as_in_the_reference():
    assert speed("eval", 2.00004, 10, 4) == {
        "eval_runtime": 2.0,
        "eval_samples_per_second": 5.0,
        "eval_steps_per_second": 2.0,
    }


# --- how an evaluation is gathered ----------------------------------------------------------------


class BatchMetrics:
    """Mean absolute error, added up batch by batch."""

    def __init__(self):
        self.batches, self.flags, self.total, self.count = [], [], 0.0, 0

    def __call__(self, prediction, compute_result):
        self.batches.append(prediction)
        self.flags.append(compute_result)
        self.total += np.abs(prediction.predictions - prediction.label_ids).sum()
        self.count += len(prediction.predictions)
        return {"mae": self.total / self.count} if compute_result else {}


@pytest.mark.parametrize("predict", [False, True])
def test_metrics_batch_by_batch(tmp_path, predict):
    x, y = make_data(11)
    compute = BatchMetrics()
    trainer = make(
        tmp_path,
        compute_metrics=compute,
        args={"batch_eval_metrics": True, "include_for_metrics": ["inputs", "loss"]},
    )
    error = linear(trainer.model, x) - y
    if predict:
        output = trainer.predict((x, y))
        metrics = {k.replace("test_", "eval_"): v for k, v in output.metrics.items()}
        np.testing.assert_allclose(output.predictions - output.label_ids, error, rtol=1e-4)
    else:
        metrics = trainer.evaluate((x, y))
    assert compute.flags == [False, False, True]
    assert metrics["eval_mae"] == pytest.approx(np.abs(error).mean(), rel=1e-5)
    for i, batch in enumerate(compute.batches):
        rows = slice(4 * i, 4 * i + 4)
        np.testing.assert_array_equal(batch.inputs, x[rows])
        np.testing.assert_array_equal(batch.label_ids, y[rows])
        np.testing.assert_allclose(batch.losses, [np.mean(error[rows] ** 2)] * len(x[rows]), 1e-5)


def test_metrics_batch_by_batch_need_the_argument(tmp_path):
    with pytest.raises(ConfigurationError, match="compute_result"):
        make(tmp_path, compute_metrics=lambda p: {}, args={"batch_eval_metrics": True})


def test_batches_stay_apart_on_request(tmp_path):
    x, y = make_data(11)
    seen = []
    trainer = make(
        tmp_path,
        compute_metrics=lambda p: seen.append(p) or {"n": len(p.predictions)},
        args={"eval_do_concat_batches": False, "include_for_metrics": ["inputs", "loss"]},
    )
    assert trainer.evaluate((x, y))["eval_n"] == 3
    (prediction,) = seen
    for name, whole in (("predictions", linear(trainer.model, x)), ("label_ids", y), ("inputs", x)):
        batches = getattr(prediction, name)
        assert [len(batch) for batch in batches] == [4, 4, 3], name
        np.testing.assert_allclose(np.concatenate(batches), whole, rtol=1e-5, atol=1e-6)
    assert [len(losses) for losses in prediction.losses] == [4, 4, 3]
    assert [len(batch) for batch in trainer.predict(x).predictions] == [4, 4, 3]


@pytest.mark.parametrize("most", [None, 1, 3])
def test_outputs_of_so_many_batches_wait_on_the_device(tmp_path, monkeypatch, most):
    x, y = make_data(80)
    monkeypatch.setattr("kbtrain.data.block_length.BLOCK_SECONDS", 1e9)
    trainer = make(tmp_path, args={"eval_accumulation_steps": most})
    trainer.bound.build((x[:4], y[:4]))
    step, calls = trainer.eval_steps.get(with_loss=True, gather=True), []
    run = step.run

    def recorded(block, start, count):
        results, done = run(block, start, count)
        calls.append(done)
        return results, done

    step.run = recorded
    output = trainer.predict((x, y))
    assert max(calls) == (most or 14)
    assert sum(calls) == 20
    np.testing.assert_allclose(output.predictions, linear(trainer.model, x), rtol=1e-5, atol=1e-6)
    calls.clear()
    trainer.evaluate((x, y))  # nothing to wait for: another step
    assert calls == []


def test_no_more_than_so_many_batches_are_evaluated(tmp_path):
    x, y = make_data(20)
    trainer = make(
        tmp_path, args={"eval_max_steps": 3}, compute_metrics=lambda p: {"n": len(p.predictions)}
    )
    error = linear(trainer.model, x) - y
    read = []

    def stream():
        for sample in zip(x, y, strict=True):
            read.append(sample)
            yield sample

    for data in ((x, y), list(zip(x, y, strict=True)), stream):
        metrics = trainer.evaluate(data)
        assert metrics["eval_loss"] == pytest.approx(np.mean(error[:12] ** 2), rel=1e-5)
        assert metrics["eval_n"] == 12
    assert len(read) == 12
    assert len(trainer.predict(x).predictions) == 20


def test_outputs_arrive_in_dtypes_of_numpy(tmp_path):
    x, _ = make_data(8)
    y = np.arange(8)
    model = linear_model(outputs=8)
    trainer = make(
        tmp_path,
        model,
        args={"bf16": True},
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    output = trainer.predict((x, y))
    assert output.predictions.dtype == np.float32
    np.testing.assert_allclose(output.predictions, linear(model, x), rtol=0.05, atol=0.05)
    assert output.label_ids.dtype == y.dtype == np.int64


# --- labels by other names ------------------------------------------------------------------------


def two_headed():
    inputs = keras.Input((3,), name="x")
    heads = {name: keras.layers.Dense(1, name=name)(inputs) for name in ("start", "end")}
    return with_weights(keras.Model({"x": inputs}, heads))


@pytest.mark.parametrize("kind", ["columns", "samples"])
def test_several_columns_are_labels(tmp_path, kind):
    x, start = make_data(12)
    data = {"x": x, "start": start, "end": 2 * start}
    if kind == "samples":
        data = [{name: column[i] for name, column in data.items()} for i in range(12)]
    model = two_headed()
    a, b = (x @ k + c for k, c in (model.get_layer(n).get_weights() for n in ("start", "end")))
    trainer = make(
        tmp_path,
        model,
        loss={"start": "mse", "end": "mse"},
        train_dataset=data,
        args={"label_names": ["start", "end"], "max_steps": 2},
    )
    predicted = trainer.predict(data)
    expected = np.mean((a - start) ** 2) + np.mean((b - 2 * start) ** 2)
    assert predicted.metrics["test_loss"] == pytest.approx(expected, rel=1e-5)
    assert list(predicted.label_ids) == ["start", "end"]
    np.testing.assert_array_equal(predicted.label_ids["end"], 2 * start)
    assert trainer.fit().training_loss > 0
    assert trainer.predict({"x": x}).label_ids is None


def test_one_column_is_the_label(tmp_path):
    x, y = make_data(8)
    inputs = keras.Input((3,), name="x")
    model = with_weights(keras.Model({"x": inputs}, keras.layers.Dense(1)(inputs)))
    trainer = make(tmp_path, model, args={"label_names": "target"})
    for data in ({"x": x, "target": y}, {"x": x, "labels": y}):
        assert trainer.evaluate(data)["eval_loss"] == pytest.approx(
            np.mean((linear(model, x) - y) ** 2), rel=1e-5
        )


def test_some_of_the_labels_are_an_error(tmp_path):
    x, y = make_data(8)
    trainer = make(tmp_path, two_headed(), args={"label_names": ["start", "end"]})
    with pytest.raises(DataError, match=r"only some of them.*Received: keys \['x', 'start'\]"):
        trainer.predict({"x": x, "start": y})


# --- ignore_keys ----------------------------------------------------------------------------------


def test_outputs_of_a_dict_can_be_left_out(tmp_path):
    inputs = keras.Input((3,))
    hidden = keras.layers.Dense(4, name="hidden")(inputs)
    model = keras.Model(
        inputs, {"hidden": hidden, "out": keras.layers.Dense(1, name="out")(hidden)}
    )
    x, y = make_data(8)
    seen = []

    def compute(prediction):
        seen.append(sorted(prediction.predictions))
        return {}

    trainer = make(
        tmp_path,
        model,
        loss=None,
        compute_loss_func=lambda outputs, labels: keras.ops.mean((outputs["out"] - labels) ** 2),
        compute_metrics=compute,
        train_dataset=(x, y),
        eval_dataset=(x, y),
        args={"max_steps": 1, "eval_strategy": "steps", "eval_steps": 1},
    )
    whole = trainer.predict(x).predictions
    assert sorted(whole) == ["hidden", "out"]
    part = trainer.predict(x, ["hidden"]).predictions
    assert list(part) == ["out"]
    np.testing.assert_array_equal(part["out"], whole["out"])
    loss = trainer.evaluate(ignore_keys=["hidden", "not there"])["eval_loss"]
    assert loss == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-6)
    trainer.fit(ignore_keys_for_eval=("out",))
    assert seen == [["out"], ["hidden", "out"], ["hidden"]]
    with pytest.raises(ConfigurationError, match="leaves nothing.*'hidden', 'out'"):
        trainer.predict(x, ["hidden", "out"])
