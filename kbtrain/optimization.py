"""From the arguments to a schedule and an optimizer, and the learning rates of one."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from typing import Any

import keras

from kbtrain import building, metric_schedule, registry
from kbtrain.training_args import TrainingArguments

logger = logging.getLogger("kbtrain")


def make_schedule(args: TrainingArguments, num_training_steps: int) -> Any:
    """The schedule ``args.lr_scheduler_type`` for a run of that many updates."""
    factory = registry.find(registry.SCHEDULES, args.lr_scheduler_type, "lr_scheduler_type")
    offered: dict[str, Any] = {
        "learning_rate": args.learning_rate,
        "num_warmup_steps": args.get_warmup_steps(num_training_steps),
        "num_training_steps": num_training_steps,
    }
    if hasattr(factory, "on_metric"):
        offered["mode"] = "max" if args.greater_is_better else "min"
    if args.warmup_steps and "num_warmup_steps" not in inspect.signature(factory).parameters:
        logger.warning(
            "lr_scheduler_type=%r has no warmup: warmup_steps=%s has no effect.",
            args.lr_scheduler_type,
            args.warmup_steps,
        )
    own = dict(args.lr_scheduler_kwargs or {})
    return registry.call_with_known(factory, offered, own, "lr_scheduler_kwargs")


def make_optimizer(
    args: TrainingArguments, schedule: Any, model: keras.Model
) -> keras.optimizers.Optimizer:
    """The optimizer ``args.optim`` for ``model``; it does not decay norms and biases."""
    factory = registry.find(registry.OPTIMIZERS, args.optim, "optim")
    offered = {
        "learning_rate": metric_schedule.learning_rate_argument(schedule),
        "weight_decay": args.weight_decay,
    }
    if registry.takes(factory, "beta_1"):  # RMSprop's or Adagrad's epsilon is another
        offered |= {
            "beta_1": args.adam_beta1,
            "beta_2": args.adam_beta2,
            "epsilon": args.adam_epsilon,
        }
    own = dict(args.optim_args or {})
    if args.optim_target_modules is not None:
        registry.check_takes(factory, "target_modules", args.optim, "optim_target_modules")
        own["target_modules"] = list(args.optim_target_modules)
    optimizer = registry.call_with_known(factory, offered, own, "optim_args")
    building.check_optimizer(optimizer, f"optim={args.optim!r}")
    building.exclude_from_decay(optimizer, model)
    return optimizer


def learning_rates(
    optimizer: keras.optimizers.Optimizer, variables: Sequence[keras.Variable]
) -> list[float]:
    """The learning rates of the next update, each that some of ``variables`` have once."""
    rate = float(keras.ops.convert_to_numpy(optimizer.learning_rate))
    while hasattr(optimizer, "inner_optimizer"):
        optimizer = optimizer.inner_optimizer
    multiplier = getattr(optimizer, "learning_rate_multiplier_of", None)
    if multiplier is None:
        return [rate]
    return list(dict.fromkeys(rate * float(multiplier(v)) for v in variables)) or [rate]
