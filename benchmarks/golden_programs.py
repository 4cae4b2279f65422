"""What is recorded of three models' programs for devices that are not here, and renews it.

    python benchmarks/golden_programs.py [--write]

It compares ``tests/golden/programs.json`` with what the installed compilers say now (the extras
plan-gpu and plan-tpu), and with ``--write`` records that. XLA's plans differ a little between
versions: figures that it decides may differ by a tenth, the others not at all.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ["KERAS_BACKEND"] = "jax"
os.environ["JAX_PLATFORMS"] = "cpu"

import keras
import numpy as np
from workloads import GptSize, convnet, gpt, loss, mlp

from kbtrain import Trainer, TrainingArguments
from kbtrain.backends.jax.ahead_of_time import has_compiler_for
from kbtrain.plan.compile import compile_program
from kbtrain.plan.devices import device_named

PATH = Path(__file__).resolve().parent.parent / "tests" / "golden" / "programs.json"

PLATFORMS = {"h100": "cuda", "v5e": "tpu"}

SIZE = GptSize(depth=2, width=256, length=128, heads=4)

MODELS: dict[str, tuple[Callable[[], keras.Model], tuple[int, ...], str, int, dict[str, Any]]] = {
    "mlp": (mlp, (16,), "float32", 32, {}),
    "convnet": (convnet, (32, 32, 3), "float32", 8, {}),
    "gpt": (lambda: gpt(SIZE), (SIZE.length,), "int32", 8, {"bf16": True}),
}
"""Model, shape and dtype of a sample, samples per device, arguments."""

CASES = [
    (model, device, count, fsdp)
    for device in PLATFORMS
    for model in MODELS
    for count, fsdp in ((1, False), (8, False), (8, True))
    if model == "gpt" or not fsdp
]

FACTS = {
    "exact": ("parameter_bytes", "optimizer_bytes", "batch_bytes", "flops", "samples", "tokens"),
    "about": ("temporary_bytes", "peak_bytes", "bytes_accessed", "program_flops"),
}


def facts_of(model: str, device: str, count: int, fsdp: bool) -> dict[str, Any]:
    """The facts of one program."""
    make, shape, dtype, rows, arguments = MODELS[model]
    labels = np.zeros((8, *shape) if dtype == "int32" else 8, "int32")
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=rows,
            max_steps=1,
            report_to="none",
            disable_tqdm=True,
            log_level="error",
            **arguments,
        )
        data = np.zeros((8, *shape), dtype), labels
        trainer = Trainer(make(), args, train_dataset=data, loss=loss())
        changes = {"fsdp": True} if fsdp else {}
        facts = compile_program(trainer, device=device_named(device), count=count, changes=changes)
    assert facts.compiled_for == device, facts.exact
    names = [name for group in FACTS.values() for name in group]
    return {name: getattr(facts, name) for name in names} | {
        "collectives": {kind: list(each) for kind, each in facts.collectives.items()}
    }


def named(model: str, device: str, count: int, fsdp: bool) -> str:
    return f"{model}, {count} x {device}{', fsdp' if fsdp else ''}"


def differences(recorded: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs by more than it may."""
    found = [
        f"{name}: recorded {recorded[name]}, now {now[name]}"
        for name in FACTS["exact"]
        if recorded[name] != now[name]
    ]
    for name in FACTS["about"]:
        if abs(now[name] - recorded[name]) > 0.1 * recorded[name] + 2**16:
            found.append(f"{name}: recorded {recorded[name]}, now {now[name]}")
    sent = [sum(size for _, size in each["collectives"].values()) for each in (recorded, now)]
    if abs(sent[1] - sent[0]) > 0.1 * sent[0] + 2**16:
        found.append(f"collectives: {recorded['collectives']}, now {now['collectives']}")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="record what is found")
    parser.add_argument("--devices", nargs="+", default=list(PLATFORMS), choices=list(PLATFORMS))
    options = parser.parse_args(arguments)
    document = json.loads(PATH.read_text(encoding="utf-8")) if PATH.exists() else {"programs": {}}
    failed = False
    for case in CASES:
        if case[1] not in options.devices or not has_compiler_for(PLATFORMS[case[1]]):
            continue
        name, now = named(*case), facts_of(*case)
        recorded = document["programs"].get(name)
        wrong = ["not recorded"] if recorded is None else differences(recorded, now)
        failed |= bool(wrong)
        print(f"{name}: {'; '.join(wrong) or 'as recorded'}", flush=True)
        document["programs"][name] = now
    if options.write:
        document["jax"] = metadata.version("jax")
        PATH.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    elif failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
