"""Mistakes that were once a framework's error, or no error at all."""

import pickle
import signal

import keras
import numpy as np
import pytest
from helpers import arguments, linear_model, make_data

import optim
from kbtrain import Trainer, TrainerCallback, TrainingArguments, load_weights
from kbtrain.config.diff import compare_arguments
from kbtrain.errors import ConfigurationError, DataError, TrainingInterrupted

X, Y = make_data(8)


class OnlyOutputs(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(4)

    def call(self, x):
        return self.dense(x)

    def predict_step(self, *state_and_data):
        return self(state_and_data[-1])


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="the others have one return value")
@pytest.mark.parametrize("samples", [2, 5])
def test_a_predict_step_for_jax_returns_state_too(tmp_path, samples):
    trainer = Trainer(OnlyOutputs(), arguments(tmp_path))
    with pytest.raises(ConfigurationError, match=r"predict_step must return \(outputs, non_tr"):
        trainer.predict(np.zeros((samples, 3), "float32"))


class Forgetful(TrainerCallback):
    def state(self):
        return {"n": 1}

    def load_state(self, state):
        raise KeyError("m")


def test_a_callback_that_cannot_restore_its_state_is_named(tmp_path):
    args = arguments(tmp_path, save_strategy="steps", save_steps=1, max_steps=2)
    Trainer(linear_model(), args, train_dataset=(X, Y), loss="mse", callbacks=[Forgetful]).fit()
    again = Trainer(
        linear_model(), args.replace(max_steps=3), train_dataset=(X, Y), loss="mse",
        callbacks=[Forgetful],
    )  # fmt: skip
    with pytest.raises(ConfigurationError, match="Forgetful could not restore.*KeyError") as caught:
        again.fit(resume_from_checkpoint=True)
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize("nothing", [None, ()], ids=["None", "empty"])
def test_preprocessing_that_returns_nothing_is_refused(tmp_path, nothing):
    trainer = Trainer(
        linear_model(), arguments(tmp_path), loss="mse", eval_dataset=(X, Y),
        compute_metrics=lambda p: {"n": 1.0},
        preprocess_logits_for_metrics=lambda outputs, labels: nothing,
    )  # fmt: skip
    for call in (trainer.evaluate, lambda: trainer.predict(X)):
        with pytest.raises(ConfigurationError, match="preprocess_logits_for_metrics must return"):
            call()


@pytest.mark.parametrize("place", [1, 2], ids=["labels", "weights"])
@pytest.mark.parametrize("as_samples", [False, True], ids=["arrays", "samples"])
def test_strings_are_no_labels_and_no_weights(tmp_path, place, as_samples):
    parts = [X, Y, np.ones(8, "float32")]
    parts[place] = np.array(["a", "b"] * 4)
    data = list(zip(*parts, strict=True)) if as_samples else tuple(parts)
    trainer = Trainer(linear_model(), arguments(tmp_path), train_dataset=data, loss="mse")
    with pytest.raises(DataError, match="strings|text|numbers"):
        trainer.fit()


def test_the_resume_warning_speaks_of_samples_over_all_devices():
    two = {"devices": "cpu:0,cpu:1", "per_device_train_batch_size": 2}
    four = {"devices": "cpu:0,cpu:1,cpu:2,cpu:3", "per_device_train_batch_size": 2}
    (message,) = compare_arguments(two, four)
    assert "the position in the data is converted by samples" in message
    (message,) = compare_arguments(two, four | {"per_device_train_batch_size": 1})
    assert message.startswith("devices was")
    assert "converted" not in message
    (message,) = compare_arguments(two, two | {"per_device_train_batch_size": 4})
    assert message.startswith("per_device_train_batch_size was 2")


def test_the_resume_warning_tells_how_to_keep_the_updates_on_other_processes():
    saved = TrainingArguments(per_device_train_batch_size=8).to_dict()
    (message,) = compare_arguments(saved, saved, (24, 8))  # 3 processes, then 1
    assert "An update had 24 samples and has 8 now" in message
    assert "set per_device_train_batch_size=24, or gradient_accumulation_steps=3, or " in message
    assert "split_batches=True with per_device_train_batch_size=24 (which suits any" in message
    (message,) = compare_arguments(saved, saved, (24, 16))  # 3, then 2
    assert "set per_device_train_batch_size=12, or split_batches=True" in message

    # Each of these is told with nothing but its own change.
    followed = saved | {"gradient_accumulation_steps": 3}
    (message,) = compare_arguments(saved, followed, (24, 8))
    assert message.startswith("gradient_accumulation_steps was 1 and is 3 now")
    together = {"split_batches": True, "per_device_train_batch_size": 24}
    assert compare_arguments(saved, saved | together, (24, 24)) == []
    assert compare_arguments(saved | together, saved | together, (24, 24)) == []
    # A loader of the user's has its own size.
    assert compare_arguments(saved | together, saved | together, (24, 20)) == []
    assert compare_arguments(saved, saved, (24, 20)) == []


def test_validation_split_takes_what_the_model_takes(tmp_path):
    if not Trainer(linear_model(), arguments(tmp_path)).backend.TAKES_STRINGS:
        with pytest.raises(DataError, match="strings|numbers"):
            Trainer(
                linear_model(), arguments(tmp_path), loss="mse", validation_split=0.25,
                train_dataset=(np.array(["a b", "b"] * 4), Y),
            )  # fmt: skip
        return
    vectors = keras.layers.TextVectorization(output_mode="multi_hot", max_tokens=5)
    vectors.adapt(["a b", "b"])
    model = keras.Sequential(
        [keras.Input((), dtype="string"), vectors, keras.layers.Dense(1, kernel_initializer="ones")]
    )
    trainer = Trainer(
        model, arguments(tmp_path), loss="mse", validation_split=0.25,
        train_dataset=(np.array(["a b", "b"] * 4), Y),
    )  # fmt: skip
    trainer.fit()
    assert len(trainer.train_dataset) == 6
    assert np.isfinite(trainer.evaluate()["eval_loss"])


class Broken(optim.Optimizer):
    def __init__(self, returned, slots=None, **options):
        super().__init__(learning_rate=0.1, **options)
        self.returned, self.slots = returned, {"m": ()} if slots is None else slots

    def slot_shapes(self, shape):
        return self.slots

    def update(self, value, gradient, slots, step, learning_rate, weight_decay):
        return self.returned(value, slots)


@pytest.mark.parametrize(
    "returned",
    [lambda v, s: v, lambda v, s: (v,), lambda v, s: (v, {}), lambda v, s: (v, [])],
    ids=["value", "one", "no slot", "list"],
)
def test_an_update_of_another_form_is_refused(returned):
    variable = keras.Variable(np.ones((2, 3), "float32"))
    with pytest.raises(TypeError, match=r"Broken.update must return \(new value, new slots\)"):
        Broken(returned).apply([keras.ops.ones((2, 3))], [variable])


def test_slot_shapes_of_another_form_are_refused():
    optimizer = Broken(lambda v, s: (v, s), slots=("m", ()))
    with pytest.raises(TypeError, match="slot_shapes must return a dict"):
        optimizer.build([keras.Variable(np.ones(2, "float32"))])


def test_an_interruption_can_be_pickled():
    error = pickle.loads(pickle.dumps(TrainingInterrupted(signal.SIGTERM, 3, None)))
    assert (error.signal, error.step, error.code) == (signal.SIGTERM, 3, 143)


def test_weights_are_loaded_into_models_only(tmp_path):
    with pytest.raises(ConfigurationError, match="model must be a keras.Model"):
        load_weights(3, tmp_path)
