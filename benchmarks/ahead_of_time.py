"""kbtrain's JAX train step, compiled for devices that are not here: memory and collectives.

    python benchmarks/ahead_of_time.py --machine v5e:16x16 --model gpt2 --layout data fsdp

A TPU needs ``pip install "jax[tpu]"`` (libtpu); a GPU the packages ``jax-cuda13-plugin`` and
``jax-cuda13-pjrt`` of JAX's version (with ``--no-deps``) and ``nvidia-cuda-nvcc``. Neither needs
the device, nor its driver. A whole ``Trainer.fit`` is traced, not run, up to the compiled step: a
model of any size takes no memory. What comes out are facts of the program that XLA would run there;
time is not measured.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any
from unittest import mock

os.environ["KERAS_BACKEND"] = "jax"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # there is no device to share
# Without a GPU no kernel can be tried out; JAX recommends the scheduler, which is not the default.
os.environ.setdefault(
    "XLA_FLAGS", "--xla_gpu_autotune_level=0 --xla_gpu_enable_latency_hiding_scheduler=true"
)

import jax
import keras
import numpy as np
from hlo import Program
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding
from keras import layers
from workloads import GptSize, convnet, gpt, loss, mlp

import kbtrain.backends.jax as backend
from kbtrain import Trainer, TrainingArguments
from kbtrain.backends.jax import compile as compiling
from kbtrain.backends.jax import mesh
from kbtrain.utils import rng
from kbtrain.utils.keras_private import set_layout

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def devices_of(machine: str) -> list[Any]:
    """The devices of a machine.

    Args:
        machine: ``"v5e:2x4"`` (chips in a grid) or ``"h100:64"`` (eight in each host).
    """
    name, _, size = machine.partition(":")
    if name == "h100":
        hosts = max(1, int(size) // 8)
        shape = f"{hosts}x1x{int(size) // hosts}"
        topology = topologies.get_topology_desc(
            platform="cuda", topology_name=machine, target_config=H100, topology=shape
        )
    elif size == "1":  # a host of these has four chips at least, unless told otherwise
        topology = topologies.get_topology_desc(
            platform="tpu",
            topology_name=f"{name}:1x1",
            chips_per_host_bounds=(1, 1, 1),
            num_slices=1,
        )
    else:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=machine)
    return list(topology.devices)


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


class _Compiled(Exception):
    """Ends a run where its step has been compiled."""


def compile_step(fit: Callable[[], Any], devices: list[Any]) -> Any:
    """Compile the first step of a run for devices that are not here.

    Args:
        fit: Makes a model and trains it with ``devices`` named ``"tpu:0"`` and so on.
        devices: What the run finds under these names.

    Returns:
        The compiled step.
    """
    found: list[Any] = []
    with _pretending(devices, found.append), contextlib.suppress(_Compiled):
        jax.eval_shape(fit)
    return found[0]


@contextlib.contextmanager
def _pretending(devices: list[Any], keep: Callable[[Any], None]) -> Iterator[None]:
    seed_variable, device_put = rng.global_seed_variable, jax.device_put

    def seed_variable_outside() -> keras.Variable:
        with jax.ensure_compile_time_eval():
            return seed_variable()

    def shapes_put(x: Any, layout: Any = None, **kwargs: Any) -> Any:
        if isinstance(x, np.ndarray) and isinstance(layout, NamedSharding):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout)
        return device_put(x, layout, **kwargs)

    def compile_for(jitted: Any, *arguments: Any) -> None:
        alone = SingleDeviceSharding(devices[0]) if len(devices) == 1 else None

        def shape(x: Any) -> Any:
            own = x.sharding if isinstance(x, jax.ShapeDtypeStruct) else alone
            return jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=own)

        keep(jitted.lower(*jax.tree.map(shape, arguments)).compile())
        raise _Compiled

    replaced: dict[Any, dict[str, Any]] = {
        backend: {"devices": lambda: [f"tpu:{i}" for i in range(len(devices))]},
        compiling: {"_compile": compile_for},
        jax: {"device_put": shapes_put},
        mesh: {"_find": lambda name, rank: devices[int(name.partition(":")[2])]},
        rng: {"global_seed_variable": seed_variable_outside},
    }
    with contextlib.ExitStack() as stack:
        for module, names in replaced.items():
            stack.enter_context(mock.patch.multiple(module, **names))
        tracing = importlib.import_module("kbtrain.backends.jax.trace")  # the function has its name
        for module in (tracing, backend):
            stack.enter_context(mock.patch.object(module, "on_cpu", return_value=False))
        # Everything is nowhere until the step is compiled.
        stack.enter_context(mock.patch.object(mesh.RunMesh, "is_local", True))
        here = mock.patch.object(mesh, "local_devices", return_value=jax.local_devices())
        stack.enter_context(here)
        stack.enter_context(mock.patch.object(backend, "place", _lay_out))
        yield


def _lay_out(variables: Sequence[keras.Variable], device: str | None) -> None:
    """Give variables their layouts; nothing is moved."""
    run = mesh.current()
    if run is None or run.layout is None:
        return
    for variable, axes in zip(variables, run.layout.axes_of(variables), strict=True):
        if any(axes):
            set_layout(variable, NamedSharding(run.mesh, PartitionSpec(*axes)))


def compiled(
    case: Case, devices: list[Any], layout: str = "data", accumulation: int = 1, **arguments: Any
) -> Any:
    """The compiled train step of a case."""
    count = len(devices)
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16" if case.bf16 else "float32")

    def fit() -> None:
        chosen: dict[str, Any] = {"devices": [f"tpu:{i}" for i in range(count)]}
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
            return compile_step(fit, devices)
    finally:
        keras.config.set_dtype_policy(policy)


def facts(step: Any, devices: int) -> dict[str, Any]:
    """What is known of a compiled step: bytes per device, and its collectives."""
    memory = step.memory_analysis()
    program = Program(step.as_text(), devices)
    return {
        "arguments": memory.argument_size_in_bytes,
        "results": memory.output_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "donated": program.donated(),
        "host_transfers": program.host_transfers(),
        "collectives": [asdict(each) | {"sent": each.sent} for each in program.collectives()],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--machine", nargs="+", default=["v5e:2x4"])
    parser.add_argument("--model", nargs="+", default=["gpt"], choices=CASES)
    parser.add_argument("--layout", nargs="+", default=["data"])
    parser.add_argument("--accumulation", nargs="+", type=int, default=[1])
    parser.add_argument("--rows", type=int, help="other samples per device")
    parser.add_argument("--json", help="append a line for each program to this file")
    parser.add_argument("--text", help="write the text of the last program to this file")
    options = parser.parse_args()
    for machine in options.machine:
        devices = devices_of(machine)
        for model in options.model:
            for layout in options.layout:
                for accumulation in options.accumulation:
                    what = {"machine": machine, "model": model, "layout": layout}
                    what["accumulation"] = accumulation
                    started = time.process_time()
                    try:
                        step = compiled(CASES[model], devices, layout, accumulation)
                    except jax.errors.JaxRuntimeError as error:
                        result = what | {"error": str(error)[:2000]}
                    else:
                        result = what | facts(step, len(devices))
                        if options.text:
                            with open(options.text, "w", encoding="utf-8") as file:
                                file.write(step.as_text())
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
