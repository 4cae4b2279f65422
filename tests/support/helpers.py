"""Small models, data and recorders that the tests of the Trainer share."""

import keras
import numpy as np

from kbtrain import Trainer, TrainerCallback, TrainingArguments
from kbtrain.callbacks.base import ALL_EVENTS, EVENTS


def arguments(output_dir, **changes):
    """Arguments of a quiet short run that saves nothing, in the order of the data.

    ``learning_rate=None`` leaves it unset, so that a compiled model keeps that of its optimizer.
    """
    defaults = {
        "learning_rate": 0.01,
        "logging_steps": 1,
        "save_strategy": "no",
        "train_sampling_strategy": "sequential",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    values = defaults | changes
    if values["learning_rate"] is None:
        del values["learning_rate"]
    return TrainingArguments(output_dir=str(output_dir), **values)


def make_data(samples=16, features=3, outputs=1, seed=0):
    """Float32 inputs and targets."""
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(samples, features)).astype(np.float32)
    y = generator.normal(size=(samples, outputs)).astype(np.float32)
    return x, y


def linear_model(features=3, outputs=1, seed=0, **kwargs):
    """One dense layer with known weights."""
    layer = keras.layers.Dense(outputs, **kwargs)
    return with_weights(keras.Sequential([keras.Input((features,)), layer]), seed)


def with_weights(model, seed=0, scale=0.5):
    """Give a built model weights that NumPy drew, the same ones on every backend."""
    generator = np.random.default_rng(seed)
    for variable in model.trainable_variables:
        variable.assign(scale * generator.normal(size=variable.shape).astype(np.float32))
    return model


def batch_norm_model(features=3, width=4, dropout=0.0, seed=0):
    """Dense, BatchNormalization, maybe Dropout, Dense."""
    layers = [
        keras.Input((features,)),
        keras.layers.Dense(width),
        keras.layers.BatchNormalization(momentum=0.7),
        keras.layers.Activation("tanh"),
        *([keras.layers.Dropout(dropout, seed=7)] if dropout else []),
        keras.layers.Dense(1),
    ]
    return with_weights(keras.Sequential(layers), seed)


def weights(model):
    """Host copies of all of a model's variables, in order."""
    return [np.array(keras.ops.convert_to_numpy(v.value)) for v in model.variables]


def same(first, second):
    """Whether two lists of arrays are equal bit for bit."""
    return len(first) == len(second) and all(
        a.dtype == b.dtype and a.tobytes() == b.tobytes()
        for a, b in zip(first, second, strict=True)
    )


def train_logs(trainer, key="loss"):
    """The values of ``key`` in the training entries of the log, in order."""
    return [entry[key] for entry in trainer.state.log_history if key in entry]


TIMINGS = ("_runtime", "_per_second")


def without_timings(entries):
    """Log entries without what the clock says."""
    return [{k: v for k, v in e.items() if not k.endswith(TIMINGS)} for e in entries]


def fit(model, args, data, **kwargs):
    """Make a Trainer, train, return it."""
    trainer = Trainer(model, args, train_dataset=data, **({"loss": "mse"} | kwargs))
    trainer.fit()
    return trainer


class Recorder(TrainerCallback):
    """Remembers name and step of each event of Transformers; ``on`` maps events to actions."""

    def __init__(self, on=None):
        self.events = []
        self.steps = []
        self.kwargs = []
        self.on = on or {}

    def _seen(self, event, args, state, control, kwargs):
        self.events.append(event)
        self.steps.append(state.global_step)
        self.kwargs.append(kwargs)
        action = self.on.get(event)
        return action(args, state, control, kwargs) if action else None


def _make_event(event):
    def method(self, args, state, control, **kwargs):
        return self._seen(event, args, state, control, kwargs)

    return method


for _event in EVENTS:
    setattr(Recorder, _event, _make_event(_event))


class FullRecorder(Recorder):
    """Remembers the events that Transformers does not have, too."""


for _event in ALL_EVENTS:
    setattr(FullRecorder, _event, _make_event(_event))


class StopAt(TrainerCallback):
    """Stops after a step, as a user's Ctrl-C would, but with everything written."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= self.step:
            control.should_training_stop = True
