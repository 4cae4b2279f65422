"""The path of updates on a GPU without Triton or a GPU, in a process whose Keras runs on PyTorch.

Kernels are noted and do nothing. Prints one JSON object.
"""

import gc
import json
import sys

import keras
import numpy as np
import torch
from paths import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

from optimizer_counts import pretended_gpu

import optim
from optim.kernels.torch import custom_op, rule_groups
from optim.kernels.torch.recording import RecordedRule
from optim.kernels.torch.triton_kernels import launch as triton_launch
from optim.kernels.torch.triton_kernels.launch import Group, GroupKernels
from optim.kernels.torch.triton_kernels.source import RuleSource
from optim.kernels.torch.triton_kernels.storage import Storage
from optim.kernels.torch.triton_kernels.text import POINTERS

CPU = torch.device("cpu")


def many_tensors():
    """For some numbers of tensors, how many numbers fit behind the place where a kernel writes.

    And the kernels of a second update, as they are launched and as they are said to be.
    """
    source = RuleSource(RecordedRule(optim.Lion(), 0.1, CPU), Storage())
    found = {}
    for count in (1, 128, 129, 448, 449, 450, 897):
        room, launched = [], []

        def launch(kernel, blocks, *args, room=room, launched=launched, **constants):
            launched.append(kernel)
            if len(args) == 1 + POINTERS:  # it writes into a table
                room.append(args[0].numel())
            assert {t.dtype for t in args if torch.is_tensor(t)} <= {torch.int64, torch.float32}

        numbers = [[1.0 + i % 2, *source.numbers[1:]] for i in range(count)]
        kernels = GroupKernels(Group.of(source, numbers), launch)
        lists = [[torch.zeros(3) for _ in range(count)] for _ in range(3)]
        kernels.run(*lists, torch.ones(()), torch.ones(()), None, None)
        launched.clear()  # of the table, which stays
        kernels.run(*lists, torch.ones(()), torch.ones(()), None, None)
        found[count] = min(room), len(launched), kernels.group.launches
    return found


def changed(name, attribute, value):
    """Numbers that a rule's kernels have before and after a hyperparameter was changed."""
    variable = keras.Variable(np.ones((64, 64)), dtype="float32", name="v")
    optimizer = optim.get(name, learning_rate=0.1)
    found = []
    for number in (getattr(optimizer, attribute), value, value):
        setattr(optimizer, attribute, number)
        groups = rule_groups.RuleGroups()
        optimizer.build([variable]) if not optimizer.built else None
        slots = {n: slot.value for n, slot in optimizer.slots_of(variable).items()}
        rule = optimizer.update_rule_of(variable)
        assert groups.add(rule, variable.value, torch.ones(64, 64), slots)
        before = len(triton_launch._GROUPS._objects)
        groups.run(torch.ones(()), torch.ones(()))
        made = [*triton_launch._GROUPS._objects.values()][before:]
        found.append([kernels.group.numbers[0] for kernels in made])
    return found


def of_many_numbers():
    """Texts of kernels while a hyperparameter changes with every update, and what stays of them."""
    variable = keras.Variable(np.ones(3), dtype="float32", name="v")
    optimizer = optim.get("lion", learning_rate=0.1)
    texts = []
    triton_launch.compiled = lambda text: texts.append(text) or dict.fromkeys(triton_launch._NAMES)
    triton_launch._launch = lambda *args, **constants: None
    gc.collect()
    before = len(triton_launch._GROUPS._objects)
    for i in range(20):
        optimizer.beta_1 = 0.5 + i / 64
        optimizer.apply([torch.ones(3)], [variable])
    made = len(triton_launch._GROUPS._objects) - before
    del optimizer, variable
    gc.collect()
    return [made, len({*texts}), len(triton_launch._GROUPS._objects) - before]


def devices():
    """Whether kernels are made for a gradient, or a slot, that is elsewhere."""
    here, there = torch.zeros(3), torch.zeros(3, device="meta")
    rule = optim.Lion()
    variable = keras.Variable(np.ones(3), dtype="float32", name="v")
    rule.build([variable])
    update_rule = rule.update_rule_of(variable)
    groups = rule_groups.RuleGroups()
    return [
        groups.add(update_rule, here, gradient, {"momentum": slot})
        for gradient, slot in ((here, here), (there, here), (here, there))
    ]


def versions(name):
    """By how much the versions of a parameter and its state have moved in an update."""
    variable = keras.Variable(np.ones((64, 64)), dtype="float32", name="v")
    optimizer = optim.get(name, learning_rate=0.1)
    optimizer.build([variable])
    tensors = [variable.value, *(s.value for s in optimizer.slots_of(variable).values())]
    before = [t._version for t in tensors]
    optimizer.apply([torch.ones(64, 64)], [variable])
    return min(t._version - v for t, v in zip(tensors, before, strict=True))


def in_float64_by_default(name):
    """An update where new tensors have another dtype by default."""
    results = []
    for dtype in (torch.float32, torch.float64):
        torch.set_default_dtype(dtype)
        variable = keras.Variable(np.ones((64, 64)), dtype="float32", name="v")
        optimizer = optim.get(name, learning_rate=0.1)
        optimizer.apply([torch.ones(64, 64, dtype=torch.float32)], [variable])
        results.append(variable.value.detach().clone())
        torch.set_default_dtype(torch.float32)
    return torch.equal(*results)


def main():
    names = ("lion", "lamb", "adafactor", "adamw_8bit")
    found = {
        "versions": {name: versions(name) for name in names},
        "default dtype": {name: in_float64_by_default(name) for name in names},
    }
    with pretended_gpu():
        assert custom_op.on_gpu(CPU)
        found |= {
            "room": many_tensors(),
            "changed": [changed(name, "beta_1", 0.5) for name in ("adamw", "adamw_8bit")],
            "devices": devices(),
            "versions on a GPU": min(map(versions, ("lion", "adamw_8bit"))),
            "many numbers": of_many_numbers(),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
