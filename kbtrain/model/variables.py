"""Which variables a model has, and which of them change where."""

from __future__ import annotations

import keras

from kbtrain.utils.layers import walk_layers


def state_variables(model: keras.Model) -> list[keras.Variable]:
    """All variables of a model. Keras does not count the states of a stateful RNN among them."""
    states = [
        state
        for layer in walk_layers(model)
        if getattr(layer, "stateful", False)
        for state in keras.tree.flatten(getattr(layer, "states", None))
        if isinstance(state, keras.Variable)
    ]
    return list({id(v): v for v in [*model.variables, *states]}.values())


def refresh_derived_values(model: keras.Model) -> None:
    """After variables were assigned from outside: what layers have computed from them is computed.

    ``Normalization`` keeps the mean and the deviation it divides by, as Keras' ``load_weights``
    knows.
    """
    for layer in walk_layers(model):
        if isinstance(layer, keras.layers.Normalization) and layer.built:
            layer.finalize_state()


def states_batch_size(model: keras.Model) -> int | None:
    """How many samples the states of stateful RNNs are for; None without any."""
    for layer in walk_layers(model):
        if getattr(layer, "stateful", False):
            for state in keras.tree.flatten(getattr(layer, "states", None)):
                if isinstance(state, keras.Variable) and len(state.shape):
                    return int(state.shape[0])
    return None


def advancing_variables(model: keras.Model) -> list[keras.Variable]:
    """What changes from one batch to the next in inference, too: seeds, and states of RNNs."""
    known = {id(v) for v in model.variables}
    return [
        v for v in state_variables(model) if id(v) not in known or v.name == "seed_generator_state"
    ]


def unique(variables: list[keras.Variable]) -> list[keras.Variable]:
    """Each variable once, in order."""
    return list({id(v): v for v in variables}.values())
