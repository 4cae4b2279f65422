"""Sample predictions, generations and the confusion matrix of a run."""

import io
import json
import logging

import keras
import numpy as np
import pytest
from helpers import arguments, linear_model, make_data, same, weights

from kbtrain import ConfigurationError, SampleCallback, Trainer
from kbtrain.callbacks.library.samples import classes_of, png


def image_model():
    """Class 1 where the mean of an image is above a half."""
    model = keras.Sequential(
        [
            keras.Input((4, 6, 1)),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(2, activation="softmax"),
        ]
    )
    model.layers[-1].set_weights([np.array([[-8.0, 8.0]]), np.array([4.0, -4.0])])
    return model


def images():
    levels = np.linspace(0.1, 0.9, 8, dtype=np.float32)
    return np.ones((8, 4, 6, 1), np.float32) * levels[:, None, None, None]


def test_classes_pictures_and_the_confusion_matrix(tmp_path):
    x, labels = images(), np.array([0, 0, 0, 1, 0, 1, 1, 1])  # two of them are not as predicted
    callback = SampleCallback(x, labels, ["dark", "<bright>"], shown=5)
    trainer = Trainer(
        image_model(),
        arguments(
            tmp_path,
            learning_rate=0.0,
            weight_decay=0.0,
            max_steps=1,
            eval_strategy="epoch",
            save_strategy="epoch",
            report_to=["tensorboard"],
        ),
        train_dataset=(x, labels),
        eval_dataset=(x, labels),
        loss="sparse_categorical_crossentropy",
        callbacks=[callback],
    )
    trainer.fit()
    assert callback.confusion.tolist() == [[3, 1], [1, 3]]
    assert [s["prediction"] for s in callback.newest] == ["dark"] * 4 + ["<bright>"]
    logits = 16 * x[:, 0, 0, 0].astype(np.float64) - 8
    expected = 1 / (1 + np.exp(-np.abs(logits)))
    assert [s["probability"] for s in callback.newest] == pytest.approx(expected[:5], rel=1e-5)
    record = json.loads((tmp_path / "run.json").read_text())
    (section,) = (s for s in record["sections"] if s["title"] == "Samples")
    assert section["html"].count("data:image/png") == 5
    assert "(is &lt;bright&gt;)" in section["html"]
    assert "<bright>" not in section["html"]
    values = tensorboard_values(tmp_path)
    pictures = [values[f"Samples/{i}"] for i in range(5)]
    assert [p.image.encoded_image_string for p in pictures] == [png(image) for image in x[:5]]
    assert (pictures[0].image.height, pictures[0].image.width) == (4, 6)
    assert "is <bright>" in pictures[3].metadata.summary_description
    (table,) = (v for name, v in values.items() if name.startswith("Samples/confusion"))
    assert b"| **dark** | 3 | 1 |" in table.tensor.string_val[0]


