"""Checks of the Trainer's arguments that are possible before anything runs."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

import keras

from kbtrain.checkpoint.processing_class import check_processing_class
from kbtrain.config.training_args import TrainingArguments
from kbtrain.data import check_class_weight, split_for_validation
from kbtrain.distributed import placement
from kbtrain.errors import ConfigurationError
from kbtrain.evaluation.gather import check_batchwise
from kbtrain.optimization import registry
from kbtrain.plan import request as planning
from kbtrain.training.trainer_base import TrainerBase
from kbtrain.utils.layers import ends_in, walk_layers

logger = logging.getLogger("kbtrain")

FUNCTIONS = {
    "data_collator": ("(samples) -> batch", 1),
    "model_init": ("() -> keras.Model, or (trial) -> keras.Model", None),
    "compute_loss_func": ("(outputs, labels) -> loss", 2),
    "compute_metrics": ("(EvalPrediction) -> dict", 1),
    "preprocess_logits_for_metrics": ("(outputs, labels) -> outputs", 2),
}
"""Arguments that are functions: their signatures and number of positional arguments."""

BY_NAME = ("compute_result", "num_items_in_batch", "sample_weight")
"""Keyword arguments that are passed to the functions that take them."""


def check(trainer: TrainerBase, model: Any, loss: Any, callbacks: Any, optimizers: Any) -> None:
    """Check the arguments of the constructor.

    Args:
        trainer: The Trainer, with the arguments that it stores unchanged.
        model: The argument ``model``.
        loss: The argument ``loss``.
        callbacks: The argument ``callbacks``.
        optimizers: The argument ``optimizers``.

    Raises:
        ConfigurationError: An argument has the wrong type, or two arguments conflict.
    """
    args, given = trainer.args, {**vars(trainer), "model": model, "loss": loss}
    _check_args(args)
    for name, (form, positional) in FUNCTIONS.items():
        if given[name] is not None:
            _check_function(name, given[name], form, positional)
    if callbacks is not None and not isinstance(callbacks, list | tuple):
        raise ConfigurationError(
            "callbacks must be a list of callbacks. "
            f"Received: {getattr(callbacks, '__name__', type(callbacks).__name__)}."
        )
    check_class_weight(trainer.class_weight)
    _check_compute_loss(trainer)
    _check_model(given, optimizers)
    _check_loss(trainer, given)
    _warn_of_probabilities(model, loss)
    _check_evaluation(given, args)
    check_processing_class(given["processing_class"])
    if not planning.pending():  # its devices need not be here
        placement.check(trainer.backend, args)
    placement.check_processes(trainer.backend, args)
    if optimizers[0] is None:
        registry.find(registry.OPTIMIZERS, args.optim, "optim")
    schedule = registry.find(registry.SCHEDULES, args.lr_scheduler_type, "lr_scheduler_type")
    registry.check_names(schedule, args.lr_scheduler_kwargs, "lr_scheduler_kwargs")


def _check_args(args: Any) -> None:
    """Check that ``args`` is a ``TrainingArguments`` of kbtrain."""
    if isinstance(args, TrainingArguments):
        return
    kind, remedy = type(args), ""
    if kind.__module__.partition(".")[0] == "transformers":
        remedy = (
            " It comes from transformers: import it from kbtrain, or convert it with "
            "TrainingArguments.from_dict(args.to_dict())."
        )
    elif isinstance(args, Mapping):
        remedy = " Use TrainingArguments(**args)."
    elif isinstance(args, str | os.PathLike):
        remedy = " Use TrainingArguments(output_dir)."
    elif kind is tuple or hasattr(args, "shape"):
        remedy = " Pass data by name: train_dataset=(x, y)."
    raise ConfigurationError(
        f"args must be a TrainingArguments. Received: {kind.__qualname__}.{remedy}"
    )


def _check_loss(trainer: TrainerBase, given: Mapping[str, Any]) -> None:
    """Check that there is a loss, as far as possible without a batch.

    A custom model, layer, regularizer or Trainer may add a loss or return one; a model of plain
    Keras layers cannot.
    """
    model = given["model"]
    if model is None or given["train_dataset"] is None:
        return
    if given["loss"] is not None or given["compute_loss_func"] is not None:
        return
    overridden = type(trainer).compute_loss is not TrainerBase.compute_loss
    if overridden or getattr(model, "loss", None) is not None:
        return
    if isinstance(model, keras.Model) and _adds_no_loss(model):
        raise ConfigurationError(
            "There is no loss to train with: pass loss=... (such as 'mse') or "
            "compute_loss_func=... to the Trainer, or compile the model with one. A Trainer that "
            "only predicts needs no train_dataset."
        )


def _adds_no_loss(model: keras.Model) -> bool:
    """Whether a model consists of plain Keras layers, none of which adds or returns a loss."""
    for part in walk_layers(model):
        if type(part).__module__.partition(".")[0] != "keras":
            return False
        if any(v is not None for name, v in vars(part).items() if name.endswith("_regularizer")):
            return False
    outputs = None if isinstance(model, keras.Sequential) else model.output
    return not (isinstance(outputs, Mapping) and "loss" in outputs)


def datasets(
    train_dataset: Any, eval_dataset: Any, validation_split: Any, strings: bool
) -> tuple[Any, Any]:
    """The training and the evaluation data, after ``validation_split``.

    Args:
        train_dataset: The argument of the Trainer.
        eval_dataset: The argument of the Trainer.
        validation_split: The argument of the Trainer.
        strings: Whether models may take strings and ragged tensors.

    Raises:
        ConfigurationError: There already is an evaluation set, or the data cannot be split.
    """
    if validation_split is None or validation_split == 0:
        return train_dataset, eval_dataset
    if eval_dataset is not None:
        raise ConfigurationError(
            "Pass either eval_dataset or validation_split, not both. "
            f"Received: validation_split={validation_split!r}."
        )
    return split_for_validation(train_dataset, validation_split, strings)


def check_fit(trainer: TrainerBase, checkpoint: Any) -> None:
    """Check that ``fit`` is not running and that ``resume_from_checkpoint`` is not data.

    Raises:
        ConfigurationError: A ``fit`` is running, or the checkpoint is neither a path nor True,
            False or None.
    """
    if trainer.is_in_train:
        raise ConfigurationError("fit() was called while fit() is running, perhaps by a callback.")
    if checkpoint is not None and not isinstance(checkpoint, bool | str | os.PathLike):
        raise ConfigurationError(
            "fit(resume_from_checkpoint) takes True, 'auto' or the path of a checkpoint. The data "
            "belongs to the Trainer: Trainer(model, args, train_dataset=(x, y)). "
            f"Received: {type(checkpoint).__name__}."
        )


def _check_function(name: str, function: Any, form: str, positional: int | None) -> None:
    """Check that a function has the required signature."""
    made = positional is not None and isinstance(function, type)  # model_init may be a class
    if not callable(function) or made:
        kind = function.__name__ if isinstance(function, type) else type(function).__name__
        what = "the class " if isinstance(function, type) else ""
        raise ConfigurationError(f"{name} must be a function {form}. Received: {what}{kind}.")
    if positional is None:
        return
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # no signature, as for compiled code: the call will raise
        return
    named = {n: None for n in BY_NAME if n in signature.parameters}
    try:
        signature.bind(*[None] * positional, **named)
    except TypeError as problem:
        raise ConfigurationError(
            f"{name} must be a function {form}. Received: one with the arguments {signature}: "
            f"{problem}."
        ) from None


def _check_compute_loss(trainer: TrainerBase) -> None:
    """Check the signature of an overridden ``compute_loss``; the last argument may be missing."""
    signature = inspect.signature(trainer.compute_loss)
    try:
        signature.bind(None, None, return_outputs=True)
    except TypeError as problem:
        raise ConfigurationError(
            f"{type(trainer).__name__}.compute_loss must be defined as compute_loss(self, model, "
            "inputs, return_outputs=False, num_items_in_batch=None). "
            f"Received: compute_loss{signature}: {problem}."
        ) from None


def adapt_compute_loss(compute_loss: Callable[..., Any]) -> Callable[..., Any]:
    """Adapt a ``compute_loss`` written without ``num_items_in_batch``, as many are."""
    parameters = inspect.signature(compute_loss).parameters.values()
    if any(p.name == "num_items_in_batch" or p.kind is p.VAR_KEYWORD for p in parameters):
        return compute_loss

    def called(model: Any, inputs: Any, return_outputs: bool, num_items_in_batch: Any) -> Any:
        return compute_loss(model, inputs, return_outputs=return_outputs)

    return called


def _check_model(given: Mapping[str, Any], optimizers: Any) -> None:
    """Check the model, the optimizers and the loss."""
    model_init = given["model_init"]
    if (given["model"] is None) == (model_init is None):
        which = "neither" if model_init is None else "both"
        raise ConfigurationError(f"Pass either model or model_init. Received: {which}.")
    if not isinstance(optimizers, tuple | list) or len(optimizers) != 2:
        raise ConfigurationError(
            f"optimizers must be a pair (optimizer, schedule). Received: {optimizers!r}."
        )
    optimizer, schedule = optimizers
    if model_init is not None and (optimizer is not None or schedule is not None):
        raise ConfigurationError(
            "optimizers cannot be combined with model_init: each new model needs a new "
            "optimizer. Override create_optimizer instead."
        )
    if optimizer is not None and not isinstance(optimizer, keras.optimizers.Optimizer):
        raise ConfigurationError(
            "optimizers[0] must be a keras.optimizers.Optimizer. "
            f"Received: {type(optimizer).__name__}."
        )
    is_schedule = isinstance(schedule, keras.optimizers.schedules.LearningRateSchedule)
    if not (schedule is None or is_schedule or hasattr(schedule, "on_metric")):
        raise ConfigurationError(
            "optimizers[1] must be a keras.optimizers.schedules.LearningRateSchedule, such as "
            "those of optim, or None. A constant learning rate belongs to the optimizer. "
            f"Received: {type(schedule).__name__}."
        )
    if given["loss"] is not None and given["compute_loss_func"] is not None:
        raise ConfigurationError("Pass either loss or compute_loss_func, not both.")


def _warn_of_probabilities(model: keras.Model, loss: Any) -> None:
    """Warn if a loss that expects logits gets probabilities: it trains, but badly."""
    if not getattr(loss, "from_logits", False) or len(getattr(model, "outputs", None) or ()) != 1:
        return
    for activation in ("softmax", "sigmoid"):
        if ends_in(model, activation):
            logger.warning(
                "%s(from_logits=True) expects logits, and the model ends in a %s. Leave out one of "
                "the two.",
                type(loss).__name__,
                activation,
            )


def _check_evaluation(given: Mapping[str, Any], args: TrainingArguments) -> None:
    """Check the arguments that concern evaluation."""
    if given["eval_dataset"] is None:
        wanted = {
            "eval_strategy": args.eval_strategy if args.eval_strategy != "no" else None,
            "eval_minutes": args.eval_minutes,
            "eval_on_start": args.eval_on_start or None,
        }
        for name, value in wanted.items():
            if value is not None:
                raise ConfigurationError(f"{name}={value!r} needs an eval_dataset. Received: None.")
    if args.prediction_loss_only and given["compute_metrics"] is not None:
        logger.warning(
            "compute_metrics is not called in evaluations, because prediction_loss_only=True keeps "
            "the outputs on the device. Leave one of the two out."
        )
    if args.batch_eval_metrics:
        check_batchwise(given["compute_metrics"])
    if args.predict_with_generate and given["preprocess_logits_for_metrics"] is not None:
        raise ConfigurationError(
            "preprocess_logits_for_metrics processes the model's outputs, but with "
            "predict_with_generate=True compute_metrics receives the generated sequences. Move the "
            "processing to compute_metrics."
        )
