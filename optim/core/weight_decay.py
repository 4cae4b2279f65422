"""Which variables have no weight decay: norms and biases."""

from __future__ import annotations

import re
from typing import Any

import keras

from optim.core.fallback import flatten_layers
from optim.core.parameter_groups import path_of

# kbtrain.optimization.weight_decay has the same two, for optimizers of any package. Neither package
# imports the other, so they are written twice; a test keeps them equal.
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

    Not decayed: everything inside a normalization layer, biases, scales and offsets, and whatever
    is named like a norm. Embeddings are decayed.

    Args:
        model: A built model.

    Returns:
        The paths, in the model's order.

    Example:
        >>> import keras, optim
        >>> layers = [keras.layers.Dense(2, name="dense"), keras.layers.LayerNormalization()]
        >>> model = keras.Sequential([keras.Input((3,)), *layers], name="net")
        >>> optim.decay_parameter_names(model)
        ['net/dense/kernel']
    """
    excluded = {id(variable) for variable in _not_decayed(model)}
    return [path_of(v) for v in model.trainable_variables if id(v) not in excluded]


def exclude_norms_and_biases(
    optimizer: keras.optimizers.Optimizer, model: keras.Model
) -> keras.optimizers.Optimizer:
    """Leave norms and biases out of an optimizer's weight decay, as trainers do by default.

    Keras does not save exclusions with a model: call this again for an optimizer that was loaded.

    Args:
        optimizer: Any Keras optimizer that has not been built; of one around others, such as
            `keras.optimizers.LossScaleOptimizer`, they are set on the innermost.
        model: A built model.

    Returns:
        The optimizer.

    Example:
        >>> import keras, optim
        >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
        >>> optimizer = optim.exclude_norms_and_biases(optim.AdamW(weight_decay=0.1), model)
        >>> optimizer.build(model.trainable_variables)
        >>> [optimizer.weight_decay_of(variable) for variable in model.trainable_variables]
        [0.1, 0.0]
    """
    innermost: Any = optimizer
    while hasattr(innermost, "inner_optimizer"):
        innermost = innermost.inner_optimizer
    if excluded := _not_decayed(model):
        innermost.exclude_from_weight_decay(var_list=excluded)
    return optimizer


def _not_decayed(model: keras.Model) -> list[Any]:
    inside_norm = {
        id(variable)
        for layer in flatten_layers(model)
        if isinstance(layer, NO_DECAY_LAYERS)
        for variable in layer.trainable_variables
    }
    return [
        variable
        for variable in model.trainable_variables
        if id(variable) in inside_norm or NO_DECAY_NAMES.search(path_of(variable).lower())
    ]
