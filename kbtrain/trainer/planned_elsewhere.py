"""The other end of ``trainer.plan()`` on a backend without JAX: the process that has it."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from kbtrain.config.training_args import TrainingArguments
from kbtrain.data import as_loader
from kbtrain.errors import KbtrainError, first_lines
from kbtrain.plan.plan import Plan
from kbtrain.plan.planner import plan_run
from kbtrain.plan.request import other_backend
from kbtrain.plan.run_backend import run_backend
from kbtrain.trainer.trainer import Trainer
from kbtrain.utils.files.output_files import save_json
from kbtrain.utils.machine.devices import DeviceSpec


def _deserialized(config: Mapping[str, Any]) -> Any:
    if "mapping" in config:
        return {name: _deserialized(value) for name, value in config["mapping"].items()}
    if "list" in config:
        return [_deserialized(value) for value in config["list"]]
    return keras.saving.deserialize_keras_object(config["object"])


def _arrays(outline: Any) -> Any:
    """Arrays of zeros with the shapes of an outline; None where there is nothing."""
    if outline is None:
        return None
    if isinstance(outline, Mapping) and set(outline) == {"shape", "dtype"}:
        return np.zeros(outline["shape"], outline["dtype"])
    if isinstance(outline, Mapping):
        return {name: _arrays(value) for name, value in outline.items()}
    return [_arrays(value) for value in outline]


def main(words: Sequence[str]) -> int:
    """Plan the run of a file, in the process that has JAX."""
    task = json.loads(Path(words[0]).read_text(encoding="utf-8"))
    device, run = task["device"], task["run"]
    result: dict[str, Any]
    try:
        parts = {
            name: _deserialized(run[name])
            for name in ("model", "loss", "metrics", "weighted_metrics", "optimizer", "schedule")
        }
    except Exception as error:
        result = {"unknown": f"{type(error).__name__}: {first_lines(error, 1)[:200]}"}
    else:
        try:
            result = {"plan": _plan_of(parts, run, task, device).to_dict()}
        except KbtrainError as error:
            result = {"error": str(error)}
    save_json(Path(task["result"]), result)
    return 0


def _plan_of(
    parts: Mapping[str, Any],
    run: Mapping[str, Any],
    task: Mapping[str, Any],
    device: Mapping[str, Any],
) -> Plan:
    batch = tuple(_arrays(part) for part in run["data"])
    while batch[-1] is None:  # one in the middle, as in (x, None, weights), keeps its place
        batch = batch[:-1]
    trainer = Trainer(
        parts["model"],
        TrainingArguments.from_dict(run["args"]),
        train_dataset=as_loader([batch]),
        loss=parts["loss"],
        metrics=parts["metrics"],
        weighted_metrics=parts["weighted_metrics"],
        loss_weights=run["loss_weights"],
        class_weight=run["class_weight"] and dict(run["class_weight"]),
        optimizers=(parts["optimizer"], parts["schedule"]),
    )
    return plan_run(
        trainer,
        DeviceSpec.from_dict(device),
        task["count"],
        batch=task["batch"],
        quick=task["quick"],
        changes=task["changes"],
        notes=[other_backend(task["backend"]), *task["notes"]],
        backend=dataclasses.replace(run_backend(task["backend"]), tf32=task["tf32"]),
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
