"""On TensorFlow, which steps of a long run are compiled by XLA: a rule about what is in them."""

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.cross  # needs TensorFlow, whatever Keras runs on

RUN = """
import json, logging, sys
import keras, numpy as np
from keras import layers
from kbtrain import Trainer, TrainingArguments

records = logging.Handler()
records.emit = lambda record: messages.append(record.getMessage())
logging.getLogger("kbtrain").addHandler(records)
logging.getLogger("kbtrain").setLevel(logging.INFO)

MODELS = {  # shape of a sample, layers; tables of 1.28 MB and 1.28 kB
    "dense": [(4,)],
    "convolution": [(4, 1), layers.Conv1D(1, 2)],
    "random numbers": [(4,), layers.Dropout(0.5)],
    "large table": [(2,), layers.Embedding(40_000, 8)],
    "small table": [(2,), layers.Embedding(40, 8)],
    "large table among larger layers": [
        (2,), layers.Embedding(40_000, 8), layers.Flatten(), layers.Dense(800), layers.Dense(800)
    ],
}
found = {}
for name, updates in [("dense", 199), *((name, 200) for name in MODELS)]:
    messages = []
    shape, *hidden = MODELS[name]
    model = keras.Sequential([keras.Input(shape), *hidden, layers.Flatten(), layers.Dense(1)])
    arguments = TrainingArguments(
        output_dir=sys.argv[1], max_steps=updates, per_device_train_batch_size=4,
        save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True,
    )
    data = np.ones((4, *shape), "float32"), np.ones((4, 1), "float32")
    Trainer(model, arguments, train_dataset=data, loss="mean_squared_error").fit()
    found[f"{name}, {updates}"] = [text for text in messages if "XLA" in text]
print(json.dumps(found))
"""

GRAPH = "The step runs as a graph, without XLA: on a CPU "
COMPILED = "The step is compiled by XLA."


def test_what_is_in_the_step_decides(tmp_path):
    environment = os.environ | {"KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, "-c", RUN, str(tmp_path)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(result.stdout.splitlines()[-1]) == {
        "dense, 199": [],
        "dense, 200": [COMPILED],
        "convolution, 200": [GRAPH + "its convolutions are slower."],
        "random numbers, 200": [GRAPH + "its random numbers are slower."],
        "large table, 200": [GRAPH + "it copies large tables."],
        "small table, 200": [COMPILED],
        "large table among larger layers, 200": [COMPILED],
    }


NORMS = """
import json
import numpy as np
import tensorflow as tf
from kbtrain.backends import tensorflow_update
from optim.kernels import tensorflow as kernels

shapes = [(), (1,), (7, 3), (4096,), (64, 65), (5, 4099), (128, 96, 2)]
generator = np.random.default_rng(0)
drawn = [generator.normal(size=shape).astype("float32") for shape in shapes]
expected = [float(np.square(x.astype("float64")).sum()) for x in drawn]
for compiled in (False, True):
    def norms(tensors):
        single = [kernels.squared_norm(x) for x in tensors], list(map(kernels.mean_square, tensors))
        return *single, tensorflow_update.global_norm(tensors)
    got = tf.function(norms, jit_compile=compiled, autograph=False)([*map(tf.constant, drawn)])
    squares, means, norm = tf.nest.map_structure(float, got)
    print(json.dumps([squares, means, norm]))
print(json.dumps([expected, [e / x.size for e, x in zip(expected, drawn)], sum(expected) ** 0.5]))
hidden = tf.function(tensorflow_update.global_norm, jit_compile=True, autograph=False)
broken = drawn[4].copy()
broken[63, 64] = np.nan
print(bool(np.isnan(hidden([tf.constant(broken)]).numpy())))
"""


def test_sums_of_squares_are_right_with_xla_and_without():
    environment = os.environ | {"KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, "-c", NORMS]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    *lines, is_nan = result.stdout.splitlines()[-4:]
    graph, compiled, expected = map(json.loads, lines)
    for got in (graph, compiled):
        for values, wanted in zip(got, expected, strict=True):
            assert values == pytest.approx(wanted, rel=1e-5)
    assert is_nan == "True"
