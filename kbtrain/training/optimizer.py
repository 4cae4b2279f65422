"""The optimizer and schedule of a run: from the arguments, the user, or the compiled model."""

from __future__ import annotations

import logging
from typing import Any

import keras

from kbtrain.config.training_args import TrainingArguments
from kbtrain.errors import ConfigurationError
from kbtrain.model import custom_steps, precision
from kbtrain.model.variables import unique
from kbtrain.optimization import build, metric_driven, registry
from kbtrain.optimization.division import Division, division_of, set_division
from kbtrain.optimization.factory import RATE, RULE, make_schedule
from kbtrain.training.trainer_base import TrainerBase
from kbtrain.utils.layers import innermost_optimizer
from kbtrain.utils.machine.processes import current

logger = logging.getLogger("kbtrain")


def build_optimizer(trainer: TrainerBase, max_steps: int) -> keras.optimizers.Optimizer:
    """Create a new optimizer for each ``fit``; keep one passed by the user, with its state."""
    args, former = trainer.args, trainer.lr_scheduler
    given, schedule = trainer.given_optimizers
    compiled = given is None and trainer.bound.compiled
    if compiled:
        given = trainer.model.optimizer
    trainer.lr_scheduler = schedule
    trainer.num_training_steps = max_steps
    if given is None:
        given = _made_from_arguments(trainer, max_steps)
    else:
        _refuse_for_given(args, given)
        if _is_in_use(given, trainer.optimizer):
            schedule = former
        else:
            if compiled and schedule is None:
                schedule = _apply_learning_rate(trainer, given, max_steps)
            elif schedule is not None and not metric_driven.is_metric_driven(schedule):
                given.learning_rate = schedule
            _warn_of_unused(args, given, compiled)
        trainer.lr_scheduler = metric_driven.schedule_of(given) if schedule is None else schedule
    own_step = trainer.bound.overridden.train_step
    if not own_step:
        _refuse_own_accumulation(given)
    metric_driven.attach(trainer.lr_scheduler, given, args)
    given = _scaling_losses(trainer, given, compiled)
    trainer.optimizer = given
    trainer.other_optimizers = custom_steps.optimizers_of(trainer.model) if own_step else {}
    if own_step:  # it has built its own state
        return given
    _divide_state(trainer, given)
    build.build_optimizer_state(given, trainer.model, bool(args.parameter_groups))
    return given


def _divide_state(trainer: TrainerBase, optimizer: keras.optimizers.Optimizer) -> None:
    """Decide which process keeps the optimizer's state of which variable, if they share it.

    Raises:
        ConfigurationError: The optimizer has all of its state already, or cannot be divided.
    """
    backend, model = trainer.backend, trainer.model
    if trainer.args.fsdp != "shard_grad_op" or backend.HAS_MESHES or current().size == 1:
        return
    if optimizer.built:
        if division_of(optimizer) is None:
            raise ConfigurationError(
                "fsdp='shard_grad_op' divides the state of the optimizer among the processes, and "
                f"this one ({type(optimizer).__name__}) has been built with all of it. Pass an "
                "optimizer that has not been used."
            )
        return
    # Slots may start from the weights, of which each process has drawn its own.
    backend.copy_from_first(unique(model.variables))
    set_division(optimizer, Division(backend, model, current()))


def why_total_is_needed(trainer: TrainerBase) -> str | None:
    """The argument that requires the number of updates; None if there is none."""
    args = trainer.args
    given, schedule = trainer.given_optimizers
    if schedule is None and given is None:
        from_arguments = not trainer.bound.compiled or any(args.is_set(n) for n in RATE[1:])
        factory = registry.find(registry.SCHEDULES, args.lr_scheduler_type, "lr_scheduler_type")
        overridden = type(trainer).create_scheduler is not TrainerBase.create_scheduler
        if from_arguments and overridden:
            return "the overridden create_scheduler"
        if from_arguments and registry.takes(factory, "num_training_steps"):
            return f"lr_scheduler_type={args.lr_scheduler_type!r}"
        if from_arguments and 0 < args.warmup_steps < 1:
            return f"warmup_steps={args.warmup_steps}"
    if args.num_train_epochs != int(args.num_train_epochs):
        return f"num_train_epochs={args.num_train_epochs}"
    shares = ("logging_steps", "eval_steps", "save_steps")
    return next((f"{n}={v}" for n in shares if 0 < (v := getattr(args, n) or 0) < 1), None)


def _made_from_arguments(trainer: TrainerBase, max_steps: int) -> keras.optimizers.Optimizer:
    args = trainer.args
    if trainer.lr_scheduler is None:
        trainer.lr_scheduler = trainer.create_scheduler(max_steps)
    schedule = trainer.lr_scheduler
    if (
        args.lr_scheduler_type == "constant"
        and trainer.callback_handler.may_set_learning_rate()
        and trainer.given_optimizers[1] is None
    ):  # a number, which a callback of Keras can assign
        trainer.lr_scheduler = args.learning_rate
    try:
        made = trainer.create_optimizer()
    finally:
        trainer.lr_scheduler = schedule
    build.check_optimizer(made, "create_optimizer")
    build.set_parameter_groups(made, trainer.model, args.parameter_groups)
    return build.with_average(made, args.ema)


