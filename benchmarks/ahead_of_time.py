"""kbtrain's JAX train step, compiled for devices that are not here: memory and collectives.

    python benchmarks/ahead_of_time.py --machine v5e:256 --model gpt2 --layout data fsdp

A TPU needs ``pip install "jax[tpu]"`` (libtpu); a GPU the packages ``jax-cuda13-plugin`` and
``jax-cuda13-pjrt`` of JAX's version (with ``--no-deps``) and ``nvidia-cuda-nvcc``. Neither needs
the device, nor its driver. A whole ``Trainer.fit`` is traced, not run, up to the compiled step: a
model of any size takes no memory. What comes out are facts of the program that XLA would run there;
time is not measured.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

os.environ["KERAS_BACKEND"] = "jax"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import keras
import numpy as np
from keras import layers
from workloads import GptSize, convnet, gpt, loss, mlp

from kbtrain import Trainer, TrainingArguments
from kbtrain.backends.jax.ahead_of_time import compile_step_for
from kbtrain.backends.jax.hlo import Program
from kbtrain.backends.step_program import CompilerTarget, StepProgram
from kbtrain.errors import KbtrainError
from kbtrain.plan.compile import compiler_target
from kbtrain.plan.devices import device_named
from kbtrain.utils import rng


def machine_of(machine: str) -> tuple[CompilerTarget, int]:
    """The devices of a machine.

    Args:
        machine: ``"v5e:8"``, ``"h100:64"``: the name of a device, and how many there are.
    """
    name, _, count = machine.partition(":")
    kind = compiler_target(device_named(name))
    assert kind is not None, f"XLA does not know {name}"
    return kind, int(count or 1)


class Block(layers.Layer):  # type: ignore[misc]
    """A layer of a GPT-2: attention and two products, each on a normalised input."""

    def __init__(self, width: int, heads: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.norm1 = layers.LayerNormalization(epsilon=1e-5)
        self.norm2 = layers.LayerNormalization(epsilon=1e-5)
        self.attention = layers.MultiHeadAttention(heads, width // heads, name="attention")
        self.up = layers.Dense(4 * width, activation="gelu", name="up")
        self.down = layers.Dense(width, name="down")

    def build(self, shape: Any) -> None:
        self.norm1.build(shape)
        self.norm2.build(shape)
        self.attention.build(shape, shape)
        self.up.build(shape)
        self.down.build((*shape[:-1], self.up.units))

    def call(self, x: Any) -> Any:
        normed = self.norm1(x)
        x = x + self.attention(normed, normed, use_causal_mask=True)
        return x + self.down(self.up(self.norm2(x)))


class Positions(layers.Layer):  # type: ignore[misc]
    def build(self, shape: Any) -> None:
        self.table = self.add_weight(shape=shape[1:], initializer="uniform", name="table")

    def call(self, x: Any) -> Any:
        return x + keras.ops.cast(self.table, x.dtype)


def gpt2(depth: int, width: int, heads: int) -> keras.Model:
    """GPT-2 over 1,024 tokens; the vocabulary is rounded up to a multiple of 128."""
    tokens = keras.Input((1024,), dtype="int32")
    embedding = layers.ReversibleEmbedding(50_304, width, name="embedding")
    h = Positions()(embedding(tokens))
    for i in range(depth):
        h = Block(width, heads, name=f"block_{i}")(h)
    logits = embedding(layers.LayerNormalization(epsilon=1e-5)(h), reverse=True)
    return keras.Model(tokens, logits)


@dataclass(frozen=True)
class Case:
    """What is trained.

    Attributes:
        make: Builds the model.
        data: ``data(rows)``: inputs and labels.
        rows: Samples per device.
        arguments: More arguments of the run.
        bf16: Whether to compute in bfloat16 with float32 weights.
        most_parts: Largest power of two, up to 256, that divides the width of its layers.
    """

    make: Callable[[], keras.Model]
    data: Callable[[int], tuple[np.ndarray, np.ndarray]]
    rows: int
    arguments: Mapping[str, Any] = field(default_factory=dict)
    bf16: bool = False
    most_parts: int = 256


def _tokens(length: int) -> Callable[[int], tuple[np.ndarray, np.ndarray]]:
    return lambda n: (np.zeros((n, length), "int32"), np.zeros((n, length), "int32"))


def _recomputed(depth: int) -> dict[str, Any]:
    names = [f"block_{i}" for i in range(depth)]
    options = {"layer_names": names}
    return {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": options}


CASES = {
    "mlp": Case(mlp, lambda n: (np.zeros((n, 16), "float32"), np.zeros(n, "int32")), 8),
    "convnet": Case(
        convnet, lambda n: (np.zeros((n, 32, 32, 3), "float32"), np.zeros(n, "int32")), 8
    ),
    "gpt": Case(gpt, _tokens(128), 8),
    "tiny-gpt": Case(lambda: gpt(GptSize(depth=2, width=128, length=64, heads=4)), _tokens(64), 2),
    # 124 million and 1.56 billion parameters. The latter has 20 heads of 80 in place of 25 of 64,
    # which no power of two divides.
    "gpt2-tiny": Case(lambda: gpt2(2, 256, 4), _tokens(1024), 4, _recomputed(2), bf16=True),
    "gpt2": Case(lambda: gpt2(12, 768, 12), _tokens(1024), 4, bf16=True),
    "gpt2-recomputed": Case(
        lambda: gpt2(12, 768, 12), _tokens(1024), 4, _recomputed(12), bf16=True
    ),
    "gpt2-xl": Case(
        lambda: gpt2(48, 1600, 20), _tokens(1024), 4, _recomputed(48), bf16=True, most_parts=64
    ),
}

TENSOR = {
    "(query|key|value)/kernel": [None, "tensor", None],
    "(query|key|value)/bias": ["tensor", None],
    "attention_output/kernel": ["tensor", None, None],
    "up/kernel": [None, "tensor"],
    "up/bias": ["tensor"],
    "down/kernel": ["tensor", None],
}


def layout_arguments(layout: str, devices: int, most_parts: int = 256) -> dict[str, Any]:
    """The arguments of a run whose state is divided.

    Args:
        layout: ``"data"`` (not divided), ``"fsdp"`` or ``"tensor"`` (fsdp, and four along tensor).
        devices: Number of devices.
        most_parts: Number of parts at most; the rest of the devices is along data.
    """
    if layout == "data":
        return {}
    if layout == "fsdp":
        sizes = {"data": max(1, devices // most_parts), "fsdp": min(devices, most_parts)}
        return {"fsdp": True, "parallelism_config": sizes}
    sizes = {"fsdp": devices // 4, "tensor": 4}
    return {"fsdp": True, "parallelism_config": sizes, "fsdp_config": {"layouts": TENSOR}}


def compile_step(fit: Callable[[], Any], kind: CompilerTarget, count: int) -> StepProgram:
    """Compile the first step of a run for devices that are not here.

    Args:
        fit: Makes a model and trains it with devices named "gpu:0" and so on.
        kind: The devices that these are.
        count: Their number.
    """
    seed_variable, here = rng.global_seed_variable, jax.local_devices()[0]

    def seed_variable_outside() -> keras.Variable:
        with jax.ensure_compile_time_eval(), jax.default_device(here):
            return seed_variable()

    with mock.patch.object(rng, "global_seed_variable", seed_variable_outside):
        return compile_step_for(fit, kind, count)


def compiled(
    case: Case,
    machine: tuple[CompilerTarget, int],
    layout: str = "data",
    accumulation: int = 1,
    **arguments: Any,
) -> StepProgram:
    """The compiled train step of a case."""
    kind, count = machine
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16" if case.bf16 else "float32")

    def fit() -> None:
        chosen: dict[str, Any] = {"devices": [f"gpu:{i}" for i in range(count)]}
        args = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=case.rows,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            log_level="error",
            **(chosen if count > 1 else {}),
            **layout_arguments(layout, count, case.most_parts),
            **case.arguments,
            **arguments,
        )
        data = case.data(args.train_batch_size * accumulation)
        Trainer(case.make(), args, train_dataset=data, loss=loss()).fit()

    try:
        with tempfile.TemporaryDirectory() as folder:
            return compile_step(fit, kind, count)
    finally:
        keras.config.set_dtype_policy(policy)


COLLECTIVE = ("kind", "size", "group", "loops", "rounds", "overlapped", "scalar", "sent")


def facts(step: StepProgram, count: int) -> dict[str, Any]:
    """What is known of a compiled step: bytes per device, and its collectives."""
    program = Program(step.text, count)
    return {
        "arguments": step.argument_bytes,
        "results": step.output_bytes,
        "aliased": step.alias_bytes,
        "temporary": step.temporary_bytes,
        "donated": program.donated(),
        "host_transfers": program.host_transfers(),
        "collectives": [
            {name: getattr(each, name) for name in COLLECTIVE} for each in program.collectives()
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--machine", nargs="+", default=["v5e:8"])
    parser.add_argument("--model", nargs="+", default=["gpt"], choices=CASES)
    parser.add_argument("--layout", nargs="+", default=["data"])
    parser.add_argument("--accumulation", nargs="+", type=int, default=[1])
    parser.add_argument("--rows", type=int, help="other samples per device")
    parser.add_argument("--json", help="append a line for each program to this file")
    parser.add_argument("--text", help="write the text of the last program to this file")
    options = parser.parse_args()
    for machine in options.machine:
        devices = machine_of(machine)
        for model in options.model:
            for layout in options.layout:
                for accumulation in options.accumulation:
                    what = {"machine": machine, "model": model, "layout": layout}
                    what["accumulation"] = accumulation
                    started = time.process_time()
                    try:
                        step = compiled(CASES[model], devices, layout, accumulation)
                    except KbtrainError as error:
                        result = what | {"error": str(error)[:2000]}
                    else:
                        result = what | facts(step, devices[1])
                        if options.text:
                            with open(options.text, "w", encoding="utf-8") as file:
                                file.write(step.text)
                    result["cpu_seconds"] = time.process_time() - started
                    show(result)
                    if options.json:
                        with open(options.json, "a", encoding="utf-8") as file:
                            file.write(json.dumps(result) + "\n")


def show(result: dict[str, Any]) -> None:
    """A line for the program, and one for each kind of collective in it."""
    names = ("machine", "model", "layout", "accumulation")
    title = ", ".join(f"{name} {result[name]}" for name in names)
    seconds = f"{result['cpu_seconds']:.0f} s to compile"
    if "error" in result:
        print(f"{title}: {seconds}; not compiled: {result['error'].splitlines()[0]}", flush=True)
        return
    gibibytes = {k: result[k] / 2**30 for k in ("arguments", "temporary")}
    memory = ", ".join(f"{name} {value:.2f} GiB" for name, value in gibibytes.items())
    print(f"{title}: {memory} per device; {seconds}", flush=True)
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for each in result["collectives"]:
        behind = "asynchronous" if each["overlapped"] else "waited for"
        key = each["kind"], each["group"], each["loops"], behind
        groups.setdefault(key, []).append(each)
    for (kind, group, loops, behind), found in groups.items():
        sent = sum(each["sent"] for each in found) / 2**20
        print(
            f"    {len(found)} {kind} of {group} devices, in {loops} loops, {behind}: "
            f"each sends {sent:.2f} MiB",
            flush=True,
        )


if __name__ == "__main__":
    main()
