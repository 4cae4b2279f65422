"""The private APIs of Keras that kbtrain uses, each with a fallback."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import keras

from kbtrain.utils.fallback import PrivateApi


def _private(name: str, fast: Any, plain: Any, instead: str) -> PrivateApi:
    return PrivateApi(name, "keras", fast, plain, instead)


# --- masks ----------------------------------------------------------------------------------------
# A mask is an attribute of the tensor, or, where tensors take no attributes (JAX), an entry in a
# table of Keras.


def _get_keras_mask(tensor: Any) -> Any:
    from keras.src.backend.common.masking import get_keras_mask

    return get_keras_mask(tensor)


def _set_keras_mask(tensor: Any, mask: Any) -> None:
    from keras.src.backend.common.masking import set_keras_mask

    set_keras_mask(tensor, mask)


def _set_attribute(tensor: Any, mask: Any) -> None:
    with contextlib.suppress(AttributeError):
        tensor._keras_mask = mask


_ATTRIBUTE = "Only masks that are an attribute of their tensor are seen; on JAX none are."

get_keras_mask = _private(
    "Reading the mask of a tensor",
    _get_keras_mask,
    lambda tensor: getattr(tensor, "_keras_mask", None),
    _ATTRIBUTE,
)
"""The mask that a layer left on a tensor, or None."""

set_keras_mask = _private(
    "Setting the mask of a tensor", _set_keras_mask, _set_attribute, _ATTRIBUTE
)
"""``set_keras_mask(tensor, mask)``: attach a mask for the layers that follow."""


# --- scopes ---------------------------------------------------------------------------------------


def stateless_scope() -> Any:
    """The active stateless scope, or None.

    The caller recomputes layers for their gradients and has a fallback of its own.
    """
    from keras.src.backend.common.stateless_scope import get_stateless_scope

    return get_stateless_scope()


def get_global_attribute(name: str) -> Any:
    """A global attribute of Keras that affects layers; errors as in ``stateless_scope``."""
    from keras.src.backend.common import global_state

    return global_state.get_global_attribute(name)


def set_global_attribute(name: str, value: Any) -> None:
    """Set a global attribute; the inverse of ``get_global_attribute``."""
    from keras.src.backend.common import global_state

    global_state.set_global_attribute(name, value)


def _in_training() -> bool:
    context = get_global_attribute("current_call_ctx")
    return context is not None and bool(context.get_value("training"))


in_training = _private(
    "Asking a layer whether it is in training",
    _in_training,
    lambda: False,
    "NEFTune adds no noise, and gradient_checkpointing keeps the activations of layers.",
)
"""Whether the layer that is being called runs with ``training=True``."""


def _autocast(variable: Any, value: Any) -> Any:
    scope = get_global_attribute("autocast_scope")
    return scope.maybe_cast(value) if variable._autocast and scope is not None else value


autocast = _private(
    "Finding the dtype that a layer computes in",
    _autocast,
    lambda variable, value: value,
    "With fsdp, weights are gathered in their own dtype, which takes more memory and time.",
)
"""``autocast(variable, value)``: the value as ``variable.value`` would return it in a layer."""


# --- models ---------------------------------------------------------------------------------------


def _functional() -> type:
    from keras.src.models.functional import Functional

    result: type = Functional
    return result


def _type_of_a_functional_model() -> type:
    inputs = keras.Input((1,))
    return type(keras.Model(inputs, keras.ops.abs(inputs)))


functional_class = _private(
    "Finding the class of functional models",
    _functional,
    _type_of_a_functional_model,
    "It is taken from a small model.",
)
"""The class of functional models, ``keras.Model(inputs, outputs)``."""


def _layers(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    return list(layer._flatten_layers())


def _walk_attributes(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    found: dict[int, keras.layers.Layer] = {}

    def visit(value: Any) -> None:
        if isinstance(value, keras.layers.Layer) and id(value) not in found:
            found[id(value)] = value
            is_model = isinstance(value, keras.Model)
            visit(value.layers if is_model else list(vars(value).values()))
        elif isinstance(value, dict):
            for item in list(value.values()):
                visit(item)
        elif isinstance(value, list | tuple):
            for item in value:
                visit(item)

    visit(layer)
    return list(found.values())


flatten_layers = _private(
    "Walking over the layers of a model",
    _layers,
    _walk_attributes,
    "Layers are found by the attributes of layers.",
)
"""The layer and everything below it, each once, in a stable order."""


# --- variables ------------------------------------------------------------------------------------
# The overhead of `value` and `assign` (scopes, checks, conversions) takes ten times as long as the
# call of a small step. These functions take many variables at once, so the indirection is free.


def held_values(variables: Sequence[keras.Variable]) -> list[Any]:
    """The tensors that variables hold, whatever scope is active.

    The caller records a step, and runs it eagerly if this fails.
    """
    return [variable._value for variable in variables]


read_values = _private(
    "Reading the values of variables",
    held_values,
    lambda variables: [variable.value for variable in variables],
    "They are read one by one, which takes longer.",
)
"""The tensors that variables hold, outside of scopes or where the scope does not replace them."""


def _set_values(variables: Sequence[keras.Variable], values: Sequence[Any]) -> None:
    held_values(variables[:1])  # raises if `_value` is gone: assigning would create it unnoticed
    for variable, value in zip(variables, values, strict=True):
        variable._value = value


def _assign_one_by_one(variables: Sequence[keras.Variable], values: Sequence[Any]) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


write_values = _private(
    "Setting the values of variables",
    _set_values,
    _assign_one_by_one,
    "They are assigned one by one, which takes longer.",
)
"""``write_values(variables, values)``: replace the variables' tensors by ones of equal shape."""