def _refuse_for_given(args: TrainingArguments, given: Any) -> None:
    kind = type(given).__name__
    if args.ema is not None:
        raise ConfigurationError(
            "ema is for optimizers created from the arguments. This one was passed in "
            f"({kind}): wrap it yourself, as in optim.EMA(optimizer)."
        )
    if args.parameter_groups:
        raise ConfigurationError(
            "parameter_groups is for optimizers created from the arguments. This one was passed "
            f"in ({kind}): set its groups when you create it."
        )


def _refuse_own_accumulation(optimizer: Any) -> None:
    innermost = innermost_optimizer(optimizer)
    if steps := getattr(innermost, "gradient_accumulation_steps", None):
        raise ConfigurationError(
            "The Trainer accumulates gradients itself, so that padded and weighted batches count "
            "correctly and a step is an update. Leave accumulation out of the optimizer, "
            f"and set TrainingArguments(gradient_accumulation_steps={steps}). "
            f"Received: {type(innermost).__name__}(gradient_accumulation_steps={steps})."
        )


def _is_in_use(given: Any, current: Any) -> bool:
    """Whether an earlier ``fit`` of the Trainer used the optimizer, possibly with a loss scale."""
    return given is current or given is getattr(current, "inner_optimizer", None)


def _apply_learning_rate(trainer: TrainerBase, given: Any, max_steps: int) -> Any:
    """Apply the arguments' learning rate to a compiled optimizer, if it was set.

    Returns:
        The schedule, if the arguments define one.
    """
    args = trainer.args
    chosen = [name for name in RATE if args.is_set(name)]
    if not chosen:
        return None
    kind = type(given).__name__
    fixed = isinstance(given.learning_rate, keras.Variable)
    if chosen == ["learning_rate"]:
        if not fixed:
            logger.warning(
                "The model was compiled with a learning-rate schedule (%s), which is used: "
                "learning_rate=%s in the arguments has no effect.",
                kind,
                args.learning_rate,
            )
            return None
        given.learning_rate = args.learning_rate
        schedule = None
    else:
        if not args.is_set("learning_rate"):
            if not fixed:
                raise ConfigurationError(
                    f"The model was compiled with a learning-rate schedule ({kind}), but the "
                    f"arguments ask for another one. Received: {', '.join(chosen)}. Leave one of "
                    "the two out, or also set learning_rate to use the schedule of the arguments."
                )
            rate = float(keras.ops.convert_to_numpy(given.learning_rate))
            args = args.replace(learning_rate=rate)
        schedule = make_schedule(args, max_steps)
        if not metric_driven.is_metric_driven(schedule):
            given.learning_rate = schedule
    logger.warning(
        "The optimizer of the compiled model (%s) uses the learning rate of the arguments: %s.",
        kind,
        ", ".join(f"{n}={getattr(args, n)!r}" for n in RATE if n in chosen),
    )
    return schedule


def _warn_of_unused(args: TrainingArguments, given: Any, compiled: bool) -> None:
    """Warn about arguments that have no effect because an optimizer was provided."""
    names = RULE if compiled else RULE + RATE
    if unused := [name for name in names if args.is_set(name)]:
        logger.warning(
            "%s (%s), which is used: %s in the arguments have no effect. For those, %s.",
            "The model was compiled with an optimizer" if compiled else "An optimizer was given",
            type(given).__name__,
            ", ".join(unused),
            "pass a model that is not compiled" if compiled else "give none",
        )


def _scaling_losses(trainer: TrainerBase, given: Any, compiled: bool) -> Any:
    """Add a loss scale to the optimizer if the model computes in float16, as ``compile`` does.

    A compiled optimizer, or one with a constant scale, is left unchanged.
    """
    if isinstance(given, keras.optimizers.LossScaleOptimizer):
        return given
    half = precision.computes_in_float16(trainer.model)
    if half and given.loss_scale_factor is not None:
        half = False
    if not trainer.args.fp16 and (compiled or not half):
        return given
    if (
        isinstance(trainer.optimizer, keras.optimizers.LossScaleOptimizer)
        and given is trainer.optimizer.inner_optimizer
    ):
        return trainer.optimizer
    if not trainer.args.fp16:
        logger.info(
            "The model computes in float16 (mixed_float16): the loss is scaled, and updates "
            "whose gradients overflow are skipped."
        )
    return keras.optimizers.LossScaleOptimizer(given)


def clips_above(trainer: TrainerBase) -> float:
    """The global norm to which a run clips gradients; 0 for no clipping.

    The default of ``max_grad_norm`` applies to optimizers created from the arguments that do not
    clip themselves; one passed in or compiled into the model is used as configured. An explicit
    ``max_grad_norm`` applies to all.
    """
    args, optimizer = trainer.args, innermost_optimizer(trainer.optimizer)
    kind = type(optimizer).__name__
    own = [
        f"{name}={value}"
        for name in ("clipnorm", "global_clipnorm", "clipvalue")
        if (value := getattr(optimizer, name, None))
    ]
    if args.is_set("max_grad_norm"):
        if own and args.max_grad_norm > 0:
            logger.warning(
                "Gradients are clipped twice: to max_grad_norm=%s, then by %s itself (%s).",
                args.max_grad_norm,
                kind,
                ", ".join(own),
            )
        return args.max_grad_norm
    if own:
        logger.info("Gradients are clipped by %s (%s) alone.", kind, ", ".join(own))
        return 0.0
    if trainer.given_optimizers[0] is not None or trainer.bound.compiled:
        logger.info(
            "%s was passed in and does not clip gradients, so they are not clipped. Set "
            "max_grad_norm to clip them.",
            kind,
        )
        return 0.0
    return args.max_grad_norm
