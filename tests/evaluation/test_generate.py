"""predict_with_generate: the model's generate in place of its outputs, checked against NumPy."""

import keras
import numpy as np
import pytest
from helpers import Recorder, arguments, same, weights

from kbtrain import ConfigurationError, DataError, Trainer
from kbtrain.data import ArraySource
from kbtrain.evaluation.gather import PADDING

VOCABULARY = 7


class Bigrams(keras.Model):
    """The next token depends on the last one alone: row t of the table scores what follows t."""

    def __init__(self, form="array"):
        super().__init__()
        self.table = keras.layers.Embedding(VOCABULARY, VOCABULARY)
        self.noise = keras.layers.Dropout(0.5, seed=3)
        self.form = form
        self.calls = []

    def call(self, x, training=None):
        tokens = x["token_ids"] if isinstance(x, dict) else x
        return self.noise(self.table(tokens), training=training)

    def generate(self, inputs, max_length=6, temperature=0.0):
        self.calls.append((type(inputs), max_length, temperature))
        prompt = inputs["token_ids"] if isinstance(inputs, dict) else inputs
        keras.random.uniform((), seed=self.noise.seed_generator)  # as sampling would
        rows = keras.ops.convert_to_tensor(prompt)
        while rows.shape[1] < max_length:
            best = keras.ops.argmax(self.table(rows[:, -1]), axis=-1)
            rows = keras.ops.concatenate([rows, keras.ops.cast(best, rows.dtype)[:, None]], axis=1)
        if self.form == "dict":
            return {"token_ids": rows, "padding_mask": keras.ops.ones_like(rows)}
        if self.form == "lists":
            host = keras.ops.convert_to_numpy(rows)
            return [list(map(int, row[: 3 + row[0] % 3])) for row in host]
        if self.form == "texts":
            return [" ".join(map(str, row)) for row in keras.ops.convert_to_numpy(rows)]
        return {"array": rows, "tuple": (rows, rows[:, :1]), "one": rows[:1]}[self.form]


def make_model(form="array"):
    model = Bigrams(form)
    model(np.zeros((1, 2), np.int32))
    table = np.random.default_rng(0).normal(size=(VOCABULARY, VOCABULARY)).astype(np.float32)
    model.table.embeddings.assign(table)
    return model


def data(samples=7, length=3):
    x = np.random.default_rng(1).integers(0, VOCABULARY, (samples, length)).astype(np.int32)
    return x, np.roll(x, -1, axis=1)


def expected(model, prompt, length):
    table = np.asarray(keras.ops.convert_to_numpy(model.table.embeddings), np.float64)
    rows = prompt.tolist()
    for row in rows:
        while len(row) < length:
            row.append(int(np.argmax(table[row[-1]])))
    return rows


def make(tmp_path, model, data_set, callbacks=(), compute_metrics=None, **changes):
    defaults = {"predict_with_generate": True, "per_device_eval_batch_size": 3}
    return Trainer(
        model,
        arguments(tmp_path, **(defaults | changes)),
        train_dataset=data_set,
        eval_dataset=data_set,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        compute_metrics=compute_metrics,
        callbacks=callbacks,
    )


@pytest.mark.parametrize("batchwise", [False, True])
def test_compute_metrics_gets_what_is_generated(tmp_path, batchwise):
    x, y = data()
    model, seen, recorder = make_model(), [], Recorder()

    def compute(prediction, compute_result=True):
        seen.append(prediction)
        return {"length": prediction.predictions.shape[1]}

    trainer = make(
        tmp_path,
        model,
        (x, y),
        [recorder],
        compute,
        generation_max_length=8,
        generation_kwargs={"temperature": 0.5},
        batch_eval_metrics=batchwise,
        include_for_metrics=["inputs"],
    )
    metrics = trainer.evaluate()
    assert len(seen) == (3 if batchwise else 1)
    predictions = np.concatenate([p.predictions for p in seen])
    assert predictions.tolist() == expected(model, x, 8)
    np.testing.assert_array_equal(np.concatenate([p.label_ids for p in seen]), y)
    np.testing.assert_array_equal(np.concatenate([p.inputs for p in seen]), x)
    assert metrics["eval_length"] == 8
    # The loss is that of the outputs.
    logits = weights(model)[0].astype(np.float64)[x]
    log_sum = np.log(np.exp(logits).sum(-1))
    loss = np.mean(log_sum - np.take_along_axis(logits, y[..., None], -1)[..., 0])
    assert metrics["eval_loss"] == pytest.approx(loss, rel=1e-5)
    assert {call[1:] for call in model.calls} == {(8, 0.5)}
    assert recorder.events.count("on_prediction_step") == 3


