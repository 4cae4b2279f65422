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


@pytest.mark.core
@pytest.mark.parametrize("devices", ["cpu", ["cpu:0"]])
def test_a_device_by_its_name(tmp_path, devices):
    chosen, _ = run(tmp_path, devices=devices, use_cpu=False)
    default, _ = run(tmp_path)
    assert same(weights(chosen.model), weights(default.model))
    assert BACKEND.device_info("cpu").startswith("cpu")


@pytest.mark.core
def test_a_device_that_is_not_there(tmp_path):
    with pytest.raises(ConfigurationError, match=r"devices='gpu:7'.*Available devices: .*cpu:0"):
        run(tmp_path, devices=7, use_cpu=False)


def test_pinning_changes_nothing_on_the_cpu():
    x = np.arange(6, dtype="float32").reshape(2, 3)
    x.flags.writeable = False
    for pin in (False, True):
        there = BACKEND.to_device({"x": [x]}, pin)
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(there["x"][0]), x)


@pytest.mark.parametrize("pin", [True, False])
def test_batches_are_pinned_in_training_and_in_evaluations_if_that_is_asked(
    pin, tmp_path, monkeypatch
):
    asked = []
    copy = BACKEND.to_device

    def copied(tree, pin=False):
        asked.append(pin)
        return copy(tree, pin)

    monkeypatch.setattr(BACKEND, "to_device", copied)
    trainer = Trainer(
        linear_model(),
        arguments(tmp_path, max_steps=1, dataloader_pin_memory=pin),
        train_dataset=make_data(8),
        loss="mse",
    )
    trainer.fit()
    trainer.evaluate(make_data(8))
    trainer.predict(make_data(8))
    assert asked == [pin] * 3


def test_cuda_graphs_are_refused_where_a_compiler_launches_and_missed_where_no_gpu_is(
    tmp_path, caplog
):
    if BACKEND.name == "torch":
        run(tmp_path, cuda_graphs=True, eval_strategy="steps", eval_steps=1)
        found = [r for r in caplog.records if "cuda_graphs=True has no effect" in r.getMessage()]
        assert len(found) == 2  # of the run, with its evaluations, and of an evaluation by itself
    else:
        with pytest.raises(ConfigurationError, match=f"on {BACKEND.name} XLA decides"):
            run(tmp_path, cuda_graphs=True)
    run(tmp_path, cuda_graphs=False)


# --- flags that stay on the device ----------------------------------------------------------------


def two_of_three_updates(path, **changes):
    """What a run leaves behind that meets NaN in its second update."""
    keras.utils.set_random_seed(5)
    model = keras.Sequential([keras.Input((4,)), *(keras.layers.Dense(4) for _ in range(3))])
    x = np.random.default_rng(0).normal(size=(12, 4)).astype("float32")
    x[5] = np.nan
    args = arguments(
        path,
        per_device_train_batch_size=4,
        num_train_epochs=1,
        train_sampling_strategy="sequential",
        learning_rate=0.1,
        on_nonfinite="skip",
        **changes,
    )
    trainer = Trainer(model, args, train_dataset=(x, x), loss="mse")
    trainer.fit()
    return weights(model) + [keras.ops.convert_to_numpy(v) for v in trainer.optimizer.variables]


@pytest.mark.parametrize(
    ("optim", "copied"),
    [
        ("adamw", 1),  # the count of updates
        ("sgd", 1),
        ("lion", 1 + 6 + 6),  # and all weights and momentums: torch has no such kernel
    ],
)
def test_an_update_is_left_out_without_reading_the_flag(tmp_path, monkeypatch, optim, copied):
    plain = two_of_three_updates(tmp_path, optim=optim, jit_compile=False)
    found = []
    if BACKEND.name == "torch":  # as on a GPU; the others never read it
        program, skips = (
            importlib.import_module(f"kbtrain.backends.torch.capture.{module}")
            for module in ("program", "predication")
        )

        def drop_selections(graph):
            skips.drop_selections(graph)
            kept = [str(node.target) for node in graph.nodes].count("aten.clone.default")
            found.append(kept)

        monkeypatch.setattr(BACKEND, "_on_cpu", lambda condition: False)
        monkeypatch.setattr(program, "drop_selections", drop_selections)
    for value, want in zip(two_of_three_updates(tmp_path, optim=optim), plain, strict=True):
        np.testing.assert_allclose(value, want, rtol=1e-5, atol=1e-7)
    assert found == [copied] * (BACKEND.name == "torch")
