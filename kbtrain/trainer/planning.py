"""``trainer.plan()``: here on JAX, and on another backend in a process that has JAX."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from kbtrain.config.training_args import TrainingArguments
from kbtrain.data import map_structure, unpack
from kbtrain.errors import ConfigurationError, first_lines
from kbtrain.model.losses.keras_losses import NamedLoss
from kbtrain.plan import request as planning
from kbtrain.plan.devices import device_named
from kbtrain.plan.plan import Plan
from kbtrain.plan.planner import check_numbers, notes_of_run, plan_run
from kbtrain.plan.process import environment, run_process
from kbtrain.plan.rehearsal import outlined_batch

if TYPE_CHECKING:
    from kbtrain.trainer.trainer import Trainer


def trackers(args: TrainingArguments) -> tuple[str, ...]:
    """The trackers of a run; none of a program that is run to be planned."""
    return () if planning.pending() else tuple(args.report_to)


def plan(
    trainer: Trainer,
    device: Any,
    count: int,
    batch: Sequence[int],
    quick: bool,
    changes: Mapping[str, Any],
) -> Plan:
    """Plan a run; see ``Trainer.plan``."""
    spec = device_named(device)
    check_numbers(count, batch)
    if trainer.backend.COMPILES_AHEAD:
        return plan_run(trainer, spec, count, batch=batch, quick=quick, changes=changes)
    with tempfile.TemporaryDirectory(prefix="kbtrain-plan-") as folder:
        task = {
            "run": _carried(trainer),
            "device": spec.to_dict(),
            "count": count,
            "batch": list(batch),
            "quick": quick,
            "changes": dict(changes),
            "backend": trainer.backend.name,
            "tf32": trainer.backend.tf32_is_on(),
            "notes": notes_of_run(trainer),
            "result": str(Path(folder) / "result.json"),
        }
        return _planned_elsewhere(task, Path(folder))


def _planned_elsewhere(task: Mapping[str, Any], place: Path) -> Plan:
    """Plan in a process with JAX."""
    path = place / "task.json"
    try:
        path.write_text(json.dumps(task), encoding="utf-8")
    except TypeError as error:
        raise _cannot(f"it is not described by JSON alone: {error}") from None
    command = [sys.executable, "-m", "kbtrain.trainer.planned_elsewhere", str(path)]
    # It must find the modules that this process has found.
    found = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
    env = environment(os.environ) | {"PYTHONPATH": found}
    done = run_process(command, env, captured=True)
    try:
        result = json.loads(Path(task["result"]).read_text(encoding="utf-8"))
    except OSError:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise _cannot(f"the process with JAX failed: {last[0]}") from None
    if "error" in result:
        raise ConfigurationError(result["error"])
    if "unknown" in result:
        raise _cannot(result["unknown"])
    return Plan.from_dict(result["plan"])


def _cannot(why: str) -> ConfigurationError:
    program = sys.argv[0] if sys.argv and sys.argv[0].endswith(".py") else "train.py"
    return ConfigurationError(
        "A plan is compiled with JAX, in a process of its own, and this run cannot be carried over "
        f"to it: {why} The command runs the whole program there: `kbtrain plan {program} --device "
        "h100`."
    )


def _carried(trainer: Trainer) -> dict[str, Any]:
    """What another process needs to make this Trainer: configurations and shapes, no values.

    Raises:
        ConfigurationError: A part of it has no configuration.
    """
    if type(trainer).__module__ != "kbtrain.trainer.trainer":
        raise _cannot(f"{type(trainer).__name__} is a class of your own.")
    if trainer.compute_loss_func is not None:
        raise _cannot("compute_loss_func is a function.")
    try:
        parts = {
            "model": trainer.model,
            "loss": trainer.given_loss,
            "metrics": trainer.given_metrics[0],
            "weighted_metrics": trainer.given_metrics[1],
            "optimizer": trainer.given_optimizers[0],
            "schedule": trainer.given_optimizers[1],
        }
        found = {name: _serialized(part) for name, part in parts.items()}
    except Exception as error:
        raise _cannot(f"{type(error).__name__}: {first_lines(error, 1)[:200]}") from None
    if own := _own_class(found):
        raise _cannot(f"{own} is defined in this program.")
    args = trainer.args.replace(**_NOT_CARRIED).to_dict()
    return found | {
        "args": {each.name: args[each.name] for each in dataclasses.fields(TrainingArguments)},
        "loss_weights": trainer.given_loss_weights,
        "class_weight": trainer.class_weight and list(trainer.class_weight.items()),
        "data": _outline(trainer),
    }


_NOT_CARRIED = {
    **{"devices": None, "use_cpu": False, "report_to": "none", "save_strategy": "no"},
    **{"eval_strategy": "no", "eval_minutes": None, "eval_on_start": False},
    **{"load_best_model_at_end": False, "metric_for_best_model": None},
}
"""Arguments that have nothing to do with a step: there is no evaluation set over there."""


def _serialized(part: Any) -> Any:
    if isinstance(part, Mapping):
        return {"mapping": {name: _serialized(value) for name, value in part.items()}}
    if isinstance(part, list | tuple):
        return {"list": [_serialized(value) for value in part]}
    if isinstance(part, NamedLoss):
        return {"object": part.name}
    return {"object": keras.saving.serialize_keras_object(part)}


def _own_class(config: Any) -> str:
    """A class or function of the program itself, which another process cannot import, or ""."""
    if isinstance(config, Mapping):
        if "class_name" in config and config.get("module", "keras") in (None, "__main__"):
            return str(config["class_name"])
        config = list(config.values())
    if isinstance(config, list | tuple):
        return next(filter(None, map(_own_class, config)), "")
    return ""


def _outline(trainer: Trainer) -> Any:
    """Shape and dtype of each array of a batch, as JSON."""
    names = trainer.bound.label_names
    first = outlined_batch(trainer, "plan")
    if first is None:
        raise ConfigurationError("The training data has no batches; see dataloader_drop_last.")
    parts = unpack(first, names)

    def one(x: Any) -> Any:
        if not isinstance(x, np.ndarray) or (x.dtype.kind not in "biuf" and x.dtype.itemsize != 2):
            raise _cannot("its data are not numbers in arrays.")
        return {"shape": list(x.shape), "dtype": x.dtype.name}

    return [None if part is None else map_structure(one, part) for part in parts]
