"""The train step of a run, compiled and not run."""

import importlib

import keras
import numpy as np
import pytest
from keras import layers

from kbtrain import Trainer, TrainingArguments, backends
from kbtrain.errors import ConfigurationError
from kbtrain.plan.compile import compile_program
from kbtrain.plan.run_backend import run_backend

WIDE, CLASSES = 256, 4
# Weights and biases, and for BatchNorm the scale and the shift.
TRAINED = 16 * WIDE + WIDE + 2 * WIDE + WIDE * CLASSES + CLASSES
STATISTICS = 2 * WIDE
PRODUCTS = 16 * WIDE + WIDE * CLASSES


def mlp():
    keras.utils.set_random_seed(1)
    return keras.Sequential(
        [
            keras.Input((16,)),
            layers.Dense(WIDE, activation="relu"),
            layers.BatchNormalization(),
            layers.Dropout(0.5),
            layers.Dense(CLASSES),
        ]
    )


def trainer_of(folder, model=None, **arguments):
    keywords = {key: arguments.pop(key) for key in ("optimizers", "loss") if key in arguments}
    rng = np.random.default_rng(0)
    data = rng.normal(size=(32, 16)).astype("float32"), rng.integers(0, CLASSES, 32).astype("int32")
    settings = {"max_steps": 2, "per_device_train_batch_size": 8, "save_strategy": "no"}
    args = TrainingArguments(
        output_dir=folder, report_to="none", disable_tqdm=True, **settings | arguments
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return Trainer(
        mlp() if model is None else model,
        args,
        train_dataset=data,
        **{"loss": loss} | keywords,
    )


@pytest.mark.neutral
def test_a_framework_that_compiles_nothing_ahead_says_so(tmp_path):
    if backends.load().COMPILES_AHEAD:
        return
    with pytest.raises(ConfigurationError, match="KERAS_BACKEND=jax"):
        compile_program(trainer_of(tmp_path))


@pytest.mark.cross
def test_state_and_products_are_those_counted_by_hand(tmp_path):
    facts = compile_program(trainer_of(tmp_path))
    assert facts.compiled_for == "cpu"
    assert (facts.device_count, facts.batch_size, facts.samples) == (1, 8, 8)
    assert facts.parameters == TRAINED + STATISTICS
    assert facts.parameter_bytes == 4 * (TRAINED + STATISTICS)
    assert facts.trainable_bytes == facts.gradient_bytes == 4 * TRAINED
    assert 0 <= facts.optimizer_bytes - 2 * 4 * TRAINED < 64  # two moments, and counters
    assert 0 <= facts.batch_bytes - 8 * (16 * 4 + 4) < 64
    # The first layer's inputs need no gradient.
    assert facts.flops == 2 * 8 * (3 * PRODUCTS - 16 * WIDE)
    assert facts.peak_bytes >= facts.state_bytes + facts.batch_bytes + 8 * WIDE * 4
    assert facts.tokens is None
    assert facts.collectives == {}


@pytest.mark.cross
def test_a_run_afterwards_is_that_without_a_plan(tmp_path):
    plain, planned = trainer_of(tmp_path / "a"), trainer_of(tmp_path / "b")
    live = importlib.import_module("jax").live_arrays
    before = len(live())
    changes = {"gradient_accumulation_steps": 2, "bf16": True, "gradient_checkpointing": True}
    compile_program(planned, changes=changes)
    assert len(live()) <= before + 2  # a random generator
    assert planned.optimizer is None
    assert not (tmp_path / "b").exists()
    assert {layer.dtype_policy.name for layer in planned.model.layers} == {"float32"}
    losses = [trainer.fit().training_loss for trainer in (plain, planned)]
    assert losses[0] == losses[1]
    for one, other in zip(plain.model.weights, planned.model.weights, strict=True):
        np.testing.assert_array_equal(*map(keras.ops.convert_to_numpy, (one, other)))


@pytest.mark.cross
def test_batches_larger_than_the_data_and_micro_batches(tmp_path):
    trainer = trainer_of(tmp_path)
    one = compile_program(trainer, changes={"per_device_train_batch_size": 4096})
    four = compile_program(
        trainer,
        changes={"per_device_train_batch_size": 1024, "gradient_accumulation_steps": 4},
    )
    assert one.samples == four.samples == 4096
    assert one.flops == four.flops == four.program_flops
    assert one.temporary_bytes > 2 * four.temporary_bytes > 2 * 1024 * WIDE * 4
    assert 0.5 < four.bytes_accessed / one.bytes_accessed < 2


@pytest.mark.cross
def test_eight_devices_with_the_state_whole_and_divided(tmp_path):
    trainer = trainer_of(tmp_path)
    whole = compile_program(trainer, count=8)
    divided = compile_program(
        trainer, count=8, changes={"fsdp": True, "fsdp_config": {"min_num_params": 0}}
    )
    assert whole.samples == divided.samples == 64
    assert whole.parameter_bytes == 4 * (TRAINED + STATISTICS)
    _, sent = whole.collectives["all-reduce"]
    gradients = 2 * 7 / 8 * 4 * TRAINED  # and the sums of BatchNorm
    assert gradients < sent < 1.5 * gradients
    assert divided.parameter_bytes < whole.parameter_bytes / 7
    assert divided.optimizer_bytes < whole.optimizer_bytes / 7
    assert divided.collectives["all-gather"][1] > 7 / 8 * 4 * PRODUCTS


class Own(keras.Sequential):
    """Trains by a step of its own."""

    def train_step(self, *args):
        return super().train_step(*args)


@pytest.mark.cross
def test_a_model_with_its_own_step_trains_afterwards(tmp_path):
    model = Own([keras.Input((16,)), layers.Dense(CLASSES)])
    model.compile("adam", loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    trainer = trainer_of(tmp_path, model, loss=None)
    facts = compile_program(trainer)
    assert facts.flops == facts.program_flops == 2 * 8 * 2 * 16 * CLASSES
    assert "whole program" in facts.exact["flops"]
    assert trainer.fit().global_step == 2


class Reading(keras.Sequential):
    """Takes a tensor for a number."""

    def call(self, *args, **kwargs):
        outputs = super().call(*args, **kwargs)
        return outputs if float(keras.ops.sum(keras.ops.stop_gradient(outputs))) < 1e9 else 0.0


@pytest.mark.cross
def test_what_cannot_be_planned_is_refused_in_words(tmp_path):
    with pytest.raises(ConfigurationError, match="jit_compile=False"):
        compile_program(trainer_of(tmp_path, jit_compile=False))
    reading = Reading([keras.Input((16,)), layers.Dense(CLASSES)])
    with pytest.raises(ConfigurationError, match="takes a tensor for a number"):
        compile_program(trainer_of(tmp_path, reading))
    own = trainer_of(tmp_path, optimizers=(keras.optimizers.SGD(), None))
    with pytest.raises(ConfigurationError, match="SGD.*optim would change nothing"):
        compile_program(own, changes={"optim": "lion"})
    assert compile_program(own).optimizer_bytes < 64
    assert not own.given_optimizers[0].built
    with pytest.raises(ConfigurationError, match="mesh of 4 devices"):
        compile_program(trainer_of(tmp_path), count=8, changes={"parallelism_config": {"data": 4}})


@pytest.mark.cross
def test_state_divided_by_whole_variables_as_on_pytorch(tmp_path):
    trainer, torch = trainer_of(tmp_path), run_backend("torch")
    changes = {"fsdp": "shard_grad_op"}
    facts = compile_program(trainer, count=4, changes=changes, backend=torch)
    evenly = compile_program(trainer, count=4, changes=changes)
    assert facts.parameter_bytes == 4 * (TRAINED + STATISTICS)
    # One of the four processes has the first kernel and nothing else: two moments, and counters.
    assert 0 <= facts.optimizer_bytes - 2 * 4 * 16 * WIDE < 64
    more = facts.optimizer_bytes - evenly.optimizer_bytes
    assert more > 0
    assert facts.peak_bytes == evenly.peak_bytes + more
    assert "whole on PyTorch" in facts.exact["state"]
    with pytest.raises(ConfigurationError, match="6 trained variables among 8 processes"):
        compile_program(trainer, count=8, changes=changes, backend=torch)
    half = compile_program(trainer, changes={"fp16": True})  # what old GPUs have
    assert half.flops == facts.flops
