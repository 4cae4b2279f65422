"""The objects, settings and functions that determine the steps of a Trainer."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import keras

from kbtrain.tracing.frozen_values import PLAIN, is_changeable
from kbtrain.tracing.names import ValueSource
from kbtrain.utils.layers import walk_layers

_OURS = ("keras", "kbtrain", "optim")
_BOOKKEEPING = frozenset(
    ["built", "call", "name", "stop_training", "supports_jit", "supports_masking"]
)
"""Settings of Keras objects that do not affect what they compute."""

Note = Callable[[Any, str, Any], None]


class Subject(Protocol):
    """The parts of a Trainer that determine its steps."""

    bound: Any
    state: Any
    given_metrics: Any
    optimizer: Any
    compute_loss_func: Any
    preprocess_logits_for_metrics: Any
    callback_handler: Any
    is_in_train: bool

    @property
    def model(self) -> Any:
        """The model in training."""

    @property
    def compute_loss(self) -> Any:
        """Compute the loss of one micro-batch."""


def is_setting(value: Any) -> bool:
    """Whether another value of this kind would change a step that has read it."""
    if isinstance(value, (*PLAIN, types.FunctionType, keras.layers.Layer)):
        return True
    return is_changeable(value) or keras.ops.is_tensor(value)


def owners(trainer: Subject) -> list[Any]:
    """The objects whose code runs in a step."""
    bound = trainer.bound
    found = [
        trainer,
        trainer.state,
        trainer.compute_loss_func,
        trainer.preprocess_logits_for_metrics,
        *walk_layers(bound.model),
        *keras.tree.flatten(bound.loss),
        *keras.tree.flatten(trainer.given_metrics),
        *bound.model.metrics,
        *optimizers(trainer.optimizer),
        *trainer.callback_handler.callbacks,
    ]
    return list({id(x): x for x in found if x is not None and not isinstance(x, str)}.values())


def optimizers(optimizer: Any) -> list[Any]:
    """An optimizer, those it wraps, and their schedules."""
    found: list[Any] = []
    while optimizer is not None:
        found.append(optimizer)
        schedule = vars(optimizer).get("_learning_rate")
        if isinstance(schedule, keras.optimizers.schedules.LearningRateSchedule):
            found.append(schedule)
        optimizer = getattr(optimizer, "inner_optimizer", None)
    return found


def is_own_class(cls: type, of: tuple[str, ...] = _OURS) -> bool:
    """Whether a class belongs to Keras or to one of our packages."""
    return cls.__module__.partition(".")[0] in of


def is_extended(trainer: Subject) -> bool:
    """Whether methods of the Trainer may be overridden by the user."""
    return not is_own_class(type(trainer))


def watched_classes(trainer: Subject) -> list[type]:
    """The classes, of users and other packages, whose attribute reads are recorded.

    Classes of Keras have a fixed set of public settings, which are compared instead.
    """
    classes = {type(x) for x in owners(trainer)}
    state = type(trainer.state)
    return [
        cls
        for cls in classes
        if (cls is state or not is_own_class(cls))
        and not isinstance(cls, types.FunctionType)
        and cls.__module__ not in ("builtins", "functools")
    ]


@contextlib.contextmanager
def intercepted(classes: Iterable[type], note: Note) -> Iterator[None]:
    """Context in which ``note(object, name, value)`` is called for each attribute that is read."""
    ignored = _ignored()
    replaced: list[tuple[type, Any]] = []
    originals = [(cls, cls.__getattribute__) for cls in classes]
    try:
        for cls, original in originals:

            def read(self: Any, name: str, original: Any = original) -> Any:
                value = original(self, name)
                if name not in ignored and name[:2] != "__":
                    note(self, name, value)
                return value

            own = vars(cls).get("__getattribute__")
            try:
                cls.__getattribute__ = read  # type: ignore[method-assign,assignment]
            except TypeError:  # a class of a compiled module
                continue
            replaced.append((cls, own))
        yield
    finally:
        for cls, own in reversed(replaced):
            if own is None:
                del cls.__getattribute__
            else:
                cls.__getattribute__ = own


_IGNORED: set[str] = set()


def _ignored() -> set[str]:
    """The attributes that Keras sets on every layer, model, loss and metric."""
    if not _IGNORED:
        for example in (
            keras.layers.Layer(name="example"),
            keras.Model(name="example"),
            keras.metrics.Metric(name="example"),
            keras.losses.Loss(name="example"),
        ):
            _IGNORED.update(vars(example))
        _IGNORED.update(("state", "control", "bound", "args", "model", "global_step", "epoch"))
        _IGNORED.discard("reduction")
    return _IGNORED


def settings(trainer: Subject) -> Iterator[ValueSource]:
    """The settings that are compared whether or not a step was seen reading them."""
    for name in ("args", "optimizer", "compute_loss_func", "preprocess_logits_for_metrics"):
        yield ValueSource(vars(trainer), name, f"Trainer.{name}", "", trainer)
    trained_by = optimizers(trainer.optimizer)
    for owner in owners(trainer):
        if owner is trainer or isinstance(owner, types.FunctionType):
            continue
        is_optimizer = any(owner is x for x in trained_by)
        if not is_own_class(type(owner), ("keras", "optim")) and not is_optimizer:
            continue
        yield from _public(owner)
        if (
            is_optimizer
        ):  # a number is assigned to the optimizer's variable, a schedule is part of the trace
            label = f"{type(owner).__name__}.learning_rate"
            yield ValueSource(vars(owner), "_learning_rate", label, "", owner)


def _public(owner: Any) -> Iterator[ValueSource]:
    """The public numbers, flags and functions of an object of Keras or of our packages."""
    kind = getattr(owner, "path", None) or type(owner).__name__
    for name, value in vars(owner).items():
        if name.startswith("_") or name in _BOOKKEEPING:
            continue
        if isinstance(value, (*PLAIN, types.FunctionType)):
            yield ValueSource(vars(owner), name, f"{kind}.{name}", "", owner)
        elif isinstance(value, keras.regularizers.Regularizer):
            for inner, number in vars(value).items():
                if isinstance(number, PLAIN):
                    label = f"{kind}.{name}.{inner}"
                    yield ValueSource(vars(value), inner, label, "", value)


def functions(trainer: Subject) -> list[Any]:
    """The user functions that run in a step."""
    found: list[Any] = [trainer.compute_loss]
    for owner in owners(trainer):
        if owner is trainer or any(owner is c for c in trainer.callback_handler.callbacks):
            continue
        found.append(owner)
        for name in ("call", "compute_loss", "update_state", "result"):
            if isinstance(getattr(type(owner), name, None), types.FunctionType):
                found.append(getattr(owner, name))
        # Hold a function in Lambda, LossFunctionWrapper, MeanMetricWrapper, Activation.
        for name in ("function", "fn", "_fn", "activation"):
            value = vars(owner).get(name) if hasattr(owner, "__dict__") else None
            if callable(value):
                found.append(value)
    return found
