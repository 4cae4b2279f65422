"""Arguments that do not apply to a model with a custom ``train_step``."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from kbtrain.errors import ConfigurationError

if TYPE_CHECKING:
    from kbtrain.training.trainer_base import TrainerBase
from kbtrain.model.custom_steps import check_function

logger = logging.getLogger("kbtrain")


_INSTEAD = {
    "gradient_accumulation_steps": "give it to the optimizer you compile the model with",
    "max_grad_norm": "give global_clipnorm=... to the optimizer you compile the model with",
    "parameter_groups": "give them to the optimizer you compile the model with",
    "ema": "give use_ema=True to the optimizer you compile the model with",
    "fp16": "compile the model under the dtype policy mixed_float16",
    "gradient_checkpointing": "use keras.remat in the model",
    "debug": "inspect the values in the step",
}
"""Arguments that act on losses and gradients, and what to do instead."""


def check_arguments(trainer: TrainerBase) -> None:
    """Check the arguments of a model with a custom ``train_step``, and log what it implies.

    Raises:
        ConfigurationError: An argument was set that the step would ignore, the model is not
            compiled, or it overrides more than the step.
    """
    args, model = trainer.args, trainer.model
    step = f"{type(model).__name__}.train_step"
    how = (
        "To train with the Trainer's step, override Trainer.compute_loss, which replaces the "
        "model's train_step."
    )
    trainer.backend.check_signature(model, "train_step")
    check_function(model, "train")
    if not getattr(model, "compiled", False):
        raise ConfigurationError(
            f"The model trains with its custom {step}, which uses its compiled optimizers and "
            f"losses, but it is not compiled. Call its compile() first. {how}"
        )
    for name, instead in _INSTEAD.items():
        if getattr(args, name) and args.is_set(name):
            if name == "gradient_accumulation_steps" and args.gradient_accumulation_steps == 1:
                continue
            if name == "debug" and "underflow_overflow" not in args.debug:
                continue
            raise ConfigurationError(
                f"{name}={getattr(args, name)!r} has no effect on a model that trains with its "
                f"custom {step}: {instead}. {how}"
            )
    given, schedule = trainer.given_optimizers
    if schedule is not None or given is not None and given is not model.optimizer:
        raise ConfigurationError(
            f"optimizers=... was passed, but the model trains with its custom {step} and its "
            f"compiled optimizer: compile the model with this optimizer. {how}"
        )
    logger.warning(
        "The model trains with its custom %s, as in Keras' fit: each batch is one update, the logs "
        "are what it returns, and gradients are not accumulated, clipped or measured.%s",
        step,
        " metrics=... are for evaluations only." if trainer.bound.has_given_metrics else "",
    )
