"""Learning rates that answer to a metric: the door between the trainer and such a schedule.

Most schedules are functions of the step and need nothing from the trainer. One that answers to a
metric is known by what it has, whoever wrote it (``optim.ReduceLROnPlateau`` is one):

- ``rate``: the current learning rate, a float;
- ``bind(variable)``: write the rate into this variable, now and after each change;
- ``on_metric(value)``: called with ``metric_for_best_model`` after each evaluation of a run;
- ``state()`` and ``load_state(state)``: JSON values, kept in checkpoints.

The variable is the optimizer's own ``learning_rate``, which the compiled step reads: a new rate
compiles nothing, and the checkpoint has it among the optimizer's variables.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import keras

from kbtrain.callbacks.base import metric_value
from kbtrain.errors import ConfigurationError

if TYPE_CHECKING:
    from kbtrain.config.training_args import TrainingArguments

_DOOR = ("rate", "bind", "on_metric", "state", "load_state")


def is_metric_driven(schedule: Any) -> bool:
    """Whether ``schedule`` answers to a metric.

    Raises:
        ConfigurationError: It has ``on_metric``, but not all of the rest.
    """
    if not hasattr(schedule, "on_metric"):
        return False
    if missing := [name for name in _DOOR if not hasattr(schedule, name)]:
        raise ConfigurationError(
            f"A schedule that answers to a metric has {', '.join(_DOOR)}. "
            f"{type(schedule).__name__} has no {', '.join(missing)}."
        )
    return True


def learning_rate_argument(schedule: Any) -> Any:
    """What an optimizer is given as its learning rate: a number where the schedule moves it."""
    return schedule.rate if is_metric_driven(schedule) else schedule


def schedule_of(optimizer: keras.optimizers.Optimizer) -> Any:
    """The metric-driven schedule that an optimizer brings along; None if it has none."""
    while hasattr(optimizer, "inner_optimizer"):
        optimizer = optimizer.inner_optimizer
    return getattr(optimizer, "metric_schedule", None)


def attach(schedule: Any, optimizer: keras.optimizers.Optimizer, args: TrainingArguments) -> None:
    """Let a metric-driven schedule move the learning rate of ``optimizer``; others are left alone.

    Raises:
        ConfigurationError: There will be no metric to tell it, or the optimizer's learning rate
            is a function of the step already.
    """
    if not is_metric_driven(schedule):
        return
    name = type(schedule).__name__
    if args.eval_strategy == "no" or args.metric_for_best_model is None:
        raise ConfigurationError(
            f"The learning rate answers to a metric ({name}). Set metric_for_best_model, and "
            "eval_strategy='steps' or 'epoch'. "
            f"Received: metric_for_best_model={args.metric_for_best_model!r}, "
            f"eval_strategy={args.eval_strategy!r}."
        )
    rate = optimizer.learning_rate
    if not isinstance(rate, keras.Variable):
        raise ConfigurationError(
            f"{name} moves the learning rate of the optimizer, so that must be a number, not a "
            f"function of the step. Received: {type(optimizer).__name__} with a learning rate of "
            f"type {type(rate).__name__}."
        )
    schedule.bind(rate)


def report_metric(schedule: Any, args: TrainingArguments, metrics: Mapping[str, Any]) -> None:
    """Tell a metric-driven schedule the result of an evaluation; nothing to do for others."""
    if is_metric_driven(schedule):
        schedule.on_metric(metric_value(dict(metrics), args.metric_for_best_model))
