"""On TensorFlow: which steps XLA compiles, and models with functions of TensorFlow's in them."""

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.cross  # needs TensorFlow, whatever Keras runs on

RUN = """
import json, logging, sys
import keras, numpy as np, tensorflow as tf
from keras import layers
from kbtrain import Trainer, TrainingArguments
from kbtrain.backends.tensorflow import autograph

records = logging.Handler()
records.emit = lambda record: messages.append(record.getMessage())
logging.getLogger("kbtrain").addHandler(records)
logging.getLogger("kbtrain").setLevel(logging.INFO)

MODELS = {  # shape of a sample, layers; tables of 1.28 MB and 1.28 kB
    "dense": [(4,)],
    "convolution": [(4, 1), layers.Conv1D(1, 2)],
    "random numbers": [(4,), layers.Dropout(0.5)],
    "decomposition": [(4,), layers.Lambda(lambda x: x + keras.ops.norm(x, "nuc", (0, 1)))],
    "large table": [(2,), layers.Embedding(40_000, 8)],
    "small table": [(2,), layers.Embedding(40, 8)],
    "large table among larger layers": [
        (2,), layers.Embedding(40_000, 8), layers.Flatten(), layers.Dense(800), layers.Dense(800)
    ],
}


def fit(model, shape, updates, **settings):
    arguments = TrainingArguments(
        output_dir=sys.argv[1], max_steps=updates, per_device_train_batch_size=4,
        save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True, **settings
    )
    x = np.resize(np.arange(5.0, dtype="float32"), (6, *shape))
    data = x, np.ones((6, 1), "float32")
    trainer = Trainer(model, arguments, train_dataset=data, loss="mean_squared_error")
    messages.clear()
    trainer.fit()
    words = "XLA", "eager", "does not work with"
    return trainer, [text for text in messages if any(word in text for word in words)]


messages, found = [], {}
for name, updates in [("dense", 199), *((name, 200) for name in MODELS)]:
    shape, *hidden = MODELS[name]
    model = keras.Sequential([keras.Input(shape), *hidden, layers.Flatten(), layers.Dense(1)])
    found[f"{name}, {updates}"] = fit(model, shape, updates, dataloader_drop_last=True)[1]

rotation = [keras.Input((2, 2, 1)), layers.RandomRotation(0.1), layers.Flatten(), layers.Dense(1)]
found["refused"] = fit(keras.Sequential(rotation), (2, 2, 1), 2, jit_compile=True)[1]


class Plain(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense, self.norm = layers.Dense(1), layers.BatchNormalization()
        self.drop = layers.Dropout(0.5)

    def call(self, x, training=False):
        y = self.drop(self.norm(self.dense(x), training=training), training=training)
        return keras.ops.cond(keras.ops.sum(y) > -9.0, lambda: y + 2.0, lambda: y)


class Decorated(Plain):
    @tf.function
    def call(self, x, training=False):
        y = self.drop(self.norm(self.dense(x), training=training), training=training)
        if tf.reduce_sum(y) > -9.0:
            y = y + 2.0
        return y


def fail(*args):
    raise AttributeError("moved to another place")


for name, kind in (("Plain", Plain), ("Decorated", Decorated), ("by to_graph", Decorated)):
    if name == "by to_graph":
        autograph._convert._fast = fail
    keras.utils.set_random_seed(0)
    trainer, texts = fit(kind(), (4,), 5, logging_steps=1)
    logs = [[log["loss"], log["grad_norm"]] for log in trainer.state.log_history if "loss" in log]
    weights = [weight.tolist() for weight in trainer.model.get_weights()]
    found[name] = [*logs, weights, texts]
print(json.dumps(found))
"""

GRAPH = "The step runs as a graph, without XLA: on a CPU "
COMPILED = "The step is compiled by XLA."


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    environment = os.environ | {"KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3"}
    folder = tmp_path_factory.mktemp("run")
    (folder / "run.py").write_text(RUN)  # autograph reads the file
    command = [sys.executable, str(folder / "run.py"), str(folder)]
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True, timeout=300
    )
    return json.loads(result.stdout.splitlines()[-1])


def test_what_is_in_the_step_decides(found):
    assert {name: texts for name, texts in found.items() if "," in name} == {
        "dense, 199": [],
        "dense, 200": [COMPILED],
        "convolution, 200": [GRAPH + "its convolutions are slower."],
        "random numbers, 200": [GRAPH + "its random numbers are slower."],
        "decomposition, 200": [GRAPH + "its matrix decompositions are slower."],
        "large table, 200": [GRAPH + "it copies large tables."],
        "small table, 200": [COMPILED],
        "large table among larger layers, 200": [COMPILED],
    }


def test_what_xla_refuses_runs_as_a_graph_and_a_warning_says_so(found):
    (text,) = found["refused"]  # one, though there were batches of two sizes
    assert text.startswith("The step runs without XLA, which refuses it: ")
    assert "ImageProjectiveTransform" in text


def test_a_decorated_call_is_trained_like_any_other(found):
    assert found["Decorated"] == found["Plain"]
    assert found["Decorated"][0][1] > 0  # a gradient
    assert found["Decorated"][-1] == []  # compiled, though there is an `if`


def test_a_decorated_call_is_trained_like_any_other_without_private_parts(found):
    *numbers, (text,) = found["by to_graph"]
    assert numbers == found["Plain"][:-1]
    assert text.startswith("Making a tf.function a part of the step does not work with tensorflow")


NORMS = """
import json
import numpy as np
import tensorflow as tf
from kbtrain.backends.tensorflow import optimizer
from optim.kernels import tensorflow as kernels

shapes = [(), (1,), (7, 3), (4096,), (64, 65), (5, 4099), (128, 96, 2)]
generator = np.random.default_rng(0)
drawn = [generator.normal(size=shape).astype("float32") for shape in shapes]
expected = [float(np.square(x.astype("float64")).sum()) for x in drawn]
for compiled in (False, True):
    def norms(tensors):
        squares = [kernels.squared_norm(x) for x in tensors]
        means = [kernels.mean_product(x, x) for x in tensors]
        return squares, means, optimizer.global_norm(tensors)
    got = tf.function(norms, jit_compile=compiled, autograph=False)([*map(tf.constant, drawn)])
    squares, means, norm = tf.nest.map_structure(float, got)
    print(json.dumps([squares, means, norm]))
print(json.dumps([expected, [e / x.size for e, x in zip(expected, drawn)], sum(expected) ** 0.5]))
hidden = tf.function(optimizer.global_norm, jit_compile=True, autograph=False)
broken = drawn[4].copy()
broken[63, 64] = np.nan
print(bool(np.isnan(hidden([tf.constant(broken)]).numpy())))
"""


def test_sums_of_squares_are_right_with_xla_and_without():
    environment = os.environ | {"KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, "-c", NORMS]
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True, timeout=300
    )
    *lines, is_nan = result.stdout.splitlines()[-4:]
    graph, compiled, expected = map(json.loads, lines)
    for got in (graph, compiled):
        for values, wanted in zip(got, expected, strict=True):
            assert values == pytest.approx(wanted, rel=1e-5)
    assert is_nan == "True"