def tensorboard_values(folder):
    """The newest value of each tag in the event files of a run."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for path in (folder / "runs").glob("*/events*"):
        left = path.read_bytes()
        while left:
            size = int.from_bytes(left[:8], "little")
            event = Event.FromString(left[12 : 12 + size])
            found |= {value.tag: value for value in event.summary.value}
            left = left[16 + size :]
    return found


def test_a_picture_is_what_a_reader_of_png_sees():
    library = pytest.importorskip("PIL.Image")
    generator = np.random.default_rng(0)
    for shape in ((5, 7), (5, 7, 1), (5, 7, 3)):
        pixels = generator.integers(0, 256, shape, dtype=np.uint8)
        read = np.asarray(library.open(io.BytesIO(png(pixels))))
        assert np.array_equal(read, pixels.reshape(read.shape))
    small = np.asarray(library.open(io.BytesIO(png(np.zeros((500, 200), np.float32)))))
    assert max(small.shape) <= 96


def test_classes_from_probabilities_and_logits():
    logits = np.array([[0.0, 2.0], [3.0, -1.0]])
    for outputs in (logits, np.exp(logits) / np.exp(logits).sum(1, keepdims=True)):
        chosen, probability = classes_of(outputs)
        assert chosen.tolist() == [1, 0]
        assert probability == pytest.approx([1 / (1 + np.exp(-2)), 1 / (1 + np.exp(-4))])
    chosen, probability = classes_of(np.array([-2.0, 2.0]))
    assert chosen.tolist() == [0, 1]
    assert probability == pytest.approx([1 / (1 + np.exp(-2))] * 2)
    for wrong in (np.zeros((2, 3, 4)), {"a": np.zeros(2), "b": np.zeros(2)}):
        with pytest.raises(ConfigurationError, match="SampleCallback"):
            classes_of(wrong)


class Generator(keras.Sequential):
    """Generates the rounded weight, and a random number."""

    def generate(self, inputs, max_length=None):
        kernel = float(keras.ops.convert_to_numpy(self.layers[0].kernel)[0, 0])
        keras.random.uniform(())  # advances Keras' global seed
        return [f"{text} {kernel:.3f} {max_length}" for text in inputs]


def run(tmp_path, callbacks, **changes):
    source = linear_model()
    model = Generator([keras.Input((3,)), keras.layers.Dense(1)])
    model.set_weights(source.get_weights())
    settings = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2}
    trainer = Trainer(
        model,
        arguments(tmp_path, **(settings | changes)),
        train_dataset=make_data(8),
        eval_dataset=make_data(8),
        loss="mse",
        callbacks=callbacks,
    )
    trainer.fit()
    return trainer


def test_generated_texts_are_those_of_the_evaluated_weights(tmp_path):
    callback = SampleCallback(["one", "two"], generate={"max_length": 5})
    settings = {"ema": {"decay": 0.5}, "save_strategy": "steps", "save_steps": 4}
    trainer = run(tmp_path, [callback], **settings)
    # After the last update the model holds the average, with which it was evaluated.
    kernel = trainer.model.get_weights()[0][0, 0]
    assert [s["output"] for s in callback.newest] == [
        f"one {kernel:.3f} 5",
        f"two {kernel:.3f} 5",
    ]
    record = json.loads((tmp_path / "run.json").read_text())
    (section,) = (s for s in record["sections"] if s["title"] == "Samples")
    assert [row[0] for row in section["table"]] == ["Step", 4, 4, 2, 2]
    plain = run(tmp_path / "plain", [], ema={"decay": 0.5})
    assert same(weights(plain.model), weights(trainer.model))


def test_tokens_are_decoded(tmp_path):
    callback = SampleCallback(["a"], generate={}, decode=lambda tokens: "-".join(map(str, tokens)))
    trainer = run(tmp_path, [callback])
    assert callback._decoded(trainer, np.array([[1, 2]])) == ["1-2"]
    assert callback._decoded(trainer, {"token_ids": np.array([[3]])}) == ["3"]
    assert callback._decoded(trainer, [b"text"]) == ["text"]
    own = SampleCallback(np.array([[7, 8]]), generate={}, decode=lambda tokens: f"<{tokens[0]}>")
    run(tmp_path, [own])
    assert own.newest[0]["input"] == "<7>"


def test_mistakes_are_said(tmp_path):
    for make in (
        lambda: SampleCallback([], shown=0),
        lambda: SampleCallback([], labels=[0.5]),
        lambda: SampleCallback([], labels=[1], generate={}),
    ):
        with pytest.raises(ConfigurationError, match="SampleCallback"):
            make()
    with pytest.raises(ConfigurationError, match="eval_strategy='epoch'"):
        run(tmp_path, [SampleCallback(["a"], generate={})], eval_strategy="no")
    trainer = Trainer(
        linear_model(),
        arguments(tmp_path, eval_strategy="epoch"),
        train_dataset=make_data(8),
        eval_dataset=make_data(8),
        loss="mse",
        callbacks=[SampleCallback(["a"], generate={})],
    )
    with pytest.raises(ConfigurationError, match="a method generate"):
        trainer.fit()


def classify(tmp_path, callback):
    x, labels = images(), np.array([0, 0, 0, 0, 1, 1, 1, 1])
    trainer = Trainer(
        image_model(),
        arguments(tmp_path, num_train_epochs=2, eval_strategy="epoch"),
        train_dataset=(x, labels),
        eval_dataset=(x, labels),
        loss="sparse_categorical_crossentropy",
        callbacks=[callback],
    )
    trainer.fit()
    return trainer


@pytest.mark.parametrize(
    ("labels", "names", "said"),
    [
        ([0, 1, 0], None, "8 inputs and 3 labels"),
        ([0, 1, 2, 0, 0, 0, 0, 0], ["dark", "bright"], "the highest label is 2"),
    ],
)
def test_labels_that_do_not_fit_are_found_before_the_training(tmp_path, labels, names, said):
    callback = SampleCallback(images(), labels, names)
    with pytest.raises(ConfigurationError, match=said) as caught:
        classify(tmp_path, callback)
    assert "on_train_begin at step 0" in caught.value.__notes__[0]


@pytest.mark.parametrize("labels", [["a", "b"], [0.0, float("nan")], [-1, 0], [None, 1]])
def test_labels_must_be_classes(labels):
    with pytest.raises(ConfigurationError, match="labels must be classes"):
        SampleCallback([], labels)


def test_what_fails_at_an_evaluation_does_not_end_the_run(tmp_path, caplog, monkeypatch):
    callback = SampleCallback(images())
    monkeypatch.setattr(callback, "_captioned", lambda: 1 / 0)
    with caplog.at_level(logging.WARNING, "kbtrain"):
        trainer = classify(tmp_path, callback)
    assert trainer.state.epoch == 2
    assert caplog.text.count("SampleCallback.on_evaluate failed (ZeroDivisionError") == 1
