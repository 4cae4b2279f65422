"""The variables of a model, and those that change outside training."""

from __future__ import annotations

import keras

from kbtrain.utils.layers import walk_layers


def state_variables(model: keras.Model) -> list[keras.Variable]:
    """All variables of a model, including the states of stateful RNNs, which Keras leaves out."""
    states = [
        state
        for layer in walk_layers(model)
        if getattr(layer, "stateful", False)
        for state in keras.tree.flatten(getattr(layer, "states", None))
        if isinstance(state, keras.Variable)
    ]
    return list({id(v): v for v in [*model.variables, *states]}.values())


def refresh_derived_values(model: keras.Model) -> None:
    """Recompute values that layers derive from their variables, after these were assigned.

    ``Normalization`` caches the mean and the deviation it divides by. Keras' ``load_weights``
    does the same.
    """
    for layer in walk_layers(model):
        if isinstance(layer, keras.layers.Normalization) and layer.built:
            layer.finalize_state()


def states_batch_size(model: keras.Model) -> int | None:
    """The batch size of the states of stateful RNNs; None if there are none."""
    for layer in walk_layers(model):
        if getattr(layer, "stateful", False):
            for state in keras.tree.flatten(getattr(layer, "states", None)):
                if isinstance(state, keras.Variable) and len(state.shape):
                    return int(state.shape[0])
    return None


def advancing_variables(model: keras.Model) -> list[keras.Variable]:
    """Variables that change between batches even in inference: seeds and RNN states."""
    known = {id(v) for v in model.variables}
    return [
        v for v in state_variables(model) if id(v) not in known or v.name == "seed_generator_state"
    ]


def unique(variables: list[keras.Variable]) -> list[keras.Variable]:
    """Remove duplicates, keeping the order."""
    return list({id(v): v for v in variables}.values())
