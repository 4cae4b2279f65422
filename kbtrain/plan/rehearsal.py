"""A run that is prepared only to learn something, after which the Trainer is as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from kbtrain.callbacks.handler import CallbackHandler
from kbtrain.callbacks.state import TrainerControl
from kbtrain.checkpoint import run_state
from kbtrain.data import Batches, as_loader
from kbtrain.errors import ConfigurationError
from kbtrain.model import custom_steps
from kbtrain.model.variables import unique
from kbtrain.utils import rng
from kbtrain.utils.packages import keras_private

if TYPE_CHECKING:
    from kbtrain.backends.protocol import Backend
    from kbtrain.training.trainer_base import TrainerBase

SEED_GENERATOR = "global_seed_generator"
"""The name under which Keras keeps its global generator."""

RandomState = tuple[dict[str, np.ndarray], dict[str, Any]]

Keep = Callable[[list[keras.Variable]], Callable[[], None]]
"""Keeps the values of variables; returns a function that gives them back."""

_ATTRIBUTES = (
    *("args", "given_optimizers", "model_init", "optimizer", "lr_scheduler", "state"),
    *("other_optimizers", "num_training_steps", "train_dataloader", "control"),
    *("callback_handler", "current_run", "is_in_train", "agreement"),
)
_UNSET = object()


@contextlib.contextmanager
def rehearsing(trainer: TrainerBase, what: str, keep: Keep) -> Iterator[Any]:
    """Context in which a run may be prepared and trained; all that it changes is put back.

    No callback is called in it, and the optimizer is a copy of the user's. It yields the first
    batch of the training data; None if they have none.

    Args:
        trainer: The Trainer; its model is built afterwards.
        what: The name of the user's call, for messages.
        keep: Keeps the values of the model and its metrics.

    Raises:
        ConfigurationError: The data can be read only once, or the optimizer cannot be copied.
    """
    backend = trainer.backend
    before = {name: getattr(trainer, name, _UNSET) for name in _ATTRIBUTES}
    with _random_state_of_start(backend) as (start, put_random_state_back):
        first = first_batch(trainer, what)
        between = rng.capture_random_state(backend)
        if first is not None:
            trainer.bound.build(first)  # draws the initial weights, as `fit` would
            if trainer.bound.overridden.train_step:
                custom_steps.build_by_step(backend, trainer.model, first)
        put_random_state_back(_after_build(start, between, rng.capture_random_state(backend)))
        put_back = keep(_kept(trainer))
        try:
            trainer.model_init, trainer.is_in_train = None, True
            trainer.callback_handler = CallbackHandler([], trainer._callback_context)
            trainer.control = TrainerControl()
            if not trainer.bound.overridden.train_step:
                trainer.given_optimizers = _copied(trainer, what)
            yield first
        finally:
            for name, value in before.items():
                if value is not _UNSET:
                    setattr(trainer, name, value)
                elif hasattr(trainer, name):
                    delattr(trainer, name)
            put_back()


def outlined_batch(trainer: TrainerBase, what: str) -> Any:
    """The first batch of the training data, read so that a run afterwards is as without it.

    Args:
        trainer: The Trainer.
        what: The name of the user's call, for messages.

    Raises:
        ConfigurationError: The data can be read only once.
    """
    with _random_state_of_start(trainer.backend):
        return first_batch(trainer, what)


def first_batch(trainer: TrainerBase, what: str) -> Any:
    """The first batch of the training data, which can be read again; None if they have none.

    Args:
        trainer: The Trainer.
        what: The name of the user's call, for messages.

    Raises:
        ConfigurationError: The data can be read only once.
    """
    data = trainer.get_train_dataloader()
    if isinstance(trainer.train_dataset, Iterator) or isinstance(data, Iterator):
        raise ConfigurationError(
            f"{what} reads the training data, and an iterator can be read only once: nothing would "
            "be left for fit(). Give a train_dataset that can be read again, such as an "
            "IterableDataset, or an object whose __iter__ is a generator. Received: "
            f"{type(trainer.train_dataset if trainer.train_dataset is not None else data).__name__}"
            "."
        )
    loader = as_loader(data, label_names=trainer.bound.label_names)
    return Batches(loader, trainer.bound.label_names).peek()


@contextlib.contextmanager
def _random_state_of_start(
    backend: Backend,
) -> Iterator[tuple[RandomState, Callable[[RandomState], None]]]:
    """Context after which the random state is as before it, or another that is told in it.

    It yields the state, and the function that tells another.
    """
    # Keras seeds its generator from Python's when it is first needed: `fit` must do it again.
    generator = keras_private.get_global_attribute(SEED_GENERATOR)
    start = rng.capture_random_state(backend)  # before data that draw from global generators
    wanted = [start]
    try:
        yield start, wanted.append
    finally:
        rng.restore_random_state(backend, *wanted[-1])
        if generator is None:
            keras_private.set_global_attribute(SEED_GENERATOR, None)


def _kept(trainer: TrainerBase) -> list[keras.Variable]:
    """All that a run would change, except an optimizer of which it has a copy."""
    own: list[Any] = []
    if trainer.bound.overridden.train_step:
        others = custom_steps.optimizers_of(trainer.model).values()
        own = [x for x in (trainer.model.optimizer, *others) if x is not None]
    return unique(
        [
            *run_state.model_variables(trainer.model),
            *trainer.bound.metric_variables,
            *(variable for each in own for variable in each.variables),
        ]
    )


def _after_build(start: RandomState, between: RandomState, end: RandomState) -> RandomState:
    """The random state with which ``fit`` finds what it would have found without a rehearsal.

    It reads the first batch again, but no longer draws the initial weights.

    Args:
        start: Before the first batch was read.
        between: After that, before the weights were drawn.
        end: After that.
    """
    arrays, document = dict(start[0]), dict(start[1])
    for name, value in end[0].items():
        drawn = name not in between[0] or not np.array_equal(between[0][name], value)
        if drawn or between[1].get(name) != end[1].get(name):
            arrays[name] = value
            if name in end[1]:
                document[name] = end[1][name]
    return arrays, document


def given_optimizer(trainer: TrainerBase) -> Any:
    """The optimizer that the user has made; None if it is made from the arguments."""
    given = trainer.given_optimizers[0]
    return trainer.model.optimizer if given is None and trainer.bound.compiled else given


def _copied(trainer: TrainerBase, what: str) -> tuple[Any, Any]:
    """``trainer.given_optimizers`` with a new optimizer of the same settings, without state."""
    given, schedule = given_optimizer(trainer), trainer.given_optimizers[1]
    if given is None:
        return None, schedule
    try:
        return type(given).from_config(given.get_config()), schedule
    except Exception as error:
        raise ConfigurationError(
            f"{what} works on a copy of the optimizer, and this one cannot be copied "
            f"({type(given).__name__}: {error}). Give it get_config() and from_config(), or leave "
            "it out."
        ) from error
