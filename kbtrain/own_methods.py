"""Which methods of ``keras.Model`` a model overrides."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Sequence
from types import CodeType
from typing import TYPE_CHECKING, Any, NamedTuple

import keras

from kbtrain.errors import ConfigurationError

if TYPE_CHECKING:
    from kbtrain.trainer import Trainer

logger = logging.getLogger("kbtrain")


def overrides(model: Any, name: str) -> bool:
    """Whether a model has a method of its own in place of the one of ``keras.Model``."""
    own = getattr(model, name, None)
    return own is not None and getattr(own, "__func__", own) is not getattr(keras.Model, name)


class OwnMethods(NamedTuple):
    """Which methods of ``keras.Model`` a model overrides and the Trainer is to use.

    Attributes:
        compute_loss, compute_metrics: In the step of the Trainer.
        train_step: In place of that step.
        test_step: In place of the evaluation step.
        predict_step: In place of a call of the model, where outputs are asked for.
    """

    compute_loss: bool = False
    compute_metrics: bool = False
    train_step: bool = False
    test_step: bool = False
    predict_step: bool = False

    @classmethod
    def of(cls, model: Any, replaced: Sequence[str]) -> OwnMethods:
        """The methods of a model.

        Args:
            model: The model.
            replaced: What the Trainer has for the loss in place of what the model brings.

        Raises:
            ConfigurationError: The model has a ``train_step``, and the Trainer a loss.
        """
        found = {name: overrides(model, name) for name in cls._fields}
        if not replaced:
            return cls(**found)
        kind = type(model).__name__
        if replaced[0] == "loss" and (found["train_step"] or found["test_step"]):
            name = "train_step" if found["train_step"] else "test_step"
            raise ConfigurationError(
                f"The model has a {name} of its own ({kind}.{name}), which computes the loss, and "
                "loss=... was given to the Trainer. Compile the model with that loss, if its "
                f"{name} is to find it; or override Trainer.compute_loss, which replaces it."
            )
        # An overridden Trainer.compute_loss may call that of the Trainer, and so the model's.
        names = ["train_step", "test_step"]
        names += ["compute_loss"] if replaced[-1] != "Trainer.compute_loss" else []
        unused = [name for name in names if found[name]]
        if unused:
            logger.warning(
                "%s is not used, as the Trainer has its own loss (%s).",
                " and ".join(f"{kind}.{name}" for name in unused),
                replaced[0],
            )
        return cls(**(found | dict.fromkeys(unused, False)))


def say_what_is_unused(trainer: Trainer, own: OwnMethods, overridden: bool) -> None:
    """Say which arguments about the loss nothing asks for.

    Args:
        trainer: The Trainer, with the arguments as they were given.
        own: The methods of its model that are used.
        overridden: Whether its ``compute_loss`` is a user's.
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
            "loss_weights=... is not used%s: the model has a %s of its own (%s.%s), which computes "
            "the loss. Give the weights to the model's compile, if it is to find them, or leave "
            "them out.",
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
            "%s %s not used: %s.compute_loss is overridden, and computes the loss without %s. Call "
            "super().compute_loss in it, or leave %s out.",
            " and ".join(f"{name}=..." for name in unused),
            "is" if len(unused) == 1 else "are",
            type(trainer).__name__,
            "it" if len(unused) == 1 else "them",
            "it" if len(unused) == 1 else "them",
        )


def _names_in(trainer: type) -> Iterator[str]:
    """The attributes and globals that the code of a user's Trainer mentions."""
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
