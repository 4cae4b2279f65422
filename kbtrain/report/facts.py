"""What a run is: the facts known when its first update is about to begin."""

from __future__ import annotations

import datetime
import functools
import logging
import math
import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, TypeVar

import keras
import numpy as np

from kbtrain.data import as_source
from kbtrain.report.command import command_line
from kbtrain.utils.files.addresses import beneath
from kbtrain.utils.json_types import JsonDataclass
from kbtrain.utils.layers import innermost_optimizer
from kbtrain.utils.machine.processes import current
from kbtrain.utils.packages.versions import environment

logger = logging.getLogger("kbtrain")

T = TypeVar("T")

BYTES_OF = {"bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1, "int4": 1, "uint4": 1, "bool": 1}
"""Bytes of an element, of the dtypes that NumPy does not have."""


@dataclass(frozen=True)
class RunFacts(JsonDataclass):
    """A run as its start panel, its report and its model card describe it; JSON values only.

    Attributes:
        started: Local time with its offset, ISO 8601.
        command: What started the program, as typed in a shell; empty in a notebook.
        output_dir: Folder of checkpoints and logs, absolute.
        run_name: ``args.run_name``, or the name of the folder.
        model: Name of the model.
        model_class: Its class.
        parameters: Parameters of the model, non-trainable ones included.
        trainable: Those that are trained.
        model_bytes: Memory of all of them.
        examples: Training examples; None for data without a length.
        eval_examples: Evaluation examples by the name of the set ("eval" if there is one); None
            for a set without a length.
        batch_size: Examples of an update, on all devices and processes; 0 where the data consists
            of batches of unknown size.
        accumulation: Micro-batches of an update.
        updates: Updates planned; 0 if unknown.
        epochs: Epochs planned.
        optimizer: Class of the optimizer; "none" if a custom step updates without one.
        learning_rate: The peak of the learning rate; None if unknown.
        schedule: Name of the schedule of the learning rate.
        precision: Dtype policy of the model.
        backend: Backend of Keras.
        device: Device or devices of this process.
        processes: Processes that train together.
        start_step: Updates done before: not 0 in a resumed run.
        resumed_from: Checkpoint that the run continues from.
        changed: Arguments that differ from their defaults.
        versions: Versions of Python, kbtrain, Keras and the backend.
        host: Name of the machine.
    """

    started: str
    command: str
    output_dir: str
    run_name: str
    model: str
    model_class: str
    parameters: int
    trainable: int
    model_bytes: int
    examples: int | None
    eval_examples: dict[str, int | None]
    batch_size: int
    accumulation: int
    updates: int
    epochs: float
    optimizer: str
    learning_rate: float | None
    schedule: str
    precision: str
    backend: str
    device: str
    processes: int
    start_step: int
    resumed_from: str | None
    changed: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    host: str = ""


def _resumed_from(trainer: Any) -> str | None:
    path, store = trainer.resumed_from, trainer.store
    if path is None:
        return None
    # Of a run at an address, `directory` is where its files are on this machine.
    return beneath(store.place, path.name) if path.parent == store.directory else str(path)


def facts_of(trainer: Any) -> RunFacts:
    """Describe the run that a Trainer is about to begin; valid from ``on_train_begin`` on.

    Args:
        trainer: The Trainer; its model and optimizer are built.
    """
    args, model, state = trainer.args, trainer.model, trainer.state
    variables = model.weights  # without the state of random generators
    place = trainer.store.place
    return RunFacts(
        started=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        command=command_line(),
        output_dir=place,
        run_name=args.run_name or PurePath(place).name,
        model=str(model.name),
        model_class=type(model).__name__,
        parameters=sum(map(_size, variables)),
        trainable=sum(map(_size, model.trainable_variables)),
        model_bytes=sum(_size(v) * _bytes(v.dtype) for v in variables),
        examples=getattr(trainer.train_dataloader, "num_examples", None),
        eval_examples={
            name: _attempt(functools.partial(_examples, one), None)
            for name, one in trainer.evaluation_sets().items()
        },
        batch_size=(state.train_batch_size or 0) * args.gradient_accumulation_steps,
        accumulation=args.gradient_accumulation_steps,
        updates=state.max_steps,
        epochs=_epochs(trainer),
        optimizer="none" if trainer.optimizer is None else type(trainer.optimizer).__name__,
        learning_rate=_attempt(lambda: _peak(trainer), None),
        schedule=_attempt(lambda: _schedule(trainer), "unknown"),
        precision=_attempt(lambda: str(model.dtype_policy.name), "unknown"),
        backend=trainer.backend.name,
        device=trainer.backend.device_info(args.chosen_device),
        processes=current().size,
        start_step=state.global_step,
        resumed_from=_resumed_from(trainer),
        changed=args.changed(),
        versions=dict(environment(trainer.backend.name)["versions"]),
        host=platform.node(),
    )


def _epochs(trainer: Any) -> float:
    """The epochs of the updates that are planned."""
    run, state = trainer.current_run, trainer.state
    if trainer.args.max_steps <= 0:
        return float(trainer.args.num_train_epochs)
    if run is None or not run.plan.batches_per_epoch:
        return float(state.num_train_epochs)
    return float(state.max_steps / run.plan.steps_per_epoch)


def _attempt(read: Callable[[], T], otherwise: T) -> T:
    """A fact that a model or data set of the user may not be able to give."""
    try:
        return read()
    except Exception as error:
        logger.debug("A fact of the run is not known: %s: %s", type(error).__name__, error)
        return otherwise


def _size(variable: Any) -> int:
    return math.prod(variable.shape)


def _bytes(dtype: str) -> int:
    known = BYTES_OF.get(dtype)
    if known is not None:
        return known
    try:
        return np.dtype(dtype).itemsize
    except TypeError:  # strings
        return 0


def _examples(data: Any) -> int | None:
    found = getattr(data, "num_examples", None)
    if found is not None:
        return int(found)
    source = as_source(data, name="eval_dataset")
    return len(source) if source.sized else None


def _peak(trainer: Any) -> float | None:
    """The highest learning rate of the run."""
    optimizer = trainer.optimizer
    if optimizer is None:
        return None
    if trainer.given_optimizers[0] is None and not trainer.bound.compiled:
        return None if trainer.lr_scheduler is None else float(trainer.args.learning_rate)
    schedule = _rate_of(optimizer)
    if not callable(schedule) or isinstance(schedule, keras.Variable):
        return float(keras.ops.convert_to_numpy(innermost_optimizer(optimizer).learning_rate))
    total = trainer.state.max_steps
    steps = {round(total * i / 32) for i in range(33)}
    return max(float(keras.ops.convert_to_numpy(schedule(step))) for step in steps)


def _rate_of(optimizer: Any) -> Any:
    """What an optimizer takes its learning rate from: a variable or a schedule."""
    return getattr(innermost_optimizer(optimizer), "_learning_rate", None)


def _schedule(trainer: Any) -> str:
    """The name of the schedule: that of the arguments, or the class of the user's."""
    args, schedule = trainer.args, trainer.lr_scheduler
    given, own = trainer.given_optimizers
    if given is None and own is None and not trainer.bound.compiled:
        return str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    if schedule is None:
        schedule = _rate_of(trainer.optimizer)
    if schedule is None or isinstance(schedule, keras.Variable) or not callable(schedule):
        name = "constant" if not hasattr(schedule, "on_metric") else type(schedule).__name__
        return name
    return getattr(schedule, "__name__", type(schedule).__name__)
