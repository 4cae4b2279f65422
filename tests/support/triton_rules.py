"""The kernels that are made of rules, without a GPU, in a process whose Keras runs on PyTorch.

``python triton_rules.py numbers NAME...`` runs them with Triton's interpreter (TRITON_INTERPRET=1)
on CPU tensors and prints, as JSON, how far they are from NumPy in float64 and what an update that
must change nothing has changed. ``python triton_rules.py compile`` compiles them for two GPUs and
prints what the machine code needs.
"""

import json
import logging
import re
import sys
from unittest import mock

import keras
import numpy as np
import torch
from references import CASES, trajectory
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import optim
from optim.kernels.torch import custom_op, rule_groups
from optim.kernels.torch.recording import RecordedRule
from optim.kernels.torch.triton_kernels import launch as triton_launch
from optim.kernels.torch.triton_kernels.source import BLOCK, RuleSource
from optim.kernels.torch.triton_kernels.storage import Storage
from optim.kernels.torch.triton_kernels.text import POINTERS

UPDATES = 3
# A tensor that ends in a block, one of a single number, and one that is longer than a block.
SHAPES = {"a": (5, 7), "b": (), "c": (BLOCK + 77,), "d": (2, 3)}


def apply(optimizer, variables, gradients):
    optimizer.apply([torch.tensor(g) for g in gradients], variables)


def distance(name, case, dtype):
    """The largest error of an update, relative to the movement; variables in three groups."""
    draw = np.random.default_rng(0)
    variables = [
        keras.Variable(0.1 * draw.standard_normal(shape), dtype=dtype, name=key)
        for key, shape in SHAPES.items()
    ]
    starts = [v.value.detach().double().numpy() for v in variables]
    gradients = [
        [draw.standard_normal(shape).astype("float32") for shape in SHAPES.values()]
        for _ in range(UPDATES)
    ]
    groups = [
        {"match": "b", "lr_multiplier": 0.5, "weight_decay": 0.0},
        {"match": "d", "lr_multiplier": 2.0},
    ]
    optimizer = optim.get(name, learning_rate=1e-2, parameter_groups=groups, **case)
    for given in gradients:
        apply(optimizer, variables, given)
    worst = 0.0
    for i, (variable, start) in enumerate(zip(variables, starts, strict=True)):
        rate = 1e-2 * {"b": 0.5, "d": 2.0}.get(variable.name, 1.0)
        own = {**case, "weight_decay": 0.0} if variable.name == "b" else case
        expected = trajectory(name, start, [g[i] for g in gradients], rate, **own)[-1]
        result = variable.value.detach().double().numpy()
        if dtype != "float32":
            result = result + optimizer.slots_of(variable)["residual"].value.detach().numpy()
        moved = max(np.linalg.norm(expected - start), 1e-12)
        worst = max(worst, np.linalg.norm(result - expected) / moved)
    return worst


class Given(TorchDispatchMode):
    """Gives the operation arguments that a step of kbtrain gives it."""

    def __init__(self, **options):
        super().__init__()
        self.options = options

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        options = self.options if func is torch.ops.optim.run_rules.default else {}
        return func(*args, **(kwargs or {}), **options)


def flag_and_scale(name):
    """Whether a flag stops all of an update, and gradients are divided by a scale."""
    variable, twin = (keras.Variable(np.full(9, 0.5), dtype="float32", name="v") for _ in range(2))
    optimizer, other = (optim.get(name, learning_rate=0.1) for _ in range(2))
    gradient = np.linspace(-1, 1, 9).astype("float32")
    for o, v in ((optimizer, variable), (other, twin)):
        apply(o, [v], [gradient])
    state = [variable, *optimizer.slots_of(variable).values()]
    before = [v.value.detach().clone() for v in state]
    with Given(found_inf=torch.ones(())):
        apply(optimizer, [variable], [np.full(9, np.nan, "float32")])
    same = all(torch.equal(v.value, old) for v, old in zip(state, before, strict=True))
    optimizer.iterations.assign(1)
    with Given(found_inf=torch.zeros(()), grad_scale=torch.tensor(4.0)):
        apply(optimizer, [variable], [-4.0 * gradient])
    apply(other, [twin], [-gradient])
    moved = not torch.equal(variable.value, before[0])
    return bool(same and moved and torch.equal(variable.value, twin.value))


class Tanh(optim.Optimizer):
    """A rule with an operation that is not written for Triton."""

    def slot_shapes(self, shape):
        return {}

    @optim.elementwise
    def update(self, parameter, gradient, slots, step, learning_rate, weight_decay):
        return parameter - learning_rate * keras.ops.tanh(gradient), slots


