"""NEFTune: noise on the outputs of embeddings, in training only."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import keras
from keras import ops

from kbtrain.errors import ConfigurationError
from kbtrain.model.wrappers.layer_calls import Call, replaced_calls
from kbtrain.utils import rng
from kbtrain.utils.layers import walk_layers
from kbtrain.utils.packages.keras_private import get_keras_mask, in_training, set_keras_mask


def noise(model: keras.Model, alpha: float | None) -> contextlib.AbstractContextManager[None]:
    """Context in which every ``keras.layers.Embedding`` adds noise to its output in training.

    The noise is uniform in ``[-m, m]`` with ``m = alpha / sqrt(length * width)`` for outputs of
    shape (batch, length, width). It comes from Keras' global seed generator, whose state is part
    of a checkpoint.

    Args:
        model: A built model.
        alpha: ``neftune_noise_alpha``; None for no noise.

    Raises:
        ConfigurationError: The model has no such layer.

    Reference:
        `Jain et al., NEFTune <https://arxiv.org/abs/2310.05914>`_
    """
    if alpha is None:
        return contextlib.nullcontext()
    layers = [layer for layer in walk_layers(model) if isinstance(layer, keras.layers.Embedding)]
    if not layers:
        raise ConfigurationError(
            f"neftune_noise_alpha={alpha} needs a keras.layers.Embedding (or a subclass) in the "
            f"model, and {model.name!r} has none. Leave the argument out for this model."
        )

    generator = rng.global_generator()

    def noisy(layer: keras.layers.Layer, call: Call) -> Call:
        def noisy_call(*args: Any, **kwargs: Any) -> Any:
            outputs = call(*args, **kwargs)
            # KerasHub calls its tied embedding with reverse=True as the output projection.
            if kwargs.get("reverse") or not in_training():
                return outputs
            largest = alpha / math.sqrt(math.prod(outputs.shape[1:]))
            drawn = keras.random.uniform(
                ops.shape(outputs), -largest, largest, dtype="float32", seed=generator
            )
            noised = outputs + ops.cast(drawn, outputs.dtype)
            if (mask := get_keras_mask(outputs)) is not None:
                set_keras_mask(noised, mask)
            return noised

        return noisy_call

    return replaced_calls(layers, noisy)
