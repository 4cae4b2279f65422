"""Creates the schedule and the optimizer from the arguments."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import keras

from kbtrain.config.training_args import TrainingArguments
from kbtrain.optimization import build, metric_driven, registry, weight_decay
from kbtrain.utils.layers import innermost_optimizer

logger = logging.getLogger("kbtrain")

RATE = ("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps")
"""Arguments that define the learning rate."""

RULE = ("optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
"""Arguments that define the update rule."""


def make_schedule(args: TrainingArguments, num_training_steps: int) -> Any:
    """Create the schedule ``args.lr_scheduler_type`` for a number of updates (0 if unknown)."""
    factory = registry.find(registry.SCHEDULES, args.lr_scheduler_type, "lr_scheduler_type")
    warms_up = _warms_up(args)
    offered: dict[str, Any] = {
        "learning_rate": args.learning_rate,
        "num_warmup_steps": 0 if warms_up else args.get_warmup_steps(num_training_steps),
        "num_training_steps": num_training_steps,
    }
    if hasattr(factory, "on_metric"):
        offered["mode"] = "max" if args.greater_is_better else "min"
    takes_warmup = warms_up or registry.takes(factory, "num_warmup_steps")
    if args.warmup_steps and not takes_warmup:
        logger.warning(
            "lr_scheduler_type=%r has no warmup: warmup_steps=%s has no effect.",
            args.lr_scheduler_type,
            args.warmup_steps,
        )
    own = dict(args.lr_scheduler_kwargs or {})
    return registry.call_with_known(factory, offered, own, "lr_scheduler_kwargs")


def _warms_up(args: TrainingArguments) -> bool:
    """Whether the optimizer has its own warmup, so that the schedule must have none."""
    factory = registry.find(registry.OPTIMIZERS, args.optim, "optim")
    return registry.takes(factory, "warmup_steps") and "warmup_steps" not in (args.optim_args or {})


def make_optimizer(
    args: TrainingArguments, schedule: Any, model: keras.Model, num_training_steps: int = 0
) -> keras.optimizers.Optimizer:
    """Create the optimizer ``args.optim`` for ``model``, without decay of norms and biases.

    Args:
        args: The arguments.
        schedule: The learning rate, a number or a schedule.
        model: The built model.
        num_training_steps: Updates of the run, for an optimizer with its own warmup.
    """
    factory = registry.find(registry.OPTIMIZERS, args.optim, "optim")
    offered = {
        "learning_rate": metric_driven.learning_rate_argument(schedule),
        "weight_decay": args.weight_decay,
    }
    if _warms_up(args):
        offered["warmup_steps"] = args.get_warmup_steps(num_training_steps)
    if registry.takes(factory, "beta_1"):  # the epsilon of RMSprop or Adagrad has another meaning
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
    build.check_optimizer(optimizer, f"optim={args.optim!r}")
    weight_decay.exclude_from_decay(optimizer, model)
    return optimizer


def learning_rates(
    optimizer: keras.optimizers.Optimizer, variables: Sequence[keras.Variable]
) -> list[float]:
    """The distinct learning rates of ``variables`` in the next update."""
    rate = float(keras.ops.convert_to_numpy(optimizer.learning_rate))
    multiplier = getattr(innermost_optimizer(optimizer), "learning_rate_multiplier_of", None)
    if multiplier is None:
        return [rate]
    return list(dict.fromkeys(rate * float(multiplier(v)) for v in variables)) or [rate]
