"""Steps as they are on a GPU, on a CPU with PyTorch: `python helpers_fusion.py WHAT FOLDER`.

``steps`` counts kernels, compares runs with those of the plain step, and compiles a step's kernel
for two GPUs; ``numbers`` computes operations on scalars by Triton's interpreter
(TRITON_INTERPRET=1). Prints one JSON object.
"""

import itertools
import json
import math
import sys
from unittest import mock

import keras
import numpy as np
from helpers import make_data, train_logs, weights, with_weights
from keras import layers
from paths import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_counts
import torch
import workloads
from torch.fx import Graph

from kbtrain import Trainer, TrainingArguments
from kbtrain.backends.torch.capture import random
from kbtrain.backends.torch.fusion import norm_kernel, random_kernel, scalar_kernel
from kbtrain.backends.torch.fusion.norm_kernel import GlobalNorm
from kbtrain.backends.torch.fusion.scalar_kernel import Scalars, is_supported

WHAT, FOLDER = sys.argv[1:]
aten = torch.ops.aten
MLP = gpu_counts.MODELS["mlp"][3]


# --- kernels of a step ----------------------------------------------------------------------------


def normalized(depth):
    """A network of so many normalized layers."""
    inputs = keras.Input((8, 8, 4))
    h = inputs
    for _ in range(depth):
        h = layers.BatchNormalization()(layers.Conv2D(4, 3, padding="same")(h))
    return keras.Model(inputs, layers.Dense(4)(layers.GlobalAveragePooling2D()(h)))


def deep():
    """A network of 148 tensors."""
    h = inputs = keras.Input((16,))
    for _ in range(74):
        h = layers.Dense(2)(h)
    return keras.Model(inputs, h)


def kernels(make, data, **arguments):
    counts = gpu_counts.count(gpu_counts.recorded_nodes(make, *data, **arguments))
    return {part: found.kernels for part, found in counts.items()}


def counts():
    images = np.zeros((4, 8, 8, 4), "float32"), np.zeros(4, "int32")
    return {
        "mlp": kernels(workloads.mlp, MLP),
        "deep": kernels(deep, MLP),
        "cosine": kernels(workloads.mlp, MLP, lr_scheduler_type="cosine", warmup_steps=1),
        "accumulated": kernels(
            workloads.mlp, MLP, gradient_accumulation_steps=2, per_device_train_batch_size=16
        ),
        "normalized": [kernels(lambda n=n: normalized(n), images, bf16=True) for n in (2, 5)],
    }


# --- numbers of a run -----------------------------------------------------------------------------


def model():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((3,))
    h = layers.BatchNormalization()(layers.Dense(6, activation="tanh")(inputs))
    h = layers.BatchNormalization(momentum=0.9)(layers.Dense(5, activation="tanh")(h))
    return with_weights(keras.Model(inputs, layers.Dense(1)(layers.Dropout(0.3, seed=1)(h))))