has_value = _private(
    "Asking whether a variable has a value",
    lambda variable: variable._value is not None,
    lambda variable: True,
    "It is taken to have one.",
)
"""Whether a variable is initialized; for use in scopes where reading it may initialize it."""


# --- random numbers -------------------------------------------------------------------------------


def _global_seed_generator() -> Any:
    from keras.src.backend.common import global_state
    from keras.src.random.seed_generator import GLOBAL_SEED_GENERATOR, global_seed_generator

    # Keras' function refuses to return it in a trace, where a run may be prepared on shapes alone.
    made = global_state.get_global_attribute(GLOBAL_SEED_GENERATOR)
    return global_seed_generator() if made is None else made


_own: list[Any] = []


def _own_generator() -> Any:
    if not _own:
        _own.append(keras.random.SeedGenerator(0))
    return _own[0]


global_seed_generator = PrivateApi(
    "Finding Keras' global seed generator",
    "keras",
    _global_seed_generator,
    _own_generator,
    "What layers without a seed draw is not part of a checkpoint.",
    passes=lambda error: isinstance(error, ValueError),  # Keras refuses to make it in a trace
)
"""The generator that Keras draws from where a layer or operation has no seed."""


# --- dtypes ---------------------------------------------------------------------------------------


def _narrowing_table() -> dict[str, str]:
    from keras.src.backend.common import dtypes

    table: dict[str, str] = dtypes.BIT64_TO_BIT32_DTYPE
    table["float64"]  # raises a KeyError if this is not the expected table
    return table


narrowing_table = _private(
    "Keeping float64 in operations of Keras",
    _narrowing_table,
    dict,
    "Where Keras turns float64 into float32, models in float64 compute in float32.",
)
"""Keras' table that narrows 64-bit dtypes at the end of promotion; changes apply immediately."""


# --- layouts --------------------------------------------------------------------------------------
# On JAX a variable may have a layout: its value is divided among devices when it is assigned, and
# slots of optimizers follow it. Keras sets it from ``keras.distribution`` only.


def get_layout(variable: keras.Variable) -> Any:
    """The layout of a variable, of Keras or of JAX; None if it has none."""
    layout = getattr(variable, "_layout", None)
    return getattr(layout, "backend_layout", layout)


def set_layout(variable: keras.Variable, layout: Any) -> None:
    """Give a variable a layout; its value is not moved."""
    if getattr(variable, "_layout", None) is not layout:
        variable._layout = layout