@pytest.mark.parametrize("labels", [False, True])
def test_predictions_are_what_is_generated(tmp_path, labels):
    x, y = data()
    model = make_model("dict")
    columns = {"token_ids": x} | ({"labels": y} if labels else {})
    trainer = make(tmp_path, model, columns)
    predictions, label_ids, metrics = trainer.predict(columns)
    assert predictions["token_ids"].tolist() == expected(model, x, 6)
    assert predictions["padding_mask"].shape == (7, 6)
    assert (label_ids is not None) == labels == ("test_loss" in metrics)


def test_sequences_of_different_lengths_are_filled_up(tmp_path):
    x, y = data()
    model = make_model("lists")
    predictions = make(tmp_path, model, (x, y)).predict(x).predictions
    assert predictions.shape == (7, 3 + max(x[:, 0] % 3))
    for row, full in zip(predictions, expected(model, x, 6), strict=True):
        length = 3 + full[0] % 3
        assert row[:length].tolist() == full[:length]
        assert set(row[length:].tolist()) <= {PADDING}


def test_batches_of_different_lengths_are_filled_up(tmp_path):
    prompts = [np.array([1, 2], np.int32)] * 3 + [np.array([3, 4, 5], np.int32)] * 2
    model = make_model()
    trainer = make(tmp_path, model, data(), generation_max_length=2)
    predictions = trainer.predict([{"token_ids": prompt} for prompt in prompts]).predictions
    assert predictions.tolist() == [[1, 2, PADDING]] * 3 + [[3, 4, 5]] * 2


@pytest.mark.parametrize("form", ["texts", "tuple"])
def test_other_forms(tmp_path, form):
    x, _ = data()
    model = make_model(form)
    predictions = make(tmp_path, model, data()).predict(x).predictions
    rows = expected(model, x, 6)
    if form == "texts":
        assert predictions.tolist() == [" ".join(map(str, row)) for row in rows]
    else:
        assert predictions[0].tolist() == rows
        assert predictions[1].tolist() == x[:, :1].tolist()


def test_training_is_the_same_with_and_without_generation(tmp_path):
    runs = []
    for generates in (False, True):
        model = make_model()
        trainer = make(
            tmp_path / str(generates),
            model,
            data(),
            compute_metrics=lambda p: {"tokens": p.predictions.shape[-1]},
            predict_with_generate=generates,
            eval_strategy="steps",
            eval_steps=1,
            max_steps=3,
            jit_compile=False,
        )
        trainer.fit()
        evaluated = [e["eval_tokens"] for e in trainer.state.log_history if "eval_tokens" in e]
        assert evaluated == [6 if generates else VOCABULARY] * 3
        runs.append(weights(model))
    assert same(*runs)  # seed states too


def test_nothing_is_generated_for_the_loss_alone(tmp_path):
    model = make_model()
    trainer = make(tmp_path, model, data(), compute_metrics=lambda p: {}, prediction_loss_only=True)
    assert "eval_loss" in trainer.evaluate()
    assert not model.calls


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"generation_kwargs": {"num_beams": 2}}, "Bigrams.generate does not take num_beams.*temp"),
        ({"generation_max_length": 3, "predict_with_generate": False}, "Nothing is generated"),
        (
            {"generation_max_length": 3, "generation_kwargs": {"max_length": 4}},
            "maximum length is set twice",
        ),
        ({"generation_num_beams": 4}, "Write generation_kwargs={'num_beams': 4}"),
        ({"generation_config": {}}, "Write generation_kwargs"),
    ],
)
def test_options_that_cannot_work(tmp_path, changes, match):
    with pytest.raises(ConfigurationError, match=match):
        make(tmp_path, make_model(), data(), **changes)


def test_a_model_that_cannot_generate(tmp_path):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    with pytest.raises(ConfigurationError, match="needs a model with a method generate"):
        make(tmp_path, model, data())


def test_a_result_that_is_no_row_per_sample(tmp_path):
    trainer = make(tmp_path, make_model("one"), data())
    with pytest.raises(DataError, match=r"one row for each of the 3 samples.*\(1, 6\)"):
        trainer.predict(data()[0])


def test_preprocessing_of_outputs_has_no_place(tmp_path):
    with pytest.raises(ConfigurationError, match="preprocess_logits_for_metrics processes"):
        Trainer(
            make_model(),
            arguments(tmp_path, predict_with_generate=True),
            eval_dataset=data(),
            preprocess_logits_for_metrics=lambda outputs, labels: outputs,
        )


def test_an_error_in_generate_names_the_batch(tmp_path):
    model = make_model()
    trainer = make(tmp_path, model, data())

    def fail(x, max_length=None):
        raise RuntimeError("no more tokens")

    model.generate = fail
    with pytest.raises(RuntimeError, match="no more tokens") as caught:
        trainer.predict(ArraySource(data()[0]))
    assert "Raised by the model's generate, at batch 0." in caught.value.__notes__
