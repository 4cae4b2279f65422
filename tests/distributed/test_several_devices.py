"""Several devices in one process: the numbers of one device."""

import json
import os
import subprocess
import sys

import keras
import pytest

from kbtrain import Trainer, TrainingArguments, backends
from kbtrain.errors import ConfigurationError

needs_meshes = pytest.mark.skipif(not backends.load().HAS_MESHES, reason="this backend has none")

PROGRAM = """
import json, sys
import keras, numpy as np
from kbtrain import Trainer, TrainingArguments

def line(n):
    x = np.linspace(-1, 1, n, dtype="float32")[:, None]
    return x, 2 * x + 3

def product(n):
    x = np.random.default_rng(3).normal(size=(n, 8)).astype("float32")
    return x, np.tanh(x[:, :1] * x[:, 1:2] + x[:, 2:3]).astype("float32")

def linear():
    return keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, kernel_initializer="zeros")])

def deep():
    layers = keras.layers
    return keras.Sequential([
        keras.Input((8,)), layers.Dense(16, "relu"), layers.BatchNormalization(),
        layers.Dropout(0.3), layers.Dense(1),
    ])

def run(folder, devices, data, make, batch, **changes):
    keras.utils.set_random_seed(0)
    model = make()
    count = 1 if devices is None else len(devices)
    fixed = dict(learning_rate=0.1, lr_scheduler_type="constant", max_grad_norm=0.0,
                 train_sampling_strategy="sequential", logging_steps=1, num_train_epochs=3,
                 save_strategy="no", report_to=[], disable_tqdm=True)
    args = TrainingArguments(
        folder, devices=devices, per_device_train_batch_size=batch // count,
        per_device_eval_batch_size=8 // count if 8 % count == 0 else 4, **fixed | changes)
    x, y = data
    trainer = Trainer(model, args, train_dataset=data, eval_dataset=(x[:21], y[:21]),
                      loss="mse", metrics=["mae"])
    trainer.fit(resume_from_checkpoint=changes.pop("resume", None))
    result = trainer.evaluate()
    logs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    predicted = trainer.predict(x[:21]).predictions
    return {
        "weights": [np.asarray(w).ravel().tolist() for w in model.get_weights()],
        "losses": logs, "eval": [result["eval_loss"], result["eval_mae"]],
        "predictions": np.ravel(predicted).tolist(), "steps": trainer.state.global_step,
        "places": len(model.trainable_variables[0].value.devices()),
    }

folder, results = sys.argv[1], {}
for count in (1, 2, 4):
    devices = None if count == 1 else [f"cpu:{i}" for i in range(count)]
    for n in (64, 61, 57):
        results[f"line {n} on {count}"] = run(folder, devices, line(n), linear, 8, optim="sgd")
    results[f"deep on {count}"] = run(
        folder, devices, product(61), deep, 4, optim="sgd", gradient_accumulation_steps=2,
        max_grad_norm=1.0, learning_rate=0.05)
    results[f"adamw on {count}"] = run(
        folder, devices, line(61), linear, 8, optim="adamw", learning_rate=0.01)
# Stop on four devices, resume on two.
four, two = [f"cpu:{i}" for i in range(4)], ["cpu:0", "cpu:1"]
saving = dict(optim="adamw", learning_rate=0.01, save_strategy="steps", save_steps=8)
run(folder + "/r", four, line(61), linear, 8, **saving | {"max_steps": 8})
results["resumed"] = run(folder + "/r", two, line(61), linear, 8, **saving | {
    "resume_from_checkpoint": True, "restore_callback_states_from_checkpoint": True})
print("RESULTS", json.dumps(results))
"""

EXACT = {
    # samples: slope and offset after three epochs of SGD over batches of 8, in float64
    64: (1.502060, 3.164766),
    61: (1.583857, 3.171361),
    57: (1.687749, 3.169387),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONWARNINGS": "ignore",
    }
    folder = tmp_path_factory.mktemp("devices")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder)],
        env=environment, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(x for x in done.stdout.splitlines() if x.startswith("RESULTS "))
    return json.loads(line.removeprefix("RESULTS "))


def flat(tree):
    for value in tree if isinstance(tree, list) else [tree]:
        if isinstance(value, list):
            yield from flat(value)
        else:
            yield value


@pytest.mark.slow
@needs_meshes
@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("samples", EXACT)
def test_uneven_data_gives_the_exact_weights(results, samples, count):
    found = results[f"line {samples} on {count}"]
    assert list(flat(found["weights"])) == pytest.approx(EXACT[samples], abs=1e-6)
    assert found["steps"] == 24


@pytest.mark.slow
@needs_meshes
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("case", ["line 61", "deep", "adamw"])
def test_several_devices_compute_what_one_computes(results, case, count):
    one, several = results[f"{case} on 1"], results[f"{case} on {count}"]
    assert several["places"] == count
    for name in ("weights", "losses", "eval", "predictions"):
        assert list(flat(several[name])) == pytest.approx(list(flat(one[name])), rel=2e-6, abs=2e-6)


@pytest.mark.slow
@needs_meshes
def test_a_run_resumes_on_fewer_devices(results):
    one, resumed = results["adamw on 1"], results["resumed"]
    assert resumed["steps"] == 24
    assert list(flat(resumed["weights"])) == pytest.approx(
        list(flat(one["weights"])), rel=2e-6, abs=2e-6
    )


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        ("gpu:0,gpu:1", "gpu:0,gpu:1"),
        (["gpu", 1], "gpu:0,gpu:1"),
        ([0, 1, 2], "gpu:0,gpu:1,gpu:2"),
        ("cuda:1", "gpu:1"),
        ((1,), "gpu:1"),
    ],
)
def test_names_of_devices_have_one_form(given, stored):
    args = TrainingArguments(devices=given, per_device_train_batch_size=4)
    assert args.devices == stored
    assert args.train_batch_size == 4 * len(stored.split(","))


@pytest.mark.parametrize("wrong", ["gpu:0,gpu:0", ["gpu", "gpu:0"], "gpu:0,cpu:0", [], "gpu:0,"])
def test_lists_of_devices_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ConfigurationError, match="devices"):
        TrainingArguments(devices=wrong)


def test_devices_that_are_not_there_or_cannot_be_used_together_are_refused(tmp_path):
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    args = TrainingArguments(tmp_path, devices="cpu:0,cpu:77", save_strategy="no")
    expected = (
        "no such device on the backend jax: cpu:77" if backends.load().HAS_MESHES else "one device"
    )
    with pytest.raises(ConfigurationError, match=expected):
        Trainer(model, args, loss="mse")
