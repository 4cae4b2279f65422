"""kbtrain's JAX programs beside hand-written ones, compiled for a GPU or TPU that is not here.

    python benchmarks/compiled_for.py --machine h100 v5e

Both are compiled ahead of time (``ahead_of_time.py`` says what that needs) and counted: temporary
memory, kernels, copies, buffers updated in place, transfers to and from the host, loops that wait
for the device. The hand-written ones (``native_jax_steps.py``) are jitted functions of a Keras
model's values with optax, gradients and donated state; on a TPU both run several batches a call, in
a loop. Time is not measured.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any
from unittest import mock

from ahead_of_time import Block, Positions, compile_step, machine_of  # first: it sets Keras up

import jax  # isort: skip
import keras
import native_jax_steps as native
import numpy as np
from jax.sharding import SingleDeviceSharding
from keras import layers
from workloads import convnet, loss

from kbtrain import Trainer, TrainingArguments
from kbtrain.backends.jax import compile as compiling
from kbtrain.backends.jax import target
from kbtrain.backends.jax.ahead_of_time import OPTIONS, devices_of
from kbtrain.backends.jax.hlo import Program
from kbtrain.backends.step_program import CompilerTarget, StepProgram


@dataclass(frozen=True)
class Size:
    """The dimensions of a GPT and of its batch."""

    depth: int = 4
    width: int = 256
    length: int = 128
    heads: int = 4
    vocabulary: int = 256
    rows: int = 8


SIZES = {
    "tiny": Size(depth=2, width=128, length=64, heads=2, rows=2),
    "small": Size(),
    "gpt2": Size(12, 768, 1024, 12, 50_304, 8),
}


def gpt(size: Size, dropout: float = 0.0) -> keras.Model:
    """A GPT, with an output layer of its own."""
    tokens = keras.Input((size.length,), dtype="int32")
    h = Positions()(layers.Embedding(size.vocabulary, size.width)(tokens))
    for i in range(size.depth):
        h = Block(size.width, size.heads, name=f"block_{i}")(h)
        if dropout:
            h = layers.Dropout(dropout, seed=i)(h)
    h = layers.LayerNormalization(epsilon=1e-5, name="last")(h)
    return keras.Model(tokens, layers.Dense(size.vocabulary, name="logits")(h))


def _tokens(rows: int, size: Size) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros((rows, size.length), "int32"), np.zeros((rows, size.length), "int32")


def _images(rows: int, size: Size) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros((rows, 32, 32, 3), "float32"), np.zeros(rows, "int32")


@dataclass(frozen=True)
class Row:
    """What both sides do.

    Attributes:
        native: Makes the hand-written step of a model, see ``native_jax_steps``.
        arguments: Arguments of kbtrain's run.
        make: Builds the model.
        data: ``data(rows, size)``: inputs and labels.
        policy: Dtype policy of the model.
        accumulation: Micro-batches of an update.
        evaluates: Whether it is an evaluation.
    """

    native: Callable[[keras.Model], native.Step]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    make: Callable[[Size], keras.Model] = gpt
    data: Callable[[int, Size], tuple[np.ndarray, np.ndarray]] = _tokens
    policy: str = "mixed_bfloat16"
    accumulation: int = 1
    evaluates: bool = False


def _recomputed(size: Size) -> dict[str, Any]:
    names = [f"block_{i}" for i in range(size.depth)]
    return {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"layer_names": names}}


ROWS = {
    "plain": Row(native.plain, {"max_grad_norm": 0.0, "on_nonfinite": "ignore"}),
    "clipping": Row(native.clipping, {"on_nonfinite": "ignore"}),
    "clipping and check": Row(native.checking),
    "accumulation": Row(native.accumulating, accumulation=4),
    "dropout": Row(native.checking, make=lambda size: gpt(size, 0.1)),
    "BatchNorm": Row(native.checking, make=lambda size: convnet(), data=_images),
    "fp16": Row(native.scaling_losses, {"fp16": True}, policy="mixed_float16"),
    "EMA": Row(native.averaging, {"ema": 0.999}),
    "remat": Row(native.recomputing),
    "evaluation": Row(native.evaluating, evaluates=True),
}
"""From "clipping and check" on, kbtrain runs with its defaults: gradients are clipped, and an
update that is not finite changes nothing. The hand-written steps do the same; the learning rate of
all falls linearly, which is kbtrain's default, too."""


BATCHES = 64
"""How many batches a call on a TPU may have; the loop is the same for any number."""


def _found(jitted: Any, weights: list[Any], *others: Any) -> None:
    """End an evaluation where its step would be compiled, as a run ends by itself."""
    arguments = [jax.tree.map(target.shape_of, each) for each in (weights, *others)]
    raise target.StepFound(jitted, [(weight, None) for weight in weights], arguments)


def kbtrain_program(row: Row, size: Size, kind: CompilerTarget) -> StepProgram:
    """The program of ``Trainer.fit`` or ``Trainer.evaluate``."""

    def run() -> None:
        arguments = dict(row.arguments)
        if row.native is native.recomputing:
            arguments |= _recomputed(size)
        args = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=size.rows,
            per_device_eval_batch_size=size.rows,
            gradient_accumulation_steps=row.accumulation,
            max_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            log_level="error",
            **arguments,
        )
        data = row.data(size.rows * row.accumulation, size)
        trainer = Trainer(row.make(size), args, train_dataset=data, eval_dataset=data, loss=loss())
        if not row.evaluates:
            trainer.fit()
        with mock.patch.object(compiling, "_compile", _found):
            trainer.evaluate()

    with tempfile.TemporaryDirectory() as folder:
        return compile_step(run, kind, 1)


