"""devices, tf32 and full_determinism: what holds during fit and evaluate, and no longer."""

import importlib
import sys

import keras
import numpy as np
import pytest
from helpers import Recorder, arguments, linear_model, make_data, same, weights

from kbtrain import Trainer, backends
from kbtrain.errors import ConfigurationError

BACKEND = backends.load()
FRAMEWORK = importlib.import_module(BACKEND.name)


def switches():
    """Precision of products and determinism as the framework itself reports them."""
    if BACKEND.name == "torch":
        cuda, cudnn = FRAMEWORK.backends.cuda.matmul, FRAMEWORK.backends.cudnn
        deterministic = FRAMEWORK.are_deterministic_algorithms_enabled()
        return (cuda.allow_tf32, cudnn.allow_tf32), (deterministic, cudnn.deterministic)
    if BACKEND.name == "tensorflow":
        tf32 = FRAMEWORK.config.experimental.tensor_float_32_execution_enabled()
        config = sys.modules["tensorflow.python.framework.config"]
        return (tf32,), (config.is_op_determinism_enabled(),)
    return (FRAMEWORK.config.jax_default_matmul_precision,), (BACKEND.compiler_options(),)


EXPECTED = {
    "torch": {True: (True, True), False: (False, False), "deterministic": (True, True)},
    "tensorflow": {True: (True,), False: (False,), "deterministic": (True,)},
    "jax": {
        True: ("tensorfloat32",),
        False: ("highest",),
        "deterministic": ({"xla_gpu_deterministic_ops": True},),
    },
}[BACKEND.name]


def run(path, **changes):
    seen = []
    look = Recorder({event: lambda *_: seen.append(switches()) for event in LOOKED_AT})
    data = make_data(8)
    trainer = Trainer(
        linear_model(), arguments(path, max_steps=2, **changes), train_dataset=data,
        eval_dataset=data, loss="mse", callbacks=[look],
    )  # fmt: skip
    trainer.fit()
    trainer.evaluate()
    return trainer, seen


LOOKED_AT = ("on_step_end", "on_prediction_step")


@pytest.mark.parametrize("tf32", [True, False])
def test_tf32_holds_inside_only(tmp_path, tf32):
    before = switches()
    _, seen = run(tmp_path, tf32=tf32)
    assert {precision for precision, _ in seen} == {EXPECTED[tf32]}
    assert len(seen) == 3
    assert switches() == before


def test_determinism_holds_inside_only(tmp_path):
    before = switches()
    first, seen = run(tmp_path, full_determinism=True)
    assert [deterministic for _, deterministic in seen] == [EXPECTED["deterministic"]] * 3
    assert switches() == before
    second, _ = run(tmp_path, full_determinism=True)
    assert same(weights(first.model), weights(second.model))


def test_settings_are_put_back_after_an_error(tmp_path):
    def fail(*_):
        raise KeyError("the callback's own")

    before = switches()
    args = arguments(tmp_path, max_steps=2, full_determinism=True, tf32=False)
    trainer = Trainer(linear_model(), args, train_dataset=make_data(8), loss="mse",
                      callbacks=[Recorder({"on_step_end": fail})])  # fmt: skip
    with pytest.raises(KeyError):
        trainer.fit()
    assert switches() == before


@pytest.mark.parametrize("devices", ["cpu", ["cpu:0"]])
def test_a_device_by_its_name(tmp_path, devices):
    chosen, _ = run(tmp_path, devices=devices, use_cpu=False)
    default, _ = run(tmp_path)
    assert same(weights(chosen.model), weights(default.model))
    assert BACKEND.device_info("cpu").startswith("cpu")


def test_a_device_that_is_not_there(tmp_path):
    with pytest.raises(ConfigurationError, match=r"devices='gpu:7'.*has: .*cpu:0"):
        run(tmp_path, devices=7, use_cpu=False)


def test_pinning_changes_nothing_on_the_cpu():
    x = np.arange(6, dtype="float32").reshape(2, 3)
    x.flags.writeable = False
    for pin in (False, True):
        there = BACKEND.to_device({"x": [x]}, pin)
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(there["x"][0]), x)
