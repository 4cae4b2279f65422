"""Calls the callbacks of an event, and collects their state."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import logging
import numbers
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from kbtrain.callbacks.adapters import advice
from kbtrain.callbacks.adapters.keras_callbacks import KerasCallbacks
from kbtrain.callbacks.adapters.transformers_callback import TransformersCallback
from kbtrain.callbacks.base import ALL_EVENTS, STEP_EVENTS, TrainerCallback
from kbtrain.callbacks.state import TrainerControl, TrainerState, to_json_value
from kbtrain.errors import ConfigurationError, KbtrainError
from kbtrain.utils.best_effort import warn_once

if TYPE_CHECKING:
    from kbtrain.config.training_args import TrainingArguments

logger = logging.getLogger("kbtrain")


class CallbackHandler:
    """Calls the callbacks of an event in order, passing the control from one to the next.

    Args:
        callbacks: Callback objects or classes.
        context: Returns the keyword arguments of every event.
    """

    def __init__(self, callbacks: Iterable[Any], context: Callable[[], dict[str, Any]]) -> None:
        self.callbacks: list[TrainerCallback] = []
        self._warned: list[tuple[Any, str]] = []
        self._context = context
        for callback in callbacks:
            self.add(callback)

    def add(self, callback: Any) -> None:
        """Add a callback object, or a class, which is instantiated.

        Raises:
            ConfigurationError: It is no callback, or one that kbtrain does not call; the message
                says what to use.
        """
        kind = _check_kind(callback)
        instance = _instantiate(callback) if isinstance(callback, type) else callback
        if kind == "keras":
            self._add_of_keras(instance)
            return
        if kind == "transformers":
            instance = TransformersCallback(instance)
        _check_events(instance)
        _warn_about_uncalled_methods(instance)
        cls = _class_of(instance)
        if any(_class_of(other) is cls for other in self.callbacks):
            logger.warning("A callback of class %s is already in use.", cls.__name__)
        self.callbacks.append(instance)

    def _add_of_keras(self, callback: Any) -> None:
        """Add a callback of Keras to those of this run, which are called together."""
        for other in self.callbacks:
            if isinstance(other, KerasCallbacks):
                other.add(callback)
                return
        self.callbacks.append(KerasCallbacks([callback]))

    def pop(self, callback: Any) -> Any:
        """Remove and return a callback (by object, or the first of a class); None if absent."""

        def is_meant(other: Any) -> bool:
            return other is callback or (isinstance(callback, type) and type(other) is callback)

        for other in self.callbacks:
            if is_meant(own := getattr(other, "wrapped", other)):
                self.callbacks.remove(other)
                return own
            for inner in getattr(other, "callbacks", ()):  # those of Keras
                if is_meant(inner):
                    other.remove(inner)  # type: ignore[attr-defined]
                    return inner
        return None

    def listeners(self, event: str) -> list[TrainerCallback]:
        """The callbacks that override ``event``, in their class or on the object itself.

        Looked up each time, because a method may be set on an object at any time.
        """
        if event not in ALL_EVENTS:
            raise ConfigurationError(
                f"There is no event {event!r}. Expected one of: {', '.join(ALL_EVENTS)}."
            )
        return [callback for callback in self.callbacks if _overrides(callback, event)]

    def need_every_step(self) -> bool:
        """Whether a callback needs the events of every update."""
        return any(c.every_step for event in STEP_EVENTS for c in self.listeners(event))

    def need_every_batch(self) -> bool:
        """Whether a callback needs the event of every batch of an evaluation."""
        events = ("on_prediction_step_begin", "on_prediction_step")
        return any(c.every_step for event in events for c in self.listeners(event))

    def may_set_learning_rate(self) -> bool:
        """Whether a callback may assign the learning rate, as those of Keras do."""
        return any(isinstance(callback, KerasCallbacks) for callback in self.callbacks)

    def fire(
        self,
        event: str,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> TrainerControl:
        """Call all listeners of ``event``; return the resulting control."""
        listeners = self.listeners(event)
        if not listeners:
            return control
        kwargs = self._context() | kwargs
        for callback in listeners:
            stopping = control.should_training_stop
            try:
                result = getattr(callback, event)(args, state, control, **kwargs)
            except Exception as error:
                if getattr(callback, "is_best_effort", False) and not isinstance(
                    error, KbtrainError
                ):
                    warn_once(callback, event, error)
                    continue
                error.add_note(
                    f"Raised in {_class_of(callback).__name__}.{event} at step {state.global_step}."
                )
                raise
            if result is not None and not isinstance(result, TrainerControl):
                raise ConfigurationError(
                    f"{_class_of(callback).__name__}.{event} must return a TrainerControl or None. "
                    f"Received: {result!r}."
                )
            control = control if result is None else result
            if control.should_training_stop and not stopping and control.stop_reason is None:
                control.stop_reason = f"{_class_of(callback).__name__} asked to stop"
        return control

    def tell(self, method: str, *values: Any) -> None:
        """Call an optional method of callbacks that show a run; it must not raise.

        ``phase(text)`` says what takes time beside the updates, ``saving(name)`` that a checkpoint
        is being written, and ``ended(ending)``, with a ``kbtrain.report.ending.RunEnding``, how
        ``fit`` ended, also with an error. ``notice(text)`` comes from another thread.

        Args:
            method: Its name.
            *values: Its arguments.
        """
        for callback in self.callbacks:
            if (call := getattr(callback, method, None)) is not None:
                try:
                    call(*values)
                except Exception as error:
                    warn_once(callback, method, error)

    def log_values(self, trainer: Any, taken: Iterable[str] = ()) -> dict[str, Any]:
        """What callbacks add to a log of the training, by ``log_values(trainer)``.

        A name that is taken, and what is no number, costs one warning for each callback.

        Args:
            trainer: The Trainer.
            taken: Names of the run's own numbers.
        """
        found: dict[str, Any] = {}
        for callback in self.callbacks:
            if values := getattr(callback, "log_values", None):
                try:
                    given = dict(values(trainer) or {})
                    refused = {name for name in given if name in found or name in taken}
                    no_numbers = {n for n, v in given.items() if not _is_number(v)} - refused
                    found |= {n: v for n, v in given.items() if n not in refused | no_numbers}
                    self._warn_about_values(callback, refused, no_numbers)
                except Exception as error:
                    warn_once(callback, "log_values", error)
        return found

    def _warn_about_values(self, callback: Any, refused: set[Any], no_numbers: set[Any]) -> None:
        name = _class_of(callback).__name__
        for values, reason in (
            (refused, "the run, or another callback, logs values of these names"),
            (no_numbers, "they are no numbers"),
        ):
            if values and (callback, reason) not in self._warned:
                self._warned.append((callback, reason))
                logger.warning(
                    "The log leaves out what %s.log_values returned for %s, because %s. This "
                    "warning is shown once.",
                    name,
                    ", ".join(sorted(map(repr, values))),
                    reason,
                )

    def steps_until_wanted(self, state: TrainerState) -> int:
        """Updates until a callback wants to be called (see ``TrainerCallback.next_step``)."""
        wanted = [step for c in self.callbacks if (step := c.next_step(state)) is not None]
        return max(1, min(wanted, default=1 << 31) - state.global_step)

    @contextlib.contextmanager
    def evaluating(self, trainer: Any) -> Iterator[bool]:
        """Context in which the model holds the weights that callbacks want to be evaluated.

        Yields:
            Whether there are such weights.
        """
        with contextlib.ExitStack() as stack:
            yield any([stack.enter_context(c.evaluating(trainer)) for c in self.callbacks])

    def arrays(self) -> dict[str, Any]:
        """Arrays of the callbacks for a checkpoint, by class, position and name."""
        return {
            f"{_class_of(callback).__name__}/{index}/{name}": array
            for index, callback in enumerate(self.callbacks)
            for name, array in callback.arrays().items()
        }

    def load_arrays(self, arrays: Mapping[str, Any], names: Mapping[str, str]) -> None:
        """Inverse of ``arrays``; callbacks of the same class are told apart by their order.

        Args:
            arrays: The arrays in a checkpoint.
            names: Names of the model's variables in this process -> in the checkpoint.
        """
        own = {saved: name for name, saved in names.items()}
        saved: dict[str, dict[str, dict[str, Any]]] = {}
        for key, array in arrays.items():
            name, index, rest = key.split("/", 2)
            slot, _, variable = rest.partition("/")
            rest = f"{slot}/{own[variable]}" if variable in own else rest
            saved.setdefault(name, {}).setdefault(index, {})[rest] = array
        for callback in self.callbacks:
            if of_class := saved.get(_class_of(callback).__name__):
                callback.load_arrays(of_class.pop(min(of_class, key=int)))

    def close(self) -> None:
        """Close all callbacks that have a ``close`` method; errors are logged."""
        for callback in self.callbacks:
            if close := getattr(callback, "close", None):
                try:
                    close()
                except Exception:  # raising here would hide the error that ended the training
                    logger.exception("%s could not be closed.", type(callback).__name__)

    def state(self) -> dict[str, list[Any]]:
        """The states of callbacks that have one, by class name, in order."""
        states: dict[str, list[Any]] = {}
        callback: Any
        for callback in self.callbacks:
            if _has_state(callback):
                states.setdefault(_class_of(callback).__name__, []).append(callback.state())
        return states

    def load_state(self, states: dict[str, list[Any]]) -> None:
        """Inverse of ``state``; warns about saved states without a callback."""
        remaining = {name: list(values) for name, values in states.items()}
        callback: Any
        for callback in self.callbacks:
            if _has_state(callback) and remaining.get(_class_of(callback).__name__):
                _restore(callback, remaining[_class_of(callback).__name__].pop(0))
        for name in (name for name, values in remaining.items() if values):
            logger.warning(
                "The checkpoint has a state for the callback %s, which this run does not use.", name
            )


def _restore(callback: Any, state: Any) -> None:
    """Give a callback its state back.

    Raises:
        ConfigurationError: A user's ``load_state`` failed. (What a callback of kbtrain cannot read
            is the fault of the file.)
    """
    try:
        callback.load_state(state)
    except Exception as error:
        if isinstance(error, KbtrainError) or type(callback).__module__.startswith("kbtrain."):
            raise
        raise ConfigurationError(
            f"The callback {type(callback).__name__} could not restore its state from the "
            f"checkpoint: its load_state raised {type(error).__name__}: {error}. Correct it, or "
            "set restore_callback_states_from_checkpoint=False."
        ) from error


def _check_kind(callback: Any) -> str:
    """Whose callback an object or class is: "kbtrain", "keras" or "transformers".

    Raises:
        ConfigurationError: It is none, or one that is not called here.
    """
    cls = callback if isinstance(callback, type) else type(callback)
    if issubclass(cls, TrainerCallback):
        return "kbtrain"
    if (kind := advice.usable(cls)) is not None:
        return kind
    raise ConfigurationError(
        "A callback must be a TrainerCallback, of kbtrain or Transformers, or a "
        "keras.callbacks.Callback. "
        f"Received: {callback!r:.200}. {advice.advice(callback) or ''}".rstrip()
    )


def _is_number(value: Any) -> bool:
    """Whether a log can show a value as a number: one of Python, NumPy or a framework."""
    if isinstance(value, numbers.Real):
        return True
    if isinstance(value, str | bytes) or not hasattr(type(value), "__array__"):
        return False
    try:
        array = np.asarray(to_json_value(value))
    except (TypeError, ValueError):
        return False
    return array.size == 1 and array.dtype.kind in "biuf"


def _class_of(callback: Any) -> type:
    """The class of a callback, or of the one that it wraps."""
    return type(getattr(callback, "wrapped", callback))


def _overrides(callback: TrainerCallback, event: str) -> bool:
    own = vars(callback).get(event)
    if own is not None:
        return callable(own)
    return getattr(type(callback), event) is not getattr(TrainerCallback, event)


def _instantiate(cls: type) -> Any:
    """Create an object of a callback class."""
    try:
        inspect.signature(cls).bind()
    except TypeError as problem:
        raise ConfigurationError(
            f"The callback class {cls.__name__} cannot be created without arguments ({problem}). "
            "Pass an object instead of the class."
        ) from None
    return cls()


def _check_events(callback: TrainerCallback) -> None:
    """Check that the events a callback overrides accept all their arguments.

    Raises:
        ConfigurationError: One of them does not accept ``**kwargs``.
    """
    for event in ALL_EVENTS:
        if not _overrides(callback, event):
            continue
        parameters = inspect.signature(getattr(callback, event)).parameters.values()
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            raise ConfigurationError(
                f"{type(callback).__name__}.{event} must be defined as {event}(self, args, state, "
                "control, **kwargs), because events get further keyword arguments. "
                f"Received: {event}({', '.join(p.name for p in parameters)})."
            )


def _warn_about_uncalled_methods(callback: TrainerCallback) -> None:
    """Warn about methods that look like an event, or like Transformers' state, but are not."""
    cls = type(callback)
    for name in dir(cls):
        if not name.startswith("on_") or name in ALL_EVENTS or not callable(getattr(cls, name)):
            continue
        if near := difflib.get_close_matches(name, ALL_EVENTS, n=1, cutoff=0.75):
            logger.warning(
                "%s.%s is never called: there is no such event. Did you mean %s?",
                cls.__name__,
                name,
                near[0],
            )
    if hasattr(cls, "from_state") and not _has_state(callback):
        logger.warning(
            "The state of %s is not saved: that requires the methods state(self), which returns "
            "JSON values, and load_state(self, state). from_state is not called.",
            cls.__name__,
        )


def _has_state(callback: Any) -> bool:
    """Whether a callback has both methods; an attribute named ``state`` may be anything."""
    return all(callable(getattr(callback, name, None)) for name in ("state", "load_state"))