def matrices(name, dtype="float32", **arguments):
    """Weights after three updates of four matrices, three of which have the same shape."""
    draw = np.random.default_rng(0)
    variables = [
        keras.Variable(draw.standard_normal(shape), dtype=dtype, name=f"kernel_{i}")
        for i, shape in enumerate([(6, 4), (6, 4), (5, 3), (6, 4)])
    ]
    optimizer = optim.get(name, learning_rate=0.1, **arguments)
    for _ in range(3):
        apply(
            optimizer,
            variables,
            [draw.standard_normal(v.shape).astype("float32") for v in variables],
        )
    return np.concatenate([v.value.detach().float().numpy().ravel() for v in variables])


def stacked():
    """How far matrices that are updated together are from those that are updated one by one."""
    settings = {
        "muon": {"ns_dtype": "float32"},
        "soap": {"precondition_frequency": 2},
        "muon bfloat16": {"ns_dtype": "float32", "dtype": "bfloat16"},
        "muon auto": {"ns_dtype": "auto"},
    }
    results = {}
    for on_gpu in (False, True):
        custom_op.on_gpu = lambda device, on_gpu=on_gpu: on_gpu
        for key, arguments in settings.items():
            results.setdefault(key, []).append(matrices(key.split()[0], **arguments))
    return {key: float(np.abs(a - b).max()) for key, (a, b) in results.items()}


class Dithered(optim.AdamW8bit):
    """A rule with both kinds of codes and with both ways of rounding."""

    dithered = frozenset({"momentum"})


def eight_bit():
    """Rules with 8-bit state by kernels, against the same on lists of tensors.

    For each the largest difference of a parameter, relative to its movement, the share of other
    codes, and how far the parameters of the kernels are from the full-precision rule in float64.
    """
    # The last blocks are not full; two tensors have float32 state.
    shapes = {"a": (64, 70), "b": (5,), "c": (2 * BLOCK + 33,), "embedding": (50, 90)}
    groups = [{"match": "b", "weight_decay": 0.0}, {"match": "c", "lr_multiplier": 2.0}]
    draw = np.random.default_rng(0)
    starts = [0.1 * draw.standard_normal(n).astype("float32") for n in shapes.values()]
    gradients = [
        [draw.standard_normal(n).astype("float32") for n in shapes.values()] for _ in range(2)
    ]
    gradients[1][0][:4] = 0.0
    found = {}
    for name, updates in (("adamw_8bit", 2), ("lion_8bit", 1)):
        values, codes = [], []
        for on_gpu in (False, True):
            custom_op.on_gpu = lambda device, on_gpu=on_gpu: on_gpu
            variables = [
                keras.Variable(start, dtype="float32", name=key)
                for key, start in zip(shapes, starts, strict=True)
            ]
            optimizer = optim.get(name, learning_rate=1e-2, parameter_groups=groups)
            for given in gradients[:updates]:
                apply(optimizer, variables, given)
            values.append([v.value.detach().double().numpy() for v in variables])
            slots = [slot for v in variables for slot in optimizer.slots_of(v).items()]
            codes.append([x.value.numpy().ravel() for n, x in slots if n.endswith("_codes")])
        plain, kernels = values
        moved = [np.abs(x - start).max() for x, start in zip(plain, starts, strict=True)]
        changed = np.concatenate(codes[0]).astype(int) - np.concatenate(codes[1])
        wide = []
        for i, (key, start) in enumerate(zip(shapes, starts, strict=True)):
            rate = 1e-2 * (2.0 if key == "c" else 1.0)
            case = {"weight_decay": optimizer.weight_decay_of(variables[i])}
            given = [g[i] for g in gradients[:updates]]
            exact = trajectory(name.removesuffix("_8bit"), start, given, rate, **case)[-1]
            error = np.linalg.norm(kernels[i] - exact) / np.linalg.norm(exact - start)
            wide.append(float(error))
        found[name] = {
            "difference": max(
                float(np.abs(x - y).max() / m)
                for x, y, m in zip(plain, kernels, moved, strict=True)
            ),
            "other codes": float((changed != 0).mean()),
            "from float64": wide,
        }
    return found


class Kept(logging.Filter):
    """Keeps messages in a list."""

    def __init__(self, messages):
        super().__init__()
        self.messages = messages

    def filter(self, record):
        self.messages.append(record.getMessage())
        return False


def recorded_inside(mode):
    """Whether kernels can be made while a step is being recorded."""
    with mode:
        source = RuleSource(RecordedRule(optim.LAMB(), 0.1, torch.device("cpu")), Storage())
    return 0.1 in source.numbers


