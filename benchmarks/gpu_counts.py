"""What a train step asks of a GPU on PyTorch: kernels and bytes, counted from the record, no GPU.

    python benchmarks/gpu_counts.py                      # three models and all optimizers
    python benchmarks/gpu_counts.py mlp resnet50 --operations
    python benchmarks/gpu_counts.py optimizers

A step is recorded on a CPU, in the form that it has on a GPU, and nothing of it is executed; the
parameters are zeros that no memory is needed for. Of each operation the kernels that CUDA launches
are counted, and the bytes of its arguments and results: what has to move if nothing stays in a
cache between two kernels. Both are lower bounds: cuBLAS may split a product, cuDNN may turn a
layout. Nothing here was run on a GPU, and no time follows from it.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import numpy as np
import torch
import workloads
from optimizer_counts import NAMES, PER_LAUNCH, counted, pretended_gpu
from torch.fx import Graph, Node

from kbtrain import Trainer, TrainingArguments
from kbtrain.backends import torch as backend
from kbtrain.backends.torch import fusion, runner
from kbtrain.backends.torch.capture import codegen, program, random, step, trace
from kbtrain.backends.torch.capture.aliasing import aliases
from kbtrain.backends.torch.fusion import lists, norm_kernel, scalar_kernel
from optim.kernels.torch.triton_kernels import launch as triton_launch

aten = torch.ops.aten

FORWARD_BACKWARD = "forward, backward"
TAIL = "clipping, checks"
OPTIMIZER = "optimizer"
METRICS = "state, metrics, results"
PARTS = (FORWARD_BACKWARD, TAIL, OPTIMIZER, METRICS)


@dataclass
class Count:
    """Kernels and bytes.

    Attributes:
        kernels: Number of kernels.
        bytes: Bytes that they read and write.
        operations: Kernels and bytes of each operation.
    """

    kernels: int = 0
    bytes: int = 0
    operations: dict[str, list[int]] = field(default_factory=dict)

    def add(self, name: str, kernels: int, moved: int) -> None:
        self.kernels += kernels
        self.bytes += moved
        row = self.operations.setdefault(name, [0, 0])
        row[0] += kernels
        row[1] += moved


# --- kernels of an operation ----------------------------------------------------------------------

_NO_KERNEL = {aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default}
_BLOCKS, _CHUNK = 320, 1 << 16
"""Blocks of one launch, and elements of a block."""


def tensors_in(value: Any) -> list[torch.Tensor]:
    """The (fake) tensors that a structure of nodes stands for."""
    found: list[torch.Tensor] = []
    torch.fx.map_arg(value, lambda node: found.extend(_leaves(node.meta.get("val"))))
    return found


def _leaves(value: Any) -> list[torch.Tensor]:
    if isinstance(value, list | tuple):
        return [t for item in value for t in _leaves(item)]
    return [value] if isinstance(value, torch.Tensor) else []


def launches_over_lists(sizes: Sequence[int], lists: int) -> int:
    """How often CUDA launches a foreach kernel for tensors of these sizes."""
    launches = tensors = blocks = 0
    for position, size in enumerate(sizes):
        if not size:
            continue
        tensors += 1
        chunks = math.ceil(size / _CHUNK)
        for chunk in range(chunks):
            blocks += 1
            last = chunk == chunks - 1
            full = tensors == PER_LAUNCH[lists] and last or blocks == _BLOCKS
            if full or (last and not any(sizes[position + 1 :])):
                launches += 1
                blocks, tensors = 0, 0 if last else 1
    return launches


def _sizes(tensors: Any) -> list[int]:
    return [tensor.numel() for tensor in tensors_in(tensors)]


def kernels_of(node: Node) -> int:
    """The kernels that an operation launches, at the least."""
    name = str(node.target)
    if node.target in _NO_KERNEL or lists.is_free(node):
        return 0
    if node.target in (lists._cast, lists._zeros):
        return launches_over_lists(_sizes(node.args[0]), 1 + (node.target is lists._cast))
    if node.target is lists._selected:  # two concatenations of up to 128 tensors, a choice
        return 2 * math.ceil(len(node.args[1]) / 128) + 1
    if node.target is torch.ops.optim.run_rules.default:
        return triton_launch.launches(node.args[5])
    if isinstance(node.target, norm_kernel.GlobalNorm):
        return node.target.launches
    if "_fused_" in name and isinstance(node.args[0], list | tuple):
        given = [each for each in node.args if isinstance(each, list | tuple) and each]
        counted = len(given) - ("_fused_ada" in name)  # but the counts of updates
        return launches_over_lists(_sizes(given[0]), counted)
    if "_foreach_" in name:
        given = [each for each in node.args if isinstance(each, list | tuple) and tensors_in(each)]
        into_new = not aliases(node, True) and "_foreach_norm" not in name
        # A norm has a sum for each part of a tensor, then one for each tensor.
        return launches_over_lists(_sizes(given[0]), len(given) + into_new) + (
            "_foreach_norm" in name
        )
    if node.target is aten.convolution_backward.default:
        return sum(map(bool, node.args[-1]))
    return 1


def bytes_of(node: Node) -> int:
    """The bytes that an operation reads and writes."""
    if node.target is torch.ops.optim.run_rules.default:
        return triton_launch.bytes_of(tensors_in(node.args[0]), node.args[5])
    given = tensors_in((node.args, node.kwargs))
    written = [t for n in aliases(node, True) for t in tensors_in(n)]
    moved = [*given, *(written or _leaves(node.meta.get("val")))]
    return sum(t.numel() * t.element_size() for t in moved)


# --- recording ------------------------------------------------------------------------------------


class _Recorded(BaseException):
    """The step has been recorded; the run is over."""


@contextlib.contextmanager
def pretending() -> Iterator[None]:
    """On a CPU, the step of a GPU, except for the kernels of ``optim``."""
    with (
        mock.patch.object(fusion, "KIND", "cpu"),
        mock.patch.object(scalar_kernel, "is_available", return_value=True),
        mock.patch.object(random, "_on_gpu", return_value=True),
        mock.patch.object(backend, "_on_cpu", return_value=False),
    ):
        yield


@contextlib.contextmanager
def without_memory() -> Iterator[None]:
    """New parameters are zeros, which take no memory until they are written."""

    def zeros(self: Any, shape: Any, dtype: Any = None, **kwargs: Any) -> Any:
        return torch.zeros(tuple(shape), dtype=getattr(torch, dtype or keras.config.floatx()))

    initializers = (keras.initializers.GlorotUniform, keras.initializers.RandomUniform)
    with contextlib.ExitStack() as stack:
        for each in initializers:
            stack.enter_context(mock.patch.object(each, "__call__", zeros))
        yield


class _Parts:
    """Notes which part of the step each operation belongs to, while it is recorded."""

    def __init__(self) -> None:
        self.current = METRICS
        self.nodes: list[Node] = []

    def inside(self, function: Callable[..., Any], part: str, after: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.current = part
            try:
                return function(*args, **kwargs)
            finally:
                self.current = after

        return call

    @contextlib.contextmanager
    def noted(self, with_loop: bool) -> Iterator[None]:
        record, source, create = trace.record, codegen.FunctionSource, Graph.create_node
        emit = source.operation
        writers: dict[Any, list[Node]] = {}
        for_shape = runner.Runner.for_shape
        recording = False

        def noting(*args: Any) -> Any:
            nonlocal recording
            recording = True
            try:
                return record(*args)
            finally:
                recording = False

        def stamped(graph: Graph, *args: Any, **kwargs: Any) -> Node:
            node = create(graph, *args, **kwargs)
            if recording:
                node.meta["part"] = self.current
            elif node.target is aten.copy_.default:  # an assignment that was put off
                node.meta["part"] = METRICS
            return node

        def operation(writer: Any, node: Node) -> None:
            writers.setdefault(writer, []).append(node)
            emit(writer, node)

        make = program.make_program

        def recording_only(self: Any, inputs: Any) -> Any:
            captured = for_shape(self, inputs)
            if with_loop and captured.outputs is None:
                return captured  # runs the body of its loop, which is recorded by itself
            raise RuntimeError("The step could not be recorded, see the log.")

        def made(*args: Any) -> Any:
            make(*args)
            self.nodes = list(writers.values())[-1]  # the one of the whole step
            raise _Recorded

        with (
            mock.patch.object(step, "record", noting),
            mock.patch.object(runner.Runner, "for_shape", recording_only),
            mock.patch.object(Graph, "create_node", stamped),
            mock.patch.object(source, "operation", operation),
            mock.patch.object(step, "make_program", made),
            mock.patch.object(
                backend,
                "value_and_grad",
                self.inside(backend.value_and_grad, FORWARD_BACKWARD, TAIL),
            ),
            mock.patch.object(
                backend,
                "apply_optimizer",
                self.inside(backend.apply_optimizer, OPTIMIZER, METRICS),
            ),
        ):
            yield


def recorded_nodes(
    make: Callable[[], keras.Model], rows: Any, labels: Any, **arguments: Any
) -> list[Node]:
    """The operations of the train step of a model, in the order in which they run.

    With accumulation, those of a micro-batch.
    """
    with_loop = arguments.get("gradient_accumulation_steps", 1) > 1
    parts = _Parts()
    with (
        tempfile.TemporaryDirectory() as folder,
        pretending(),
        without_memory(),
        pretended_gpu(),
        parts.noted(with_loop),
    ):
        settings: dict[str, Any] = {
            "per_device_train_batch_size": len(rows),
            "max_steps": 3,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "weight_decay": 0.01,
            "use_cpu": True,
        }
        chosen = TrainingArguments(output_dir=folder, **(settings | arguments))
        trainer = Trainer(make(), chosen, train_dataset=(rows, labels), loss=workloads.loss())
        with contextlib.suppress(_Recorded):
            trainer.fit()
    return parts.nodes


def count(nodes: Sequence[Node]) -> dict[str, Count]:
    """Kernels and bytes of each part."""
    counts = {part: Count() for part in PARTS}
    for node in nodes:
        kernels = kernels_of(node)
        if kernels:
            name = getattr(node.target, "__name__", "") or str(node.target)
            default = TAIL if isinstance(node.target, scalar_kernel.Scalars) else FORWARD_BACKWARD
            counts[node.meta.get("part", default)].add(name, kernels, bytes_of(node))
    return counts


def resnet50() -> keras.Model:
    return keras.applications.ResNet50(weights=None, classes=1000, classifier_activation=None)


MODELS: dict[str, tuple[str, Callable[[], keras.Model], str, tuple[Any, Any]]] = {
    "mlp": (
        "MLP, 32 rows",
        workloads.mlp,
        "float32",
        (np.zeros((32, 16), "float32"), np.zeros(32, "int32")),
    ),
    "gpt124m": (
        "GPT-2 124M, bf16, 8 x 1024",
        lambda: workloads.gpt(workloads.MILLIONS_124),
        "mixed_bfloat16",
        (np.zeros((8, 1024), "int32"), np.zeros((8, 1024), "int32")),
    ),
    "resnet50": (
        "ResNet-50, bf16, 64 x 224 x 224",
        resnet50,
        "mixed_bfloat16",
        (np.zeros((64, 224, 224, 3), "float32"), np.zeros(64, "int32")),
    ),
}
"""Title, model, policy of dtypes, and a batch."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=[*MODELS, "optimizers"], metavar="MODEL")
    parser.add_argument("--operations", action="store_true", help="each kind of operation, too")
    options = parser.parse_args()
    print(f"counted, not run on a GPU; torch {torch.__version__}, keras {keras.__version__}")
    print(f"{'model':32} {'part':24} {'kernels':>8} {'GB':>9}")
    for name in options.models:
        if name == "optimizers":
            _print_optimizers()
            continue
        title, make, policy, data = MODELS[name]
        before = keras.config.dtype_policy()
        keras.config.set_dtype_policy(policy)
        try:
            counts = count(recorded_nodes(make, *data))
        finally:
            keras.config.set_dtype_policy(before)
        for part, found in counts.items():
            print(f"{title:32} {part:24} {found.kernels:8} {found.bytes / 1e9:9.3f}")
            if options.operations:
                rows = sorted(found.operations.items(), key=lambda row: -row[1][1])
                for operation, (kernels, moved) in rows:
                    print(f"{'':34} {operation:52} {kernels:6} {moved / 1e9:10.4f}")
        total = sum(c.kernels for c in counts.values()), sum(c.bytes for c in counts.values())
        print(f"{title:32} {'all':24} {total[0]:8} {total[1] / 1e9:9.3f}", flush=True)


def _print_optimizers() -> None:
    """One update of eight tensors and one of 48; ``optimizer_counts.py`` has the operations."""
    print(f"{'optimizer':32} {'kernels':>8} {'of 48':>8} {'bytes/parameter':>16}")
    for name in NAMES:
        (few, parameters), (many, _) = counted(name), counted(name, 6)
        kernels = few.kernels.total(), many.kernels.total()
        print(f"{name:32} {kernels[0]:8} {kernels[1]:8} {few.bytes / parameters:16.1f}", flush=True)


if __name__ == "__main__":
    main()
