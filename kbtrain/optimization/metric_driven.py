"""Metric-driven learning rates: the interface between the trainer and such a schedule.

Most schedules are functions of the step and need nothing from the trainer. A metric-driven
schedule, such as ``optim.ReduceLROnPlateau``, is recognised by its members:

- ``rate``: the current learning rate, a float;
- ``bind(variable)``: assign the rate to this variable, now and after each change;
- ``on_metric(value)``: called with ``metric_for_best_model`` after each evaluation of a run;
- ``state()`` and ``load_state(state)``: JSON values, saved in checkpoints.

The variable is the optimizer's ``learning_rate``, which the compiled step reads, so a new rate does
not trigger recompilation, and checkpoints contain it with the optimizer's variables.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import keras

from kbtrain.callbacks.base import metric_value
from kbtrain.errors import ConfigurationError
from kbtrain.utils.layers import innermost_optimizer

if TYPE_CHECKING:
    from kbtrain.config.training_args import TrainingArguments

_INTERFACE = ("rate", "bind", "on_metric", "state", "load_state")


def is_metric_driven(schedule: Any) -> bool:
    """Whether ``schedule`` is metric-driven.

    Raises:
        ConfigurationError: It has ``on_metric`` but lacks other members of the interface.
    """
    if not hasattr(schedule, "on_metric"):
        return False
    if missing := [name for name in _INTERFACE if not hasattr(schedule, name)]:
        raise ConfigurationError(
            f"A metric-driven schedule must have {', '.join(_INTERFACE)}. "
            f"{type(schedule).__name__} lacks {', '.join(missing)}: define them."
        )
    return True


def learning_rate_argument(schedule: Any) -> Any:
    """The optimizer's learning rate argument: a number if the schedule is metric-driven."""
    return schedule.rate if is_metric_driven(schedule) else schedule


def schedule_of(optimizer: keras.optimizers.Optimizer) -> Any:
    """The metric-driven schedule built into an optimizer; None if it has none."""
    return getattr(innermost_optimizer(optimizer), "metric_schedule", None)


def attach(schedule: Any, optimizer: keras.optimizers.Optimizer, args: TrainingArguments) -> None:
    """Bind a metric-driven schedule to the optimizer's learning rate; do nothing for others.

    Raises:
        ConfigurationError: No metric will be computed, or the optimizer's learning rate is
            already a function of the step.
    """
    if not is_metric_driven(schedule):
        return
    name = type(schedule).__name__
    if args.eval_strategy == "no" or args.metric_for_best_model is None:
        raise ConfigurationError(
            f"The learning rate is metric-driven ({name}). Set metric_for_best_model, and "
            "eval_strategy='steps' or 'epoch'. "
            f"Received: metric_for_best_model={args.metric_for_best_model!r}, "
            f"eval_strategy={args.eval_strategy!r}."
        )
    rate = optimizer.learning_rate
    if not isinstance(rate, keras.Variable):
        raise ConfigurationError(
            f"{name} sets the learning rate of the optimizer, which must be a number, not a "
            f"function of the step. Received: {type(optimizer).__name__} with a learning rate of "
            f"type {type(rate).__name__}."
        )
    schedule.bind(rate)


def report_metric(schedule: Any, args: TrainingArguments, metrics: Mapping[str, Any]) -> None:
    """Pass the result of an evaluation to a metric-driven schedule; do nothing for others."""
    if is_metric_driven(schedule):
        schedule.on_metric(metric_value(dict(metrics), args.metric_for_best_model))