def many():
    """The largest error of an update of 450 tensors, one without elements, some not aligned."""
    rule, device = optim.get("lion"), torch.device("cpu")
    source = RuleSource(RecordedRule(rule, 0.1, device), Storage())
    memory = torch.linspace(-1.0, 1.0, 3 * 450 * 4 + 1)[1:]
    sizes = [i % 4 for i in range(450)]
    lists = [[x[i, :n] for i, n in enumerate(sizes)] for x in memory.view(3, 450, 4)]
    expected = []
    for p, g, m in zip(*lists, strict=True):
        moved = torch.sign(0.9 * m + 0.1 * g) + 0.1 * p
        expected += [p - 0.5 * moved, 0.99 * m + 0.01 * g]
    numbers = [source.numbers] * 450
    kernels = triton_launch.GroupKernels(triton_launch.Group.of(source, numbers))
    kernels.run(*lists, torch.ones(()), torch.tensor(0.5), None, None)
    found = [x for p, _, m in zip(*lists, strict=True) for x in (p, m)]
    return max(float((x - y).abs().max()) for x, y in zip(found, expected, strict=True) if len(x))


def wrong_rules():
    """What is said of kernels with a wrong number, and of right ones."""
    device, found = torch.device("cpu"), []
    for name, number in (("adamw", 0.01), ("lion", 0.01), ("radam", None), ("adamw_8bit", 0.01)):
        rule = optim.get(name)
        source = rule_groups.recorded_source(rule, 0.01, Storage(), device)
        if number is None:  # of the branch that is not taken in the first updates
            (number,) = (x for x in source.numbers if 5.0e-4 < x < 5.1e-4)
        for factor in (1.0, 2.0):
            source.numbers = [factor * x if x == number else x for x in source.numbers]
            try:
                rule_groups.check(rule, 0.01, source, Storage(), device)
                found.append("")
            except RuntimeError as error:
                found.append(str(error))
    return found


def numbers(names):
    together, coded = stacked(), eight_bit()
    custom_op.on_gpu = lambda device: True
    without = []
    logging.getLogger("optim").addFilter(without_triton := Kept(without))
    with mock.patch.object(rule_groups, "is_available", return_value=False):
        without += [distance(name, CASES[name][1], "float32") for name in ("lion", "rmsprop")]
    logging.getLogger("optim").removeFilter(without_triton)
    found = {}
    for i, name in enumerate(names):
        found[name] = distance(name, CASES[name][1], ("float32", "bfloat16")[i % 2])
    variable, log = keras.Variable(np.zeros(3), dtype="float32"), []
    logging.getLogger("optim").addFilter(Kept(log))
    apply(Tanh(1.0), [variable], [np.ones(3, "float32")])
    print(
        json.dumps(
            {
                "distance": found,
                "flag and scale": {name: flag_and_scale(name) for name in names[:2]},
                "stacked": together,
                "eight bit": coded,
                "without": without,
                "many": many(),
                "wrong": wrong_rules(),
                "inside": recorded_inside(FakeTensorMode()),
                "tanh": [variable.value.detach()[0].item(), *log],
            }
        )
    )


# ---- compiling -----------------------------------------------------------------------------------

TYPES = {"n": "i32", "blocks": "i32"} | dict.fromkeys(("table", "gradients"), "*i64")
CONSTANTS = {"N": 256, "BLOCK": BLOCK, "ALIGNED": True, "FLAGGED": True, "SCALED": True}


def compile_for(kernel, capability):
    """What the machine code of a kernel has."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    # As Triton itself finds them when the kernel is launched.
    given = {param.name: param.annotation_type for param in kernel.params}
    pointer = {name: given[name] or "*fp32" for name in names}
    assert all(param.do_not_specialize for param in kernel.params if given[param.name] == "i64")
    types = {n: "constexpr" if n in CONSTANTS else TYPES.get(n, pointer[n]) for n in names}
    constants = {(i,): CONSTANTS[n] for i, n in enumerate(names) if n in CONSTANTS}
    made = triton.compile(
        ASTSource(kernel, types, constants),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": triton_launch.WARPS, "enable_fp_fusion": False},
    )
    code = made.asm["ptx"]
    return {
        "bytes": len(made.asm["cubin"]),
        "vector loads": len(re.findall(r"ld\.global\S*\.v[248]", code)),
        "spilled": len(re.findall(r"\.local", code)),
        "fused operations": len(re.findall(r"fma\.rn\.f32", code)),
    }


def compiled(names):
    found = {}
    for name in names:
        for storage, capability in ((Storage(), 90), (Storage("bfloat16", "bfloat16"), 80)):
            pointers = POINTERS if capability == 90 else 8
            rule = Dithered() if name == "dithered" else optim.get(name)
            source = rule_groups.recorded_source(rule, 0.01, storage, torch.device("cpu"))
            other = [2.0 * x for x in source.numbers]
            if source.is_coded:
                other[1] = 0.0  # its state is float32
            group = triton_launch.Group.of(source, [source.numbers, other])
            kernels = triton_launch.compiled(group.source(pointers))
            for part in ("prepare", "sums", "totals", "update"):
                if part in kernels:
                    found[f"{name} sm_{capability} {part}"] = compile_for(kernels[part], capability)
    print(json.dumps(found))


if __name__ == "__main__":
    {"numbers": numbers, "compile": compiled}[sys.argv[1]](sys.argv[2:])