def native_program(row: Row, size: Size, kind: CompilerTarget) -> Any:
    """The hand-written program."""
    found: list[Any] = []
    there = SingleDeviceSharding(devices_of(kind, 1)[0])

    def shape(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=there)

    def run() -> None:
        step = row.native(row.make(size))
        x, y = row.data(size.rows * row.accumulation, size)
        if row.accumulation > 1:
            x, y = (a.reshape(row.accumulation, size.rows, *a.shape[1:]) for a in (x, y))
        inputs: tuple[Any, ...] = x, y
        if kind.platform == "tpu":  # as kbtrain
            step = native.several(step)
            inputs = *(np.broadcast_to(a, (BATCHES, *a.shape)) for a in inputs), np.int32(1)
        jitted = jax.jit(step.run, donate_argnums=tuple(range(step.donated)))
        arguments = jax.tree.map(shape, (*step.state, *inputs))
        options = OPTIONS.get(kind.platform)
        found.append(jitted.lower(*arguments).compile(compiler_options=options))

    with target.attention_on(kind.compute_capability):
        jax.eval_shape(run)
    return found[0]


@dataclass(frozen=True)
class Facts:
    """What is counted of a program.

    Attributes:
        temporary: Bytes of temporary memory.
        kernels: Pieces of work that the host starts (on a TPU: that the program consists of).
        copies: Those that only copy.
        new: Bytes of results that do not take the memory of an argument.
        donated: Number of results that do.
        host_transfers: Instructions that exchange data with the host.
        attention: Kernels of cuDNN's for attention.
        waits: Loops and branches whose course the host of a GPU has to ask the device for.
    """

    temporary: int
    kernels: int
    copies: int
    new: int
    donated: int
    host_transfers: int
    attention: int
    waits: int


def native_facts(compiled: Any, platform: str) -> Facts:
    """Count what the hand-written program does."""
    memory = compiled.memory_analysis()
    return _facts(
        compiled.as_text(),
        platform,
        memory.temp_size_in_bytes,
        memory.output_size_in_bytes - memory.alias_size_in_bytes,
    )


def kbtrain_facts(step: StepProgram) -> Facts:
    """Count what kbtrain's program does."""
    new = step.output_bytes - step.alias_bytes
    return _facts(step.text, step.platform, step.temporary_bytes, new)


def _facts(text: str, platform: str, temporary: int, new: int) -> Facts:
    program = Program(text, 1)
    kernels = program.kernels()
    return Facts(
        temporary=temporary,
        kernels=len(kernels),
        copies=sum(each.operation in ("copy", "copy-start") for each in kernels),
        new=new,
        donated=program.donated(),
        host_transfers=len(program.host_transfers()),
        attention=sum("__cudnn$fmha" in each.rest for each in kernels),
        waits=len(program.host_waits()) if platform == "cuda" else 0,
    )


def compared(name: str, size: Size, machine: str) -> dict[str, Any]:
    """The facts of both programs of a row."""
    row, (kind, _) = ROWS[name], machine_of(machine)
    policy = keras.config.dtype_policy()
    try:
        keras.config.set_dtype_policy(row.policy)
        hand = native_facts(native_program(row, size, kind), kind.platform)
        own = kbtrain_facts(kbtrain_program(row, size, kind))
    finally:
        keras.config.set_dtype_policy(policy)
    return {"row": name, "machine": machine, "native": asdict(hand), "kbtrain": asdict(own)}


def show(result: Mapping[str, Any]) -> None:
    """A line of a table in Markdown."""
    hand, own = result["native"], result["kbtrain"]
    mib = [f"{side['temporary'] / 2**20:.1f}" for side in (hand, own)]
    print(
        f"| {result['machine']} | {result['row']} | {' / '.join(mib)} | "
        f"{own['temporary'] / max(hand['temporary'], 1):.3f} | {hand['kernels']} / "
        f"{own['kernels']} | {own['kernels'] / hand['kernels']:.3f} | {hand['copies']} / "
        f"{own['copies']} | {hand['new']} / {own['new']} | "
        f"{own['host_transfers']} | {own['waits']} | {own['attention']} |",
        flush=True,
    )


HEAD = """\
| compiled for | | temporary MiB: hand-written / kbtrain | ratio | kernels | ratio | copies | \
bytes not in place | host transfers | waits | cuDNN's attention |
|---|---|---|---|---|---|---|---|---|---|---|"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--machine", nargs="+", default=["h100", "v5e"])
    parser.add_argument("--row", nargs="+", default=[*ROWS], choices=ROWS)
    parser.add_argument("--size", default="small", choices=SIZES)
    parser.add_argument("--json", help="append a line for each row to this file")
    options = parser.parse_args()
    print(HEAD)
    for machine in options.machine:
        for name in options.row:
            if ROWS[name].policy == "mixed_float16" and machine_of(machine)[0].platform == "tpu":
                print(f"| {machine} | {name} | XLA has no float16 products there |", flush=True)
                continue
            result = compared(name, SIZES[options.size], machine)
            show(result)
            if options.json:
                with open(options.json, "a", encoding="utf-8") as file:
                    file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
