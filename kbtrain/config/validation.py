"""The checks of ``TrainingArguments``: each field by its kind, then all of them together.

``check_consistency`` holds every rule that involves more than one field; there is no other place.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from kbtrain.config.converters import FrozenDict, Unfit, shown, steps
from kbtrain.errors import ConfigurationError
from kbtrain.utils.local_path import check_local

if TYPE_CHECKING:
    from kbtrain.config.training_args import TrainingArguments


METRIC_DRIVEN = ("reduce_lr_on_plateau", "greedy")
"""Names of schedules that answer to ``metric_for_best_model`` after each evaluation."""


SYNONYMS = (
    ("gradient_checkpointing", "activation_checkpointing"),
    ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"),
)
"""Fields of one meaning: one of a pair may be given, both hold it."""


def normalise(field: dataclasses.Field[Any], value: Any) -> Any:
    """The form in which a field stores a value.

    Args:
        field: A field of ``TrainingArguments``; its metadata carries ``"kind"`` and ``"help"``.
        value: What the user gave.

    Returns:
        The checked, converted and immutable value.

    Raises:
        ConfigurationError: If the field's kind refuses the value.
    """
    kind = field.metadata.get("kind")
    if kind is None:  # a subclass may add plain dataclass fields
        return value
    try:
        return kind(value)
    except Unfit as refusal:
        raise ConfigurationError(
            f"`{field.name}` must be {refusal}. Received: {field.name}={shown(value)} "
            f"(type {type(value).__name__}).{_hint(value, str(refusal))} "
            f"Meaning: {field.metadata['help']}"
        ) from None


def _hint(value: Any, expected: str) -> str:
    """A remark for those whose configuration file turned a number into text."""
    if not isinstance(value, str) or "number" not in expected:
        return ""
    try:
        float(value)
    except ValueError:
        return ""
    return " A number was written as text: drop the quotes (YAML takes 3e-4 for text, 3.0e-4 not)."


def derived_values(args: TrainingArguments) -> dict[str, Any]:
    """The fields left at None whose value follows from other fields."""
    derived: dict[str, Any] = {}
    if args.eval_strategy == "steps" and args.eval_steps is None:
        derived["eval_steps"] = args.logging_steps
    if args.eval_strategy != "no":
        derived["do_eval"] = True
    for one, other in SYNONYMS:
        given = [value for value in (getattr(args, one), getattr(args, other)) if value is not None]
        if len(given) == 2 and given[0] != given[1]:
            raise ConfigurationError(
                f"{one} and {other} are two names of one setting. Received: {one}={given[0]!r}, "
                f"{other}={given[1]!r}. Give one of them."
            )
        default: Any = FrozenDict() if one.endswith("kwargs") else False
        derived[one] = derived[other] = given[0] if given else default
    metric = args.metric_for_best_model
    needed = (
        args.load_best_model_at_end
        or args.save_strategy == "best"
        or args.lr_scheduler_type in METRIC_DRIVEN
    )
    if metric is None and needed:
        derived["metric_for_best_model"] = metric = "loss"
    if metric is not None and args.greater_is_better is None:
        derived["greater_is_better"] = not metric.endswith("loss")
    return derived


def check_consistency(args: TrainingArguments) -> None:
    """Refuse combinations of fields that cannot work. Every cross-field rule is in here.

    Args:
        args: Arguments whose fields have been normalised one by one and derived.

    Raises:
        ConfigurationError: If two or more fields contradict each other.
    """
    check_local("output_dir", args.output_dir)
    check_local("resume_from_checkpoint", args.resume_from_checkpoint)
    if args.max_steps == -1 and args.num_train_epochs <= 0:
        raise ConfigurationError(
            "`num_train_epochs` must be above 0 unless `max_steps` sets the length of the run. "
            f"Received: num_train_epochs={args.num_train_epochs}, max_steps=-1. "
            "Give num_train_epochs > 0 or max_steps > 0."
        )
    for event in ("logging", "eval", "save"):
        strategy, every = getattr(args, f"{event}_strategy"), getattr(args, f"{event}_steps")
        if strategy == "steps" and every == 0:
            raise ConfigurationError(
                f"`{event}_steps` must not be 0 when {event}_strategy='steps'. "
                f"Received: {event}_steps=0. Give a number of steps, or set "
                f"{event}_strategy='no' to turn it off."
            )
    if args.dataloader_persistent_workers and args.dataloader_num_workers == 0:
        raise ConfigurationError(
            "`dataloader_persistent_workers` keeps worker processes, and there are none. "
            "Received: dataloader_persistent_workers=True, dataloader_num_workers=0. "
            "Set dataloader_num_workers to 1 or more."
        )
    if args.save_strategy == "best" and args.eval_strategy == "no":
        raise ConfigurationError(
            "save_strategy='best' saves after an evaluation that improved "
            f"`metric_for_best_model`={args.metric_for_best_model!r}, but nothing is evaluated. "
            "Received: save_strategy='best', eval_strategy='no'. "
            "Set eval_strategy='steps' or eval_strategy='epoch'."
        )
    if args.lr_scheduler_type in METRIC_DRIVEN and args.eval_strategy == "no":
        raise ConfigurationError(
            f"lr_scheduler_type={args.lr_scheduler_type!r} answers to the results of evaluations, "
            f"but nothing is evaluated. Received: lr_scheduler_type={args.lr_scheduler_type!r}, "
            "eval_strategy='no'. Set eval_strategy='steps' or eval_strategy='epoch'."
        )
    generation = [n for n in ("max_length", "kwargs") if getattr(args, f"generation_{n}")]
    if generation and not args.predict_with_generate:
        raise ConfigurationError(
            "Nothing is generated without predict_with_generate=True. Received: "
            + ", ".join(f"generation_{n}={getattr(args, f'generation_{n}')!r}" for n in generation)
            + ", predict_with_generate=False. Set it to True, or leave the others out."
        )
    if args.generation_max_length is not None and "max_length" in args.generation_kwargs:
        raise ConfigurationError(
            "The longest length is given twice. Received: generation_max_length="
            f"{args.generation_max_length}, generation_kwargs={dict(args.generation_kwargs)}. "
            "Leave out one of them."
        )
    if args.optim_target_modules is not None and "target_modules" in args.optim_args:
        raise ConfigurationError(
            "`optim_target_modules` is the same as target_modules in `optim_args`, and both are "
            f"set. Received: optim_target_modules={list(args.optim_target_modules)}, "
            f"optim_args={shown(args.optim_args)}. Leave one out."
        )
    if args.bf16 and args.fp16:
        raise ConfigurationError(
            "The model computes in one precision. Received: bf16=True, fp16=True. Keep bf16=True "
            "where the device has bfloat16 (it needs no loss scale), else fp16=True."
        )
    if args.debug and args.on_nonfinite != "raise":
        raise ConfigurationError(
            "debug='underflow_overflow' explains the error of on_nonfinite='raise'. Received: "
            f"on_nonfinite={args.on_nonfinite!r}. Leave one of them out."
        )
    if args.bf16_full_eval and args.fp16_full_eval:
        raise ConfigurationError(
            "An evaluation computes in one precision. Received: bf16_full_eval=True, "
            "fp16_full_eval=True. Keep one of them."
        )
    if args.use_cpu and args.devices is not None and not args.devices.startswith("cpu"):
        raise ConfigurationError(
            "use_cpu=True and devices name two different devices. Received: use_cpu=True, "
            f"devices={args.devices!r}. Leave one of them out."
        )
    if args.load_best_model_at_end and args.save_minutes is not None:
        raise ConfigurationError(
            "load_best_model_at_end=True needs checkpoints of evaluated steps, and the clock saves "
            f"at any. Received: save_minutes={args.save_minutes}. Set save_minutes=None."
        )
    if args.load_best_model_at_end and args.save_strategy != "best":
        _check_best_model_is_saved(args)


def _check_best_model_is_saved(args: TrainingArguments) -> None:
    """Part of `check_consistency`: every saved step must be one that was evaluated."""
    if args.eval_strategy == "no" or args.save_strategy != args.eval_strategy:
        raise ConfigurationError(
            "load_best_model_at_end=True needs checkpoints of evaluated steps. "
            f"Received: save_strategy={args.save_strategy!r}, eval_strategy={args.eval_strategy!r}."
            " Give both the same value ('steps' or 'epoch'), or set save_strategy='best' with "
            "either of them as eval_strategy."
        )
    if args.save_strategy == "steps":
        assert args.eval_steps is not None  # derived above
        every = [args.save_steps, args.eval_steps]
        if args.max_steps > 0:
            every = [resolve_steps(value, args.max_steps) for value in every]
        check_saves_follow_evaluations(*every)


def check_saves_follow_evaluations(save_steps: float, eval_steps: float) -> None:
    """Refuse a saving interval that is not a multiple of the evaluation interval.

    Rounding can part two ratios that fit (0.2 and 0.1 of 24 steps are 5 and 3), so this is called
    with the ratios when the number of steps is not known yet and again with the resolved steps.

    Args:
        save_steps: Steps, or ratio of all steps, between two checkpoints.
        eval_steps: Steps, or ratio of all steps, between two evaluations.

    Raises:
        ConfigurationError: If a checkpoint would be written at a step without an evaluation.
    """
    if save_steps >= 1 and eval_steps >= 1:
        fits = save_steps % eval_steps == 0
    elif save_steps < 1 and eval_steps < 1:
        times = save_steps / eval_steps
        fits = math.isclose(times, round(times))
    else:
        fits = False
    if not fits:
        raise ConfigurationError(
            "load_best_model_at_end=True needs `save_steps` to be a multiple of `eval_steps`, both "
            "in steps or both as ratios, so that every checkpoint has an evaluation. "
            f"Received: save_steps={save_steps}, eval_steps={eval_steps}. "
            "Set save_steps to eval_steps times a whole number, or use save_strategy='best'."
        )


def resolve_steps(value: float, max_steps: int) -> int:
    """The number of steps that a count or a ratio stands for.

    Args:
        value: Steps (0 or at least 1), or a ratio of `max_steps` (above 0 and below 1).
        max_steps: All update steps of the run; only used for ratios.

    Returns:
        `value` itself as an int, or ``ceil(value * max_steps)``. A product that is whole but for
        the rounding of floats counts as whole: 0.07 of 100 is 7, although ``0.07 * 100 > 7``.

    Raises:
        ConfigurationError: If `value` is neither, or if a ratio meets an unknown `max_steps`.

    Example:
        >>> resolve_steps(500, 24), resolve_steps(0.1, 24)
        (500, 3)
    """
    try:
        value = steps(value)
    except Unfit as refusal:
        raise ConfigurationError(f"`value` must be {refusal}. Received: value={value!r}") from None
    if not 0 < value < 1:
        return int(value)
    if max_steps < 1:
        raise ConfigurationError(
            "A ratio of all steps needs the number of steps, which must be at least 1. "
            f"Received: value={value}, max_steps={max_steps}. Give a number of steps instead."
        )
    product = value * max_steps
    nearest = round(product)
    if nearest > 0 and math.isclose(product, nearest, rel_tol=1e-12):
        return nearest
    return math.ceil(product)
