"""One run on the backend of this process, for comparison with the others.

``python helpers_cross.py TASK.json``. A task: ``model`` (convnet, gpt or mlp), ``initial`` (an
``.npz`` file of weights to begin with), ``output_dir``, ``result``, changes of the arguments.
"""

import json
import sys
from pathlib import Path

import keras
import numpy as np
from helpers import StopAt, arguments, train_logs
from helpers_resume import run_script

from kbtrain import Trainer

LAYERS = keras.layers
CROSS_ENTROPY = "sparse_categorical_crossentropy"


def convnet():
    """Two convolutions with BatchNormalization on 8 x 8 images of 10 classes."""

    def block(filters):
        return [
            LAYERS.Conv2D(filters, 3, padding="same", use_bias=False),
            LAYERS.BatchNormalization(),
            LAYERS.Activation("relu"),
            LAYERS.MaxPooling2D(),
        ]

    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            *block(8),
            *block(16),
            LAYERS.Flatten(),
            LAYERS.Dense(10, activation="softmax"),
        ]
    )


class Positions(LAYERS.Layer):
    """Adds a learned vector per position."""

    def build(self, shape):
        self.table = self.add_weight(shape=shape[1:], name="table")

    def call(self, x):
        return x + self.table


def gpt(vocabulary=24, length=16, width=32, heads=2, depth=2):
    """A small decoder-only transformer."""
    tokens = keras.Input((length,), dtype="int32")
    x = Positions()(LAYERS.Embedding(vocabulary, width)(tokens))
    for _ in range(depth):
        h = LAYERS.LayerNormalization()(x)
        x = x + LAYERS.MultiHeadAttention(heads, width // heads)(h, h, use_causal_mask=True)
        h = LAYERS.LayerNormalization()(x)
        x = x + LAYERS.Dense(width)(LAYERS.Dense(4 * width, activation="gelu")(h))
    outputs = LAYERS.Dense(vocabulary, activation="softmax")(LAYERS.LayerNormalization()(x))
    return keras.Model(tokens, outputs)


def mlp():
    """Small, with BatchNormalization, and nothing random."""
    return keras.Sequential(
        [
            keras.Input((8,)),
            LAYERS.Dense(16),
            LAYERS.BatchNormalization(),
            LAYERS.Activation("tanh"),
            LAYERS.Dense(4, activation="softmax"),
        ]
    )


MODELS = {"convnet": convnet, "gpt": gpt, "mlp": mlp}


def data(name):
    """Noisy enough that the loss stays well above zero."""
    generator = np.random.default_rng(0)
    if name == "gpt":
        text = generator.integers(0, 24, size=(256, 17)).cumsum(1) % 24
        return text[:, :-1].astype(np.int32), text[:, 1:].astype(np.int32)
    shape = {"convnet": (8, 8, 1), "mlp": (8,)}[name]
    classes = {"convnet": 10, "mlp": 4}[name]
    y = generator.integers(0, classes, size=256)
    centres = generator.normal(size=(classes, *shape))
    x = centres[y] + 2.0 * generator.normal(size=(256, *shape))
    return x.astype(np.float32), y.astype(np.int32)


def initial_weights(name, path):
    """Draw weights in NumPy, once for all backends."""
    generator = np.random.default_rng(1)
    arrays = {}
    for i, variable in enumerate(MODELS[name]().trainable_variables):
        fan_in = int(np.prod(variable.shape[:-1])) or 1
        values = generator.normal(size=variable.shape) / np.sqrt(fan_in)
        if len(variable.shape) == 1:  # scales, offsets, biases
            values = np.full(variable.shape, 1.0 if "gamma" in variable.path else 0.0)
        arrays[str(i)] = values.astype(np.float32)
    np.savez(path, **arrays)


def run(task):
    """Train and write the losses, the norms and the final weights."""
    model = MODELS[task["model"]]()
    with np.load(task["initial"]) as arrays:
        for i, variable in enumerate(model.trainable_variables):
            variable.assign(arrays[str(i)])
    defaults = {
        "per_device_train_batch_size": 16,
        "learning_rate": 1e-3,
        "warmup_steps": 10,
        "train_sampling_strategy": "random",
        "weight_decay": 0.01,
        "logging_steps": 1,
    }
    args = arguments(task["output_dir"], **(defaults | task.get("changes", {})))
    stop = [StopAt(task["stop"])] if "stop" in task else []
    trainer = Trainer(
        model, args, train_dataset=data(task["model"]), loss=CROSS_ENTROPY, callbacks=stop
    )
    trainer.fit(task.get("resume"))
    np.savez(
        task["result"],
        loss=train_logs(trainer),
        grad_norm=train_logs(trainer, "grad_norm"),
        **{f"w{i}": keras.ops.convert_to_numpy(v.value) for i, v in enumerate(model.variables)},
    )


def on_backend(backend, folder, tasks):
    """Run tasks in one new process on a backend; return their results."""
    folder = Path(folder)
    for number, task in enumerate(tasks):
        task["result"] = str(folder / f"{backend}-{number}.npz")
        task.setdefault("output_dir", str(folder / f"run-{backend}-{number}"))
    path = folder / f"{backend}.json"
    path.write_text(json.dumps(tasks))
    run_script(Path(__file__), [path], backend)
    loaded = []
    for task in tasks:
        with np.load(task["result"]) as file:
            loaded.append(dict(file))
    return loaded


if __name__ == "__main__":
    for one in json.loads(Path(sys.argv[1]).read_text()):
        run(one)
