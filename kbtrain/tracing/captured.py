"""Python values that a traced step has captured, and whether they have changed since.

A traced step bakes in the numbers, flags and functions that its Python read: ``self.beta`` of a
model, a layer's ``trainable``, a global of the loss's module. Attribute reads of objects of user
classes are recorded during the trace; for Keras layers, losses, regularizers and optimizers the
public settings are compared; the code of functions tells which globals and closures they read.

``CapturedValues.check`` compares all of them if user code may have run since the last comparison,
and returns a generation number: a step of an earlier generation must be rebuilt.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import keras

from kbtrain.errors import ConfigurationError, place_of
from kbtrain.tracing import objects
from kbtrain.tracing.frozen_values import frozen, is_changeable
from kbtrain.tracing.names import ValueSource, names_read_by
from kbtrain.tracing.objects import Subject
from kbtrain.utils.layers import walk_layers

logger = logging.getLogger("kbtrain")

OFTEN = 5
"""Number of changes of one value in a fit, each with a recompilation, before a warning."""

_MISSING = object()


@dataclass
class _Watched:
    """One value that a step has captured, frozen at that time."""

    place: ValueSource
    raw: Any
    frozen: Any
    changeable: bool

    def differs(self) -> bool:
        """Whether the value is different now."""
        now = self.place.namespace.get(self.place.name, _MISSING)
        if now is self.raw and not self.changeable:
            return False
        return bool(frozen(now) != self.frozen)


class CapturedValues:
    """The Python values that the steps of a Trainer have captured.

    Args:
        trainer: The Trainer.

    Attributes:
        generation: Counts the changes; see ``check``.
        due: Whether user code may have changed a value since the last comparison.
    """

    def __init__(self, trainer: Subject) -> None:
        self._trainer = trainer
        self.generation = 0
        self.due = True
        self._read: dict[tuple[int, str], ValueSource] = {}
        self._watched: list[_Watched] = []
        self._model: list[tuple[Any, Any]] = []
        self._recording = self._traced = False
        self._counts: Counter[tuple[int, str]] = Counter()

    # --- while a step is traced -----------------------------------------------------------------

    @contextlib.contextmanager
    def recording(self, symbolic: bool) -> Iterator[None]:
        """Context that records which attributes of user objects are read.

        Args:
            symbolic: Whether a step is being traced; otherwise nothing is recorded.
        """
        if self._recording or not symbolic:
            yield
            return
        self._recording = self._traced = True
        try:
            with objects.intercepted(objects.watched_classes(self._trainer), self._note):
                yield
        finally:
            self._recording = False

    def _note(self, owner: Any, name: str, value: Any) -> None:
        key = id(owner), name
        if key in self._read or not objects.is_setting(value):
            return
        own = getattr(owner, "__dict__", {})
        if name in own:
            namespace: Mapping[str, Any] = own
        else:  # found on the class; an instance attribute may later shadow it
            found = next((c for c in type(owner).__mro__ if name in vars(c)), None)
            if found is None or not objects.is_setting(vars(found)[name]):
                return
            namespace = _Attribute(owner)
        where = place_of(sys._getframe(2))
        label = f"{type(owner).__name__}.{name}"
        self._read[key] = ValueSource(namespace, name, label, where, owner)

    # --- afterwards -----------------------------------------------------------------------------

    def settle(self) -> None:
        """After a trace, take the current values as those the step has captured."""
        if not self._traced:
            return
        self._traced = False
        places = {p.key: p for p in [*self._read.values(), *objects.settings(self._trainer)]}
        for place in names_read_by(objects.functions(self._trainer)):
            places.setdefault(place.key, place)
        self._watched = []
        for place in places.values():
            raw = place.namespace.get(place.name, _MISSING)
            self._watched.append(_Watched(place, raw, frozen(raw), is_changeable(raw)))

    def check(self) -> int:
        """Compare with the current values, if user code may have run since.

        Returns:
            The current generation.

        Raises:
            ConfigurationError: The model was recompiled while it is trained.
        """
        if not self.due:
            return self.generation
        self.due = False
        if self._trainer.is_in_train and self._trainer.bound.is_outdated:
            raise ConfigurationError(
                "The model was recompiled during training, perhaps by a callback. Its optimizer, "
                "loss and metrics are fixed for the whole run: compile it before fit, or between "
                "two calls. (Attributes of the three may be set at any time.)"
            )
        changed = [w for w in self._watched if w.differs()]
        before, self._model = self._model, _trainable_structure(self._trainer.model)
        model_changed = bool(before) and not _equal(before, self._model)
        if changed or model_changed:
            self._log_changes(changed, before if model_changed else self._model)
            self.generation += 1
            self._read.clear()
            self._watched.clear()
        return self.generation

    def new_fit(self) -> None:
        """Start a fit: compare everything, and reset the counts of changes."""
        self._counts.clear()
        self.due = True
        self.check()

    def after_event(self, event: str) -> None:
        """Note that an event fires, as its listeners may change captured values.

        Args:
            event: Its name. At the beginning of an epoch, the data set may also run user code.
        """
        if not self.due:
            trainer = self._trainer
            self.due = (
                event == "on_epoch_begin"
                or objects.is_extended(trainer)
                or any(
                    not objects.is_own_class(type(c)) or getattr(c, "runs_user_code", False)
                    for c in trainer.callback_handler.listeners(event)
                )
            )

    def _log_changes(self, changed: list[_Watched], before: list[tuple[Any, Any]]) -> None:
        for watched in changed:
            place = watched.place
            self._counts[place.key] += 1
            logger.info("%s was changed: the step is recompiled.", place.label)
            if self._counts[place.key] == OFTEN:
                logger.warning(
                    "%s, which is read%s, was changed %d times in this fit, and the step was "
                    "recompiled each time, which is slow. Make it a keras.Variable and assign to "
                    "it: that needs no recompilation.",
                    place.label,
                    place.where or " in the step",
                    OFTEN,
                )
        known = {id(item): setting for item, setting in before}
        names = [
            str(getattr(item, "path", None) or item.name)
            for item, setting in self._model
            if id(item) in known and known[id(item)] != setting
        ]
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            logger.info(
                "trainable or dtype of %s%s was changed: the step is recompiled.",
                ", ".join(names[:3]),
                more,
            )


def _trainable_structure(model: keras.Model) -> list[tuple[Any, Any]]:
    """The layers and variables of a model with the flags that determine how they are trained."""
    layers = list(walk_layers(model))
    found: list[tuple[Any, Any]] = [(x, (x.trainable, x.dtype_policy.name)) for x in layers]
    parts = ("_trainable_variables", "_non_trainable_variables")
    own = {id(v): v for x in layers for part in parts for v in getattr(x, part, ())}
    found += [(v, v.trainable) for v in own.values()]
    found.append((keras, (keras.config.floatx(), keras.config.image_data_format())))
    return found


def _equal(a: list[tuple[Any, Any]], b: list[tuple[Any, Any]]) -> bool:
    return len(a) == len(b) and all(
        x is y and left == right for (x, left), (y, right) in zip(a, b, strict=True)
    )


class _Attribute(Mapping[str, Any]):
    """The attributes of an object, including those of its class."""

    def __init__(self, owner: Any) -> None:
        self._owner = owner

    def __getitem__(self, name: str) -> Any:
        try:
            return vars(self._owner)[name]
        except KeyError:
            for cls in type(self._owner).__mro__:
                if name in vars(cls):
                    return vars(cls)[name]
            raise

    def __iter__(self) -> Iterator[str]:
        return iter(vars(self._owner))

    def __len__(self) -> int:
        return len(vars(self._owner))
