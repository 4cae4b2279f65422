"""Kernels and bytes of one update of each optimizer of ``optim`` on a GPU with PyTorch, counted.

    python benchmarks/optimizer_counts.py
    python benchmarks/optimizer_counts.py lamb soap --layers 12 --dtype bfloat16

No GPU is needed and none is used: an update runs on CPU tensors, on the path that it takes on a
GPU. What is counted of each operation are kernels (PyTorch's kernels over lists of tensors launch
one for every 320 pieces of 65,536 elements or for as many tensors as their arguments hold) and the
bytes of its arguments and results, which is what has to move if nothing stays in a cache between
two kernels. A rule's own kernels (``optim::run_rules``) are counted and not run. Columns: kernels,
with the three that count the update; bytes a parameter; operations with the most kernels.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import optim
from optim.kernels.torch import (
    adafactor,
    custom_op,
    eight_bit,
    elementwise,
    rule_groups,
)
from optim.kernels.torch.triton_kernels import launch as triton_launch

aten = torch.ops.aten

PER_LAUNCH = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
"""Tensors that one launch of a kernel over lists takes, by the number of lists: their addresses are
its arguments, which may have 4 KiB (PyTorch's MultiTensorApply.cuh)."""
_NOTHING = (
    "empty",
    "detach",
    "alias",
    "lift_fresh",
    "unbind",
    "split",
    "expand",
    "_unsafe_view",
    "_reshape",
)
_INSIDE = {
    "run_program": elementwise._run,
    "run_eight_bit": eight_bit._run,
    "run_adafactor": adafactor._run,
}


class Kernel:
    """Takes the place of Triton's kernels.

    Attributes:
        launched: How many were launched, all together.
    """

    launched = 0

    def __getitem__(self, grid: Any) -> Any:
        Kernel.launched += 1
        return lambda *args, **constants: None


def _no_check(*args: Any) -> None:
    """In place of a mock, which would keep its arguments alive."""


@contextlib.contextmanager
def pretended_gpu() -> Iterator[None]:
    """Inside, updates take the path of a GPU; kernels made of rules are counted, and do nothing."""
    kernels = dict.fromkeys(("prepare", "sums", "totals", "update", "fill"), Kernel())
    with (
        mock.patch.object(custom_op, "on_gpu", return_value=True),
        mock.patch.object(triton_launch, "compiled", return_value=kernels),
        mock.patch.object(rule_groups, "is_available", return_value=True),
        mock.patch.object(rule_groups, "check", _no_check),
    ):
        yield


class Counter(TorchDispatchMode):  # type: ignore[misc]
    """Counts kernels and bytes of the operations inside.

    Attributes:
        kernels: By the name of the operation.
        bytes: That are read and written.
        waits: Reads of a value by the host.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: collections.Counter[str] = collections.Counter()
        self.bytes = self.waits = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        if name in _INSIDE:
            inside: Any = _INSIDE[name]
            with self:
                return inside(*args, **kwargs)
        launched = Kernel.launched
        result = func(*args, **kwargs)
        if name == "run_rules":
            self.kernels[name] += Kernel.launched - launched
            self.bytes += triton_launch.bytes_of(args[0], args[5])
        elif name in ("_local_scalar_dense", "is_nonzero"):
            self.waits += 1
        elif not _is_view(func) and not name.startswith(_NOTHING):
            self.kernels[name] += _launches(name, args)
            self.bytes += _bytes(func, args, kwargs, result)
        return result


def _is_view(func: Any) -> bool:
    aliases = [a.alias_info for a in func._schema.arguments if a.alias_info is not None]
    return any(not alias.is_write for alias in aliases)


def _launches(name: str, args: Sequence[Any]) -> int:
    lists = [a for a in args if isinstance(a, list) and a and torch.is_tensor(a[0])]
    if not name.startswith(("_foreach", "_fused")) or not lists:
        return 1
    pieces = sum(math.ceil(t.numel() / 65536) for t in lists[0])
    depth = min(max(len(lists) - name.startswith("_fused_ada"), 1), 5)  # the steps are no list
    return int(max(math.ceil(pieces / 320), math.ceil(len(lists[0]) / PER_LAUNCH[depth])))


def _bytes(func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> int:
    written = [
        args[i] if i < len(args) else kwargs.get(a.name)
        for i, a in enumerate(func._schema.arguments)
        if a.alias_info is not None and a.alias_info.is_write
    ]
    moved = [args, {k: v for k, v in kwargs.items() if k != "out"}, result]
    moved += [] if "out" in kwargs else written
    tensors = [t for t in tree_leaves(moved) if torch.is_tensor(t)]
    return int(sum(t.numel() * t.element_size() for t in tensors))


SHAPES = [(256, 512), (512,), (512, 512), (512,), (512, 1024), (1024,), (1024, 512), (512,)]


def counted(name: str, layers: int = 1, dtype: str = "float32") -> tuple[Counter, int]:
    """The second update of an optimizer.

    Args:
        name: As for `optim.get`.
        layers: How often the shapes are repeated.
        dtype: Of the parameters and the gradients.

    Returns:
        What was counted, and the number of parameters.
    """
    draw = np.random.default_rng(0)
    shapes = SHAPES * layers
    with pretended_gpu(), torch.no_grad():
        optimizer = optim.get(name, learning_rate=1e-3)
        names = [f"{'kernel' if s[1:] else 'bias'}_{i}" for i, s in enumerate(shapes)]
        variables = [
            keras.Variable(draw.normal(size=shape), dtype=dtype, name=own)
            for own, shape in zip(names, shapes, strict=True)
        ]
        gradients = [torch.randn(s).to(getattr(torch, dtype)) for s in shapes]
        optimizer.exclude_from_weight_decay(var_names=["bias"])
        optimizer.build(variables)
        optimizer.apply(list(gradients), variables)
        with Counter() as counter:
            optimizer.apply(list(gradients), variables)
    return counter, sum(math.prod(s) for s in shapes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=NAMES)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    for name in arguments.names:
        counter, parameters = counted(name, arguments.layers, arguments.dtype)
        most = ", ".join(f"{op} {n}" for op, n in counter.kernels.most_common(4))
        numbers = f"{counter.kernels.total():5d} kernels {counter.bytes / parameters:7.1f} B"
        print(f"{name:20s} {numbers}/parameter  reads by the host {counter.waits}  ({most})")


NAMES = [
    name
    for name in optim.names()
    if not name.startswith(("adamw_torch", "adamw_bnb", "rmsprop_bnb", "lion_32bit"))
]

if __name__ == "__main__":
    main()
