"""What a compilation for devices that are not here takes them for."""

import dataclasses
import importlib
import os
from types import SimpleNamespace

import keras
import numpy as np
import pytest
from keras import layers

from kbtrain import Trainer, TrainingArguments
from kbtrain.backends.step_program import CompilerTarget
from kbtrain.plan.compile import compile_program, compiler_target
from kbtrain.plan.devices import device_named

pytestmark = pytest.mark.cross  # needs JAX

WITH_SCORES = "estimated: with all scores in memory"


@pytest.fixture
def jax_part():
    return lambda name: importlib.import_module(f"kbtrain.backends.jax.{name}")


@pytest.mark.parametrize(
    ("capability", "dtype", "fused"),
    [((9, 0), "bfloat16", True), ((9, 0), "float32", False), ((7, 5), "bfloat16", False),
     (None, "bfloat16", False)],
)  # fmt: skip
def test_keras_is_told_of_the_targets_cudnn(jax_part, capability, dtype, fused):
    ask = importlib.import_module("keras.src.backend.jax.nn")._can_use_flash_attention
    kernel = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    before = kernel.check_cudnn_version
    x = importlib.import_module("jax").numpy.zeros((1, 128, 2, 64), dtype)
    with jax_part("target").attention_on(capability) as attention:
        assert not attention.asked
        assert ask(x, x, x, None) is fused
    assert attention.asked
    assert attention.answered
    assert kernel.check_cudnn_version is before


def test_questions_that_jax_has_moved_are_said_to_be_unanswered(jax_part, monkeypatch):
    kernel = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.delattr(kernel, "check_compute_capability")
    with jax_part("target").attention_on((9, 0)) as attention:
        assert not attention.answered


def test_the_users_environment_is_as_before(jax_part, monkeypatch):
    ahead = jax_part("ahead_of_time")
    seen = []
    names = ("TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD")

    def get_topology_desc(**options):
        seen.append([os.environ.get(name) for name in names])
        return SimpleNamespace(devices=["chip"])

    monkeypatch.setattr(ahead, "topologies", SimpleNamespace(get_topology_desc=get_topology_desc))
    monkeypatch.setattr(ahead, "has_compiler_for", lambda platform: True)
    monkeypatch.setenv(names[0], "0")
    monkeypatch.delenv(names[1], raising=False)
    kind = CompilerTarget("a chip of a test", "tpu", topology="v5e")
    assert ahead.devices_of(kind, 1) == ["chip"]
    assert seen == [["0", "1"]]
    assert [os.environ.get(name) for name in names] == ["0", None]


@pytest.fixture
def trainer(tmp_path):
    x = keras.Input((8, 4))
    attention = layers.MultiHeadAttention(1, 8)(x, x)
    model = keras.Model(x, layers.Dense(1)(layers.Flatten()(attention)))
    data = np.zeros((8, 8, 4), "float32"), np.zeros((8, 1), "float32")
    args = TrainingArguments(output_dir=tmp_path, report_to="none", disable_tqdm=True, bf16=True)
    return Trainer(model, args, train_dataset=data, loss="mse")


def test_a_plan_says_how_attention_was_compiled(jax_part, trainer, monkeypatch):
    ahead = jax_part("ahead_of_time")
    monkeypatch.setattr(trainer.backend, "has_compiler_for", lambda platform: False)
    facts = compile_program(trainer, device=device_named("h100"))
    assert facts.exact["attention"].startswith(WITH_SCORES)
    assert "attention" not in compile_program(trainer).exact

    compile_it = ahead._compile

    def without_cudnn(run, kind, count, cudnn):
        if cudnn:
            run_once = compile_it(run, None, count, None)
            assert run_once.attention == "scores"
            raise ahead._NotWithCudnn("no such kernel")
        return dataclasses.replace(compile_it(run, None, count, None), platform="cuda")

    monkeypatch.setattr(trainer.backend, "has_compiler_for", lambda platform: True)
    monkeypatch.setattr(ahead, "_compile", without_cudnn)
    facts = compile_program(trainer, device=device_named("h100"))
    assert facts.exact["attention"].startswith(WITH_SCORES)
    assert "(no such kernel)" in facts.exact["attention"]


def test_collectives_that_cannot_be_read_are_said_to_be_unknown(jax_part, trainer, monkeypatch):
    hlo = jax_part("hlo")

    def sent(program):
        raise hlo.UnknownGroupsError("the groups of a collective, printed as 'x'")

    monkeypatch.setattr(hlo.Program, "sent", sent)
    facts = compile_program(trainer, count=2)
    assert facts.collectives == {}
    assert facts.network_bytes == 0
    assert facts.exact["collectives"].startswith("unknown: ")
    assert "divided by 2 devices" in facts.exact["flops"]


def test_the_target_has_the_capability_of_the_device():
    assert compiler_target(device_named("a100-40gb")).compute_capability == (8, 0)
    assert compiler_target(device_named("v5e")).compute_capability is None