def train(name, data=None, **settings):
    chosen = {
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "learning_rate": 0.01,
        "weight_decay": 0.1,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 3,
        "max_grad_norm": 0.5,
        "logging_steps": 1,
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    arguments = TrainingArguments(output_dir=f"{FOLDER}/{name}", **(chosen | settings))
    data = make_data(24) if data is None else data
    trainer = Trainer(model(), arguments, train_dataset=data, loss="mse", metrics=["mae"])
    trainer.fit()
    logs = [train_logs(trainer, key) for key in ("loss", "grad_norm", "learning_rate", "mae")]
    state = [variable.numpy() for variable in trainer.optimizer.variables]
    return [np.asarray(x, "float64") for x in (*weights(trainer.model), *state, *logs)]


def distance(name, **settings):
    """How far a run with the fused step is from one with the plain step."""
    found = []
    for applies in (True, False):
        plain = (lambda tensors: False, gpu_counts.fusion.applies_to)[applies]
        with (
            gpu_counts.pretending(),
            mock.patch.object(gpu_counts.fusion, "applies_to", plain),
            # Without Triton, its operations one by one.
            mock.patch.object(Scalars, "_launch", lambda self, *inputs: self._run.plain(*inputs)),
            mock.patch.object(GlobalNorm, "_launch", GlobalNorm._plain),
        ):
            found.append(train(f"{name} {applies}", **settings))
    return max(float(np.nanmax(np.abs(a - b))) for a, b in zip(*found, strict=True))


def with_nan():
    x, y = make_data(24)
    x[9] = np.nan
    return x, y


def steps():
    return {
        "counts": counts(),
        "plain": distance("plain"),
        "accumulation": distance("accumulation", gradient_accumulation_steps=2),
        "not finite": distance("not finite", data=with_nan(), on_nonfinite="skip"),
        "compiled": machine_code(),
    }


# --- operations by Triton -------------------------------------------------------------------------

VALUES = [
    *(torch.tensor(x) for x in (0.0, -0.5, 2.5, 1.0, math.nan, math.inf, -3.0)),
    *(torch.tensor(x, dtype=torch.int32) for x in (0, 5, -7)),
    *(torch.tensor(x) for x in (True, False)),
    *(torch.tensor(x, dtype=torch.float64) for x in (1 / 3, -2.0)),
]
OF_ONE = ("neg", "abs", "reciprocal", "sqrt", "exp", "log", "cos", "sin", "floor", "ceil",
          "logical_not")  # fmt: skip
OF_TWO = (*("add", "sub", "mul", "div", "eq", "ne", "lt", "le", "gt", "ge", "remainder"),
          *("maximum", "minimum", "logical_and", "logical_or"))  # fmt: skip
WITH_A_NUMBER = (
    *(("mul.Tensor", 3), ("add.Tensor", 0.1), ("rsub.Scalar", 3), ("eq.Scalar", 0)),
    *(("pow.Tensor_Scalar", 3), ("div.Tensor", 3), ("remainder.Scalar", 4)),
)


def operation(name):
    packet, _, overload = name.partition(".")
    found = getattr(aten, packet)
    return getattr(found, overload or ("Tensor" if "Tensor" in found.overloads() else "default"))


def calls():
    """Operations with indices of their operands, or numbers."""
    places = range(len(VALUES))
    for name in OF_ONE:
        yield from ((name, operation(name), (i,)) for i in places)
    for name in (*OF_TWO, "pow.Tensor_Tensor"):
        yield from ((name, operation(name), pair) for pair in itertools.product(places, places))
    for name, number in WITH_A_NUMBER:
        yield from ((name, operation(name), (i, float(number))) for i in places)


def numbers():
    """The largest relative error of each operation, and how many operands were tried."""
    graph = Graph()
    inputs = []
    for value in VALUES:
        inputs.append(graph.placeholder(f"x{len(inputs)}"))
        inputs[-1].meta["val"] = value
    nodes, names = [], []
    for name, target, operands in calls():
        given = [x if isinstance(x, float) else VALUES[x] for x in operands]
        try:
            expected = target(*given)
        except (RuntimeError, NotImplementedError):  # not of these dtypes
            continue
        node = graph.call_function(
            target, tuple(x if isinstance(x, float) else inputs[x] for x in operands)
        )
        node.meta["val"] = expected
        if is_supported(node):
            nodes.append(node)
            names.append(name)
    graph.output(tuple(nodes))
    errors = {}
    for start in range(0, len(nodes), 64):
        part = nodes[start : start + 64]
        found = Scalars(part, inputs, part, [], {})._launch(*VALUES)
        for name, node, value in zip(names[start:], part, found, strict=False):
            expected = node.meta["val"]
            assert value.dtype is expected.dtype
            x, y = value.double().item(), expected.double().item()
            same = x == y or (math.isnan(x) and math.isnan(y))
            error = 0.0 if same else abs(x - y) / abs(y) if y else math.inf
            tried, worst = errors.get(name, (0, 0.0))
            errors[name] = tried + 1, max(worst, error)
    return errors


def random_numbers():
    """How far numbers of the kernel are from those of PyTorch's operations, for two seeds."""
    errors = {}
    p = torch.linspace(-0.1, 1.1, 700)
    for pair in ([5, 8], [-7, 2**31 - 1]):
        seed = torch.tensor(pair)
        for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
            both = (
                random._rand(seed, [3, 701], dtype),
                random_kernel.rand(seed, [3, 701], dtype, random._FRACTION[dtype]),
            )
            errors.setdefault("uniform", []).append(both)
        for kind, *arguments in (
            ("normal", 0.5, 2.0, [1500], torch.float32),
            ("randint", -3, 1000, [1500], torch.int32),
            ("randint", -(2**31), 2**31 - 1, [1500], torch.int32),
            ("randint", -(2**31), 1, [9], torch.int64),
            ("bernoulli", p),
            ("bernoulli", p.bfloat16()),
        ):
            plain = getattr(random, f"_{kind}")
            kernel = random.checked(getattr(random_kernel, kind), plain)
            both = plain(seed, *arguments), kernel(seed, *arguments)
            errors.setdefault(kind, []).append(both)
    assert all(x.dtype is y.dtype for pairs in errors.values() for x, y in pairs)
    return {
        kind: max(float((x.double() - y.double()).abs().max()) for x, y in pairs)
        for kind, pairs in errors.items()
    }


def wrong_kernels():
    """What is said of kernels that give wrong numbers, and what is computed all the same."""
    graph = Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    for node in (x, y):
        node.meta["val"] = torch.tensor(2.0)
    total = graph.call_function(aten.add.Tensor, (x, y))
    assigned = graph.call_function(aten.copy_.default, (y, total))
    total.meta["val"] = assigned.meta["val"] = torch.tensor(4.0)
    scalars = Scalars([total, assigned], [x, y], [total], [y], {})
    scalars.text = scalars.text.replace("a0 + a1", "a0 - a1")
    messages = []
    with mock.patch(
        "kbtrain.utils.fallback.logger.warning", lambda *a: messages.append(a[0] % a[1:])
    ):
        value, seed = torch.tensor(5.0), torch.tensor([1, 2])
        (result,) = scalars(torch.tensor(3.0), value)
        shifted = random.checked(lambda *a: random._normal(*a) + 0.01, random._normal)
        try:
            shifted(seed, 0.0, 1.0, [5], torch.float32)
        except RuntimeError as error:
            messages.append(str(error))
    return [float(result), float(value), *messages]


def norms():
    """Of norms by Triton: the largest relative error, and what is odd about others."""
    draw = np.random.default_rng(0)
    sizes = [(0,), (3,), (20_001,), (), (2, 3, 4), (16_384,), (1,), (0, 2)]
    lists = {"float32": [torch.from_numpy(draw.normal(size=n).astype("f")) for n in sizes]}
    lists["bfloat16"] = [x.bfloat16() for x in lists["float32"]]
    lists["mixed"] = [x if i % 2 else x.half() for i, x in enumerate(lists["float32"])]
    lists["float64"] = [x.double() for x in lists["float32"][:3]] + lists["bfloat16"][:3]
    memory = torch.from_numpy(draw.normal(size=(460, 9)).astype("f"))
    lists["many, unaligned, with gaps"] = [x[1 : 1 + i % 9] for i, x in enumerate(memory)]
    lists["gaps"] = [memory[:, ::2], memory.t(), memory[::3]]
    errors, odd = {}, {}
    for name, tensors in lists.items():
        wide = torch.float64 if any(x.dtype is torch.float64 for x in tensors) else torch.float32
        found = GlobalNorm(tensors, wide)._launch(tensors)
        expected = math.sqrt(sum(np.square(x.double().numpy()).sum() for x in tensors))
        assert found.dtype is wide
        assert found.shape == ()
        errors[name] = abs(float(found) - expected) / expected
    for name, value in (("nan", math.nan), ("inf", math.inf), ("too large", 1e30)):
        tensors = [torch.ones(3), torch.tensor([1.0, value]), torch.ones(20_000)]
        odd[name] = repr(float(GlobalNorm(tensors, torch.float32)._launch(tensors)))
    empty = [torch.ones(0)]
    odd["launches for 460 tensors"] = GlobalNorm(
        lists["many, unaligned, with gaps"], torch.float32
    ).launches
    odd["empty"] = repr(float(GlobalNorm(empty, torch.float32)._launch(empty)))
    messages = []
    wrong = GlobalNorm([torch.ones(4)], torch.float32)
    with (
        mock.patch.object(norm_kernel, "_TOTAL", norm_kernel._TOTAL.replace("ROOT", "0.0 + ")),
        mock.patch(
            "kbtrain.utils.fallback.logger.warning", lambda *a: messages.append(a[0] % a[1:])
        ),
    ):
        values = [float(wrong([torch.ones(4)])), float(wrong([torch.ones(4)]))]
    return errors, odd, [*values, *messages]


def machine_code():
    """Bytes of a step's kernels, compiled, and of one that draws random numbers."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {torch.float32: "*fp32", torch.int32: "*i32", torch.bool: "*i1"}
    sizes = {}
    for schedule in ("polynomial", "cosine"):
        nodes = gpu_counts.recorded_nodes(
            workloads.mlp, *MLP, lr_scheduler_type=schedule, warmup_steps=1
        )
        (node,) = (node for node in nodes if isinstance(node.target, Scalars))
        kernel = scalar_kernel.compiled(node.target.text)
        given = [*(source.meta["val"] for source in node.args), *node.meta["val"]]
        signature = dict(zip(kernel.arg_names, (types[t.dtype] for t in given), strict=True))
        for arch in (80, 90):
            code = triton.compile(
                ASTSource(kernel, signature, {}),
                target=GPUTarget("cuda", arch, 32),
                options={"num_warps": 1, "enable_fp_fusion": False},
            )
            sizes[f"{schedule}, sm_{arch}"] = len(code.asm["cubin"])
    kinds = list(norm_kernel._TYPES)[:3]
    for arch in (80, 90):
        for name, text, given in (
            ("fill", norm_kernel.fill_text(norm_kernel.POINTERS), ["*i64"]),
            ("squares", norm_kernel.sums_text(kinds, torch.float32), ["*i64", "*i64", "*fp32"]),
            ("norm", norm_kernel.total_text(torch.float32), ["*fp32", "*fp32"]),
        ):
            kernel = scalar_kernel.compiled(text)
            numbers = {"N": 256, "BLOCK": norm_kernel.BLOCK, "CHUNK": norm_kernel.CHUNK}
            numbers["ALIGNED"] = True
            rest = kernel.arg_names[len(given) :]
            kept = ["constexpr" if n in numbers else "i64" if n[0] == "p" else "i32" for n in rest]
            constants = {(i,): numbers[n] for i, n in enumerate(kernel.arg_names) if n in numbers}
            code = triton.compile(
                ASTSource(
                    kernel, dict(zip(kernel.arg_names, given + kept, strict=True)), constants
                ),
                target=GPUTarget("cuda", arch, 32),
                options={"num_warps": norm_kernel.WARPS, "enable_fp_fusion": False},
            )
            sizes[f"{name}, sm_{arch}"] = len(code.asm["cubin"])
    types = {"uniform": ("*bf16", "fp32"), "normal": ("*fp32", "fp32"), "choice": ("*fp32", "fp32")}
    for kind, (out, number) in (types | {"integer": ("*i32", "i32")}).items():
        kernel = scalar_kernel.compiled(random_kernel.text())
        given = ("*i32", out, out, "i32", number, number, *["constexpr"] * 4)
        wide = triton.language.float32
        code = triton.compile(
            ASTSource(
                kernel,
                dict(zip(kernel.arg_names, given, strict=True)),
                {(6,): kind, (7,): 24, (8,): wide, (9,): 1024},
            ),
            target=GPUTarget("cuda", 90, 32),
            options={"enable_fp_fusion": False},
        )
        sizes[kind] = len(code.asm["cubin"])
    return sizes


def all_numbers():
    return [numbers(), random_numbers(), wrong_kernels(), norms()]


if __name__ == "__main__":
    results = {"steps": steps, "numbers": all_numbers}[WHAT]()
    sys.__stdout__.write("\n" + json.dumps(results))
