"""State that is divided among devices: the numbers of one device, a part of the memory on each."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from helpers_together import run_processes

from kbtrain import backends

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not backends.load().HAS_MESHES, reason="this backend has none"),
]

HEAD = """
import json, sys
from kbtrain import Trainer, TrainingArguments
from kbtrain.utils.machine.processes import current
import keras, numpy as np

folder, layers = sys.argv[1], keras.layers
x = np.random.default_rng(3).normal(size=(61, 8)).astype("float32")
y = np.tanh(x[:, :1] * x[:, 1:2] + x[:, 2:3]).astype("float32")

def make():
    keras.utils.set_random_seed(0)
    return keras.Sequential([
        keras.Input((8,)), layers.Dense(64, "relu", name="up"), layers.BatchNormalization(),
        layers.Dropout(0.3), layers.Dense(64, name="middle"), layers.Dense(1),
    ])

def run(devices=None, init=False, resume=None, **changes):
    fixed = dict(optim="adamw", learning_rate=0.01, lr_scheduler_type="constant",
                 max_grad_norm=1.0, logging_steps=1,
                 num_train_epochs=2, gradient_accumulation_steps=2, save_strategy="no",
                 report_to=[], disable_tqdm=True, per_device_train_batch_size=4,
                 split_batches=True)
    args = TrainingArguments(changes.pop("folder", folder), devices=devices, **fixed | changes)
    trainer = Trainer(None if init else make(), args, model_init=make if init else None,
                      train_dataset=(x, y), eval_dataset=(x[:21], y[:21]), loss="mse",
                      metrics=["mae"])
    before = bytes_on_a_device(trainer.model.variables)
    trainer.fit(resume_from_checkpoint=resume)
    result, model = trainer.evaluate(), trainer.model
    state = [*model.variables, *trainer.optimizer.variables]
    return {
        "weights": [] if current().size > 1 and "fsdp" in changes else np.concatenate(
            [np.ravel(w) for w in model.get_weights()]).tolist(),
        "losses": [e["loss"] for e in trainer.state.log_history if "loss" in e],
        "evaluation": [result["eval_loss"], result["eval_mae"]],
        "predictions": np.ravel(trainer.predict(x[:21]).predictions).tolist(),
        "layouts": {v.path.partition("/")[2]: list(getattr(v.value.sharding, "spec", ()))
                    for v in state if len(v.shape) == 2},
        "before": before / sum(v.value.nbytes for v in model.variables),
        "share": bytes_on_a_device(state) / sum(v.value.nbytes for v in state),
    }

def bytes_on_a_device(variables):
    return sum(v.value.addressable_shards[0].data.nbytes for v in variables)

small = {"min_num_params": 64}
"""

PROGRAM = (
    HEAD
    + """
four = [f"cpu:{i}" for i in range(4)]
results = {"one": run()}
results["fsdp"] = run(four, fsdp=True, fsdp_config=small)
results["from the start"] = run(four, init=True, fsdp=True, fsdp_config=small)
results["optimizer only"] = run(four, fsdp="shard_grad_op", fsdp_config=small)
results["mesh"] = run(four, parallelism_config={"fsdp": 2, "tensor": 2}, fsdp_config={
    "min_num_params": 64, "layouts": {"up/kernel": [None, "tensor"], "up/bias": ["tensor"],
                                      "middle/kernel": ["tensor", None]}})
saving = dict(folder=folder + "/r", save_strategy="steps", save_steps=8)
run(four, fsdp=True, fsdp_config=small, max_steps=8, **saving)
results["resumed on one"] = run(resume=True, **saving)

mesh = keras.distribution.DeviceMesh((2, 2), ["rows", "columns"], four)
layouts = keras.distribution.LayoutMap(mesh)
layouts[".*middle/kernel"] = (None, "columns")
with keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="rows").scope():
    results["keras.distribution"] = run()
print("RESULTS", json.dumps(results))
"""
)

PROCESSES = (
    HEAD
    + """
saving = dict(folder=folder + "/saved", save_strategy="steps", save_steps=4, max_steps=4)
results = {"fsdp": run(["cpu:0", "cpu:1"], fsdp=True, fsdp_config=small, **saving)}
print("RESULTS", json.dumps(results))
"""
)

CASES = [
    "fsdp",
    "from the start",
    "optimizer only",
    "mesh",
    "resumed on one",
    "keras.distribution",
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "PYTHONWARNINGS": "ignore",
    }
    folder = tmp_path_factory.mktemp("divided")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder)],
        env=environment, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "rematerialization" not in done.stderr
    return read(done.stdout)


def read(output):
    line = next(x for x in output.splitlines() if x.startswith("RESULTS "))
    return json.loads(line.removeprefix("RESULTS "))


@pytest.mark.parametrize("case", CASES)
def test_divided_state_gives_the_numbers_of_one_device(results, case):
    assert_close(results[case], results["one"])


def assert_close(found, one):
    for name in ("weights", "evaluation", "predictions", "losses"):
        expected = one[name][-len(found[name]) :]
        np.testing.assert_allclose(found[name], expected, 2e-6, 2e-6, err_msg=name)


@pytest.mark.parametrize(("case", "weights"), [("fsdp", True), ("optimizer only", False)])
def test_each_device_holds_its_part(results, case, weights):
    layouts = results[case]["layouts"]
    assert layouts["up/kernel"] == (["fsdp", None] if weights else [])
    slots = [axes for name, axes in layouts.items() if name.endswith("_up_kernel_momentum")]
    assert slots == [["fsdp", None]]
    assert results[case]["share"] < (0.27 if weights else 0.51)


def test_a_model_of_model_init_is_never_whole_on_one_device(results):
    assert results["fsdp"]["before"] == 1
    assert results["from the start"]["before"] < 0.27


def test_a_mesh_of_two_axes_divides_by_pattern_and_by_rule(results):
    layouts = results["mesh"]["layouts"]
    assert layouts["up/kernel"] == ["fsdp", "tensor"]
    assert layouts["middle/kernel"] == ["tensor", "fsdp"]
    assert results["keras.distribution"]["layouts"]["middle/kernel"] == [None, "columns"]


def test_two_processes_of_two_devices_give_the_numbers_of_one(results, tmp_path):
    script = tmp_path / "program.py"
    script.write_text(PROCESSES)
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    ended = run_processes(2, script, str(tmp_path), more=flags, timeout=600)
    first, second = (read(each.output)["fsdp"] for each in ended)
    assert first == second
    np.testing.assert_allclose(first["losses"], results["one"]["losses"][:4], 2e-6, 2e-6)
    assert first["layouts"]["up/kernel"] == ["fsdp", None]
    assert first["share"] < 0.27
    assert len(list((tmp_path / "saved/checkpoint-4").glob("model-p*.h5"))) == 2
