"""Validation of ``TrainingArguments``: each field by its converter, then all of them together.

``check_consistency`` has every rule that involves more than one field.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from kbtrain.config.converters import FrozenDict, InvalidValue, shown, steps
from kbtrain.config.fields import Fields
from kbtrain.errors import ConfigurationError
from kbtrain.utils.files.addresses import check_address

METRIC_DRIVEN = ("reduce_lr_on_plateau", "greedy")
"""Schedules that are driven by ``metric_for_best_model`` after each evaluation."""

SYNONYMS = (
    ("gradient_checkpointing", "activation_checkpointing"),
    ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"),
)
"""Pairs of fields with the same meaning: either may be given, both store the value."""


def normalise(field: dataclasses.Field[Any], value: Any) -> Any:
    """Convert a value to the form that a field stores.

    Args:
        field: A field of ``TrainingArguments``; its metadata has ``"converter"`` and ``"help"``.
        value: The value from the user.

    Returns:
        The checked, converted and immutable value.

    Raises:
        ConfigurationError: The field's converter rejects the value.
    """
    converter = field.metadata.get("converter")
    if converter is None:  # a subclass may add plain dataclass fields
        return value
    try:
        return converter(value)
    except InvalidValue as refusal:
        written = f"<{field.name.upper()}>" if field.metadata.get("secret") else shown(value)
        raise ConfigurationError(
            f"`{field.name}` must be {refusal}. Received: {field.name}={written} "
            f"(type {type(value).__name__}).{_hint(value, str(refusal))} "
            f"Meaning: {field.metadata['help']}"
        ) from None


def _hint(value: Any, expected: str) -> str:
    """A hint for a number that a configuration file turned into a string."""
    if not isinstance(value, str) or "number" not in expected:
        return ""
    try:
        float(value)
    except ValueError:
        return ""
    return " The number is a string: remove the quotes (in YAML 3e-4 is a string, 3.0e-4 is not)."


def derived_values(args: Fields) -> dict[str, Any]:
    """The values of fields that were left at None and follow from other fields."""
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
                f"{other}={given[1]!r}. Set only one of them."
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


def check_consistency(args: Fields) -> None:
    """Reject combinations of fields that cannot work. Every cross-field rule is here.

    Args:
        args: Arguments whose fields have been normalized and derived.

    Raises:
        ConfigurationError: Two or more fields contradict each other.
    """
    check_address("output_dir", args.output_dir)
    check_address("resume_from_checkpoint", args.resume_from_checkpoint)
    if args.max_steps == -1 and args.num_train_epochs <= 0:
        raise ConfigurationError(
            "`num_train_epochs` must be above 0 unless `max_steps` sets the length of the run. "
            f"Received: num_train_epochs={args.num_train_epochs}, max_steps=-1. "
            "Set num_train_epochs > 0 or max_steps > 0."
        )
    for event in ("logging", "eval", "save"):
        strategy, every = getattr(args, f"{event}_strategy"), getattr(args, f"{event}_steps")
        if strategy == "steps" and every == 0:
            raise ConfigurationError(
                f"`{event}_steps` must not be 0 when {event}_strategy='steps'. "
                f"Received: {event}_steps=0. Set a number of steps, or turn it off with "
                f"{event}_strategy='no'."
            )
    if args.dataloader_persistent_workers and args.dataloader_num_workers == 0:
        raise ConfigurationError(
            "`dataloader_persistent_workers` needs worker processes to keep, and there are none. "
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
            f"lr_scheduler_type={args.lr_scheduler_type!r} is driven by evaluation results, but "
            f"nothing is evaluated. Received: lr_scheduler_type={args.lr_scheduler_type!r}, "
            "eval_strategy='no'. Set eval_strategy='steps' or eval_strategy='epoch'."
        )
    generation = [n for n in ("max_length", "kwargs") if getattr(args, f"generation_{n}")]
    if generation and not args.predict_with_generate:
        raise ConfigurationError(
            "Nothing is generated without predict_with_generate=True. Received: "
            + ", ".join(f"generation_{n}={getattr(args, f'generation_{n}')!r}" for n in generation)
            + ", predict_with_generate=False. Set it to True, or remove the others."
        )
    if args.generation_max_length is not None and "max_length" in args.generation_kwargs:
        raise ConfigurationError(
            "The maximum length is set twice. Received: generation_max_length="
            f"{args.generation_max_length}, generation_kwargs={dict(args.generation_kwargs)}. "
            "Remove one of them."
        )
    if args.optim_target_modules is not None and "target_modules" in args.optim_args:
        raise ConfigurationError(
            "`optim_target_modules` and target_modules in `optim_args` are the same setting, and "
            f"both are set. Received: optim_target_modules={list(args.optim_target_modules)}, "
            f"optim_args={shown(args.optim_args)}. Remove one of them."
        )
    if args.bf16 and args.fp16:
        raise ConfigurationError(
            "A model computes in one precision. Received: bf16=True, fp16=True. Keep bf16=True "
            "where the device supports bfloat16 (it needs no loss scale), otherwise fp16=True."
        )
    if args.cuda_graphs is True and args.jit_compile is False:
        raise ConfigurationError(
            "A CUDA graph is made of a captured step, and jit_compile=False captures none. "
            "Received: cuda_graphs=True, jit_compile=False. Remove one of them."
        )
    if "underflow_overflow" in args.debug and args.on_nonfinite != "raise":
        raise ConfigurationError(
            "debug='underflow_overflow' explains the error of on_nonfinite='raise'. Received: "
            f"on_nonfinite={args.on_nonfinite!r}. Remove one of them."
        )
    if args.bf16_full_eval and args.fp16_full_eval:
        raise ConfigurationError(
            "An evaluation computes in one precision. Received: bf16_full_eval=True, "
            "fp16_full_eval=True. Keep one of them."
        )
    if args.use_cpu and args.devices is not None and not args.devices.startswith("cpu"):
        raise ConfigurationError(
            "use_cpu=True and devices name two different devices. Received: use_cpu=True, "
            f"devices={args.devices!r}. Remove one of them."
        )
    if args.load_best_model_at_end and args.save_minutes is not None:
        raise ConfigurationError(
            "load_best_model_at_end=True needs checkpoints of evaluated steps, but save_minutes "
            f"saves at any step. Received: save_minutes={args.save_minutes}. Set save_minutes=None."
        )
    if args.load_best_model_at_end and args.save_strategy != "best":
        _check_best_model_is_saved(args)


def _check_best_model_is_saved(args: Fields) -> None:
    """Part of ``check_consistency``: every saved step must be an evaluated one."""
    if args.eval_strategy == "no" or args.save_strategy != args.eval_strategy:
        raise ConfigurationError(
            "load_best_model_at_end=True needs checkpoints of evaluated steps. "
            f"Received: save_strategy={args.save_strategy!r}, eval_strategy={args.eval_strategy!r}."
            " Set both to the same value ('steps' or 'epoch'), or set save_strategy='best' with "
            "either value of eval_strategy."
        )
    if args.save_strategy == "steps":
        assert args.eval_steps is not None  # derived above
        every = [args.save_steps, args.eval_steps]
        if args.max_steps > 0:
            every = [resolve_steps(value, args.max_steps) for value in every]
        check_saves_follow_evaluations(*every)


def check_saves_follow_evaluations(save_steps: float, eval_steps: float) -> None:
    """Reject a save interval that is not a multiple of the evaluation interval.

    Two ratios that fit may not fit after rounding (0.2 and 0.1 of 24 steps are 5 and 3 steps), so
    this is called with the ratios while the number of steps is unknown and again with the steps.

    Args:
        save_steps: Steps, or ratio of all steps, between two checkpoints.
        eval_steps: Steps, or ratio of all steps, between two evaluations.

    Raises:
        ConfigurationError: A checkpoint would be saved at a step without an evaluation.
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
            "in steps or both as ratios, so that every checkpoint has been evaluated. "
            f"Received: save_steps={save_steps}, eval_steps={eval_steps}. "
            "Set save_steps to an integer multiple of eval_steps, or use save_strategy='best'."
        )


