"""Rebuilds an optimizer whose variables change when layers are frozen or unfrozen.

A Keras optimizer is built for a fixed list of variables. When that list changes, the same object is
rebuilt. State of variables that remain is kept, matched by name; state of variables that leave is
set aside and restored when they return; variables that join start with fresh state. The update
count, and with it the schedule, continues.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import keras

from kbtrain.errors import ConfigurationError, first_lines
from kbtrain.model.variable_names import name_optimizer_variables, name_variables
from kbtrain.optimization.division import own_variables

logger = logging.getLogger("kbtrain")

AVERAGE = "average"
"""The slot of a moving average of the weights; its initial value is the weight."""

_set_aside: weakref.WeakKeyDictionary[Any, dict[str, keras.Variable]] = weakref.WeakKeyDictionary()


def set_aside(optimizer: keras.optimizers.Optimizer) -> dict[str, keras.Variable]:
    """State of variables that are frozen now but were trained before, by its saved name."""
    return _set_aside.setdefault(optimizer, {})


def restore_aside(
    optimizer: keras.optimizers.Optimizer, arrays: Mapping[str, Any], names: Mapping[str, str]
) -> None:
    """Restore the state that was set aside when a checkpoint was saved.

    Args:
        optimizer: The optimizer.
        arrays: The arrays by their names in the checkpoint.
        names: Names of the model's variables in this process -> in the checkpoint.
    """
    own = {saved: name for name, saved in names.items()}
    aside = set_aside(optimizer)
    aside.clear()
    for key, array in arrays.items():
        slot, _, saved = key.partition("/")
        if saved in own:
            variable = keras.Variable(array, dtype=array.dtype.name, trainable=False, name=slot)
            aside[f"{slot}/{own[saved]}"] = variable


def sync_variables(optimizer: keras.optimizers.Optimizer, model: keras.Model) -> bool:
    """Rebuild an optimizer if the trainable variables of ``model`` have changed.

    Args:
        optimizer: The optimizer, including the one it wraps.
        model: The model that it trains.

    Returns:
        Whether the variables had changed.

    Raises:
        ConfigurationError: The optimizer cannot be rebuilt.
    """
    trained = own_variables(optimizer, model.trainable_variables)
    known = _known(optimizer)
    if known is None or [id(v) for v in known] == [id(v) for v in trained]:
        return False
    names = name_variables(model.variables)
    before = name_optimizer_variables(optimizer.variables, model.variables)
    try:
        _take_apart(optimizer)
        optimizer.build(trained)
    except Exception as error:
        raise ConfigurationError(
            "`trainable` of the model was changed, but its optimizer cannot be rebuilt for the "
            f"trainable variables: {type(optimizer).__name__}: {first_lines(error)}. Set "
            "`trainable` before creating the Trainer, or use another optimizer."
        ) from error
    after = name_optimizer_variables(optimizer.variables, model.variables)
    aside = set_aside(optimizer)
    for key, variable in after.items():
        old = before.get(key, aside.pop(key, None))
        if old is not None and tuple(old.shape) == tuple(variable.shape):
            if old is not variable:
                variable.assign(old.value)
            continue
        slot, _, name = key.partition("/")
        if slot == AVERAGE and name in names:
            variable.assign(keras.ops.copy(keras.ops.cast(names[name].value, variable.dtype)))
    for key, old in before.items():
        if key not in after and key.partition("/")[2] in names:
            aside[key] = old
    _log_changes(known, trained)
    return True


def has_all(optimizer: Any, model: keras.Model) -> bool:
    """Whether a built optimizer has all trainable variables of ``model``."""
    known = {id(v) for v in _known(optimizer) or ()}
    return all(id(v) in known for v in own_variables(optimizer, model.trainable_variables))


def _log_changes(before: list[keras.Variable], after: list[keras.Variable]) -> None:
    old, new = {id(v) for v in before}, {id(v) for v in after}
    joined = [v.path for v in after if id(v) not in old]
    left = [v.path for v in before if id(v) not in new]
    logger.info(
        "The optimizer continues with %d variables: %d joined%s, %d left%s.",
        len(after),
        len(joined),
        f" ({joined[0]}, ...)" if joined else "",
        len(left),
        f" ({left[0]}, ...)" if left else "",
    )


def _chain(optimizer: Any) -> Iterator[Any]:
    """The optimizer and those it wraps, outermost first."""
    while optimizer is not None:
        yield optimizer
        optimizer = getattr(optimizer, "inner_optimizer", None)


def _known(optimizer: Any) -> list[keras.Variable] | None:
    """The variables an optimizer was built with; None if Keras does not expose them."""
    return getattr(list(_chain(optimizer))[-1], "_trainable_variables", None)


def _take_apart(optimizer: Any) -> None:
    """Undo ``build``. Keras has no public API for it; ``sync_variables`` reports failures."""
    for level in _chain(optimizer):
        kept = {id(level._iterations), id(level._learning_rate)}
        for variable in list(level._variables):
            if id(variable) not in kept:
                level._untrack_variable(variable)
        level._trainable_variables = []
        level._trainable_variables_indices = {}
        level.built = False
