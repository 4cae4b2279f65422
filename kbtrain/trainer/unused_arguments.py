"""Warnings about loss arguments that have no effect."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from types import CodeType

from kbtrain.model.method_overrides import MethodOverrides
from kbtrain.training.trainer_base import TrainerBase

logger = logging.getLogger("kbtrain")


def warn_about_unused(trainer: TrainerBase, own: MethodOverrides, overridden: bool) -> None:
    """Warn about arguments for the loss that have no effect.

    Args:
        trainer: The Trainer, with its arguments as passed.
        own: The overridden methods of its model that are used.
        overridden: Whether its ``compute_loss`` is overridden.
    """
    given = {
        "loss": trainer.given_loss is not None,
        "loss_weights": trainer.given_loss_weights is not None,
        "compute_loss_func": trainer.compute_loss_func is not None,
        "label_smoothing_factor": bool(trainer.args.label_smoothing_factor),
    }
    kind = type(trainer.model).__name__
    if given["loss_weights"] and (own.train_step or own.compute_loss or own.test_step):
        name = next(n for n in ("train_step", "compute_loss", "test_step") if getattr(own, n))
        where = " in evaluations" if name == "test_step" else ""
        logger.warning(
            "loss_weights=... is not used%s: the model has a custom %s (%s.%s), which computes the "
            "loss. Pass the weights to the model's compile if that method uses them, or leave them "
            "out.",
            where, name, kind, name,
        )  # fmt: skip
    if not overridden:
        return
    used = set(_names_in(type(trainer)))
    if "compute_loss" in used:  # by super().compute_loss
        return
    reads = {"loss": "loss", "label_smoothing_factor": "loss"}
    unused = [name for name, there in given.items() if there and reads.get(name, name) not in used]
    if unused:
        logger.warning(
            "%s %s not used: %s.compute_loss is overridden and computes the loss without %s. Call "
            "super().compute_loss in it, or leave %s out.",
            " and ".join(f"{name}=..." for name in unused),
            "is" if len(unused) == 1 else "are",
            type(trainer).__name__,
            "it" if len(unused) == 1 else "them",
            "it" if len(unused) == 1 else "them",
        )


def _names_in(trainer: type) -> Iterator[str]:
    """The attributes and globals that the code of a Trainer subclass refers to."""
    for cls in trainer.__mro__:
        if cls.__module__.partition(".")[0] in ("kbtrain", "builtins"):
            continue
        for value in vars(cls).values():
            function = inspect.unwrap(value) if callable(value) else getattr(value, "fget", None)
            if isinstance(code := getattr(function, "__code__", None), CodeType):
                yield from _names_of(code)


def _names_of(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_of(constant)