def resolve_steps(value: float, max_steps: int) -> int:
    """Convert a number of steps or a ratio of all steps to a number of steps.

    Args:
        value: Steps (0 or at least 1), or a ratio of ``max_steps`` (above 0 and below 1).
        max_steps: Total number of update steps; used for ratios only.

    Returns:
        ``value`` as an int, or ``ceil(value * max_steps)``. A product that is an integer up to
        floating-point rounding is not rounded up: 0.07 of 100 is 7, although ``0.07 * 100 > 7``.

    Raises:
        ConfigurationError: ``value`` is neither, or it is a ratio and ``max_steps`` is unknown.

    Example:
        >>> resolve_steps(500, 24), resolve_steps(0.1, 24)
        (500, 3)
    """
    try:
        value = steps(value)
    except InvalidValue as refusal:
        raise ConfigurationError(f"`value` must be {refusal}. Received: value={value!r}") from None
    if not 0 < value < 1:
        return int(value)
    if max_steps < 1:
        raise ConfigurationError(
            "A ratio of all steps needs the total number of steps, which must be at least 1. "
            f"Received: value={value}, max_steps={max_steps}. Set a number of steps instead."
        )
    product = value * max_steps
    nearest = round(product)
    if nearest > 0 and math.isclose(product, nearest, rel_tol=1e-12):
        return nearest
    return math.ceil(product)
