"""Selects the parameters that weight decay applies to."""

from __future__ import annotations

import re

import keras

from kbtrain.utils.layers import walk_layers

NO_DECAY_LAYERS = (
    keras.layers.BatchNormalization,
    keras.layers.GroupNormalization,
    keras.layers.LayerNormalization,
    keras.layers.RMSNormalization,
    keras.layers.UnitNormalization,
)


NO_DECAY_NAMES = re.compile(
    r"bias|(^|/)(gamma|beta|scale)$|layernorm|rmsnorm|(^|/)norm($|/)|_norm($|/)"
)


def decay_parameter_names(model: keras.Model) -> list[str]:
    """Paths of the trainable variables that weight decay applies to.

    Excluded are the variables of normalization layers, biases, scales and offsets, and those named
    like a norm (``.../layernorm/...``, ``norm``, ``..._norm``), as in Transformers.
    """
    inside_norm = {
        id(variable)
        for layer in walk_layers(model)
        if isinstance(layer, NO_DECAY_LAYERS)
        for variable in layer.trainable_variables
    }
    return [
        variable.path
        for variable in model.trainable_variables
        if id(variable) not in inside_norm and not NO_DECAY_NAMES.search(variable.path.lower())
    ]


def exclude_from_decay(optimizer: keras.optimizers.Optimizer, model: keras.Model) -> None:
    """Exclude the variables of ``model`` that are not decayed from the optimizer's weight decay."""
    decayed = set(decay_parameter_names(model))
    excluded = [v for v in model.trainable_variables if v.path not in decayed]
    if excluded:
        optimizer.exclude_from_weight_decay(var_list=excluded)
