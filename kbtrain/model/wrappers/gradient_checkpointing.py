"""``gradient_checkpointing``: activations are recomputed in the backward pass, not stored."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras
from keras import ops

from kbtrain.backends.protocol import Backend
from kbtrain.errors import ConfigurationError
from kbtrain.model.wrappers.layer_calls import Call, replaced_calls
from kbtrain.utils import rng
from kbtrain.utils.fallback import PrivateApi
from kbtrain.utils.packages.keras_private import (
    functional_class,
    get_global_attribute,
    get_keras_mask,
    in_training,
    set_global_attribute,
    set_keras_mask,
    stateless_scope,
)

OPTIONS = ("every_n_layers", "layer_names")

_off = False


@contextlib.contextmanager
def switched_off() -> Iterator[None]:
    """Context without recomputation, so that each layer's outputs can be inspected."""
    global _off
    before, _off = _off, True
    try:
        yield
    finally:
        _off = before


def recomputed(
    model: keras.Model, backend: Backend, wanted: bool | None, options: Mapping[str, Any] | None
) -> contextlib.AbstractContextManager[None]:
    """Context in which the chosen layers keep only inputs and outputs for the backward pass.

    ``keras.RematScope`` cannot be used: on PyTorch the recomputation draws different random
    numbers, and on JAX and TensorFlow it fails inside a step.

    Args:
        model: A built model.
        backend: The backend in use.
        wanted: ``gradient_checkpointing``.
        options: ``gradient_checkpointing_kwargs``: ``layer_names``, or ``every_n_layers`` (1 for
            all). Layers are the outermost ones that are not models.

    Raises:
        ConfigurationError: An option or a layer is unknown.
    """
    if not wanted:
        return contextlib.nullcontext()
    layers = _chosen(list(_outermost(model)), options or {})
    unseeded = rng.global_seed_variable()

    def again(layer: keras.layers.Layer, call: Call) -> Call:
        inside = False  # in the layer's code: its exceptions are not failures of recomputation

        def noted(*args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            inside = True
            outputs = call(*args, **kwargs)
            inside = False
            return outputs

        def recomputed(*args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            inside = False
            return _Recomputed(layer, noted, args, kwargs).run(backend, unseeded)

        part = PrivateApi(
            "gradient_checkpointing",
            "keras",
            recomputed,
            call,
            "Activations are stored, as without it: the run needs more memory.",
            passes=lambda error: inside or backend.is_oom(error),
        )

        def call_again(*args: Any, **kwargs: Any) -> Any:
            return (call if _off or not in_training() else part)(*args, **kwargs)

        return call_again

    return replaced_calls(layers, again)


def _outermost(model: keras.Model) -> Iterator[keras.layers.Layer]:
    for layer in model.layers:
        if isinstance(layer, functional_class() | keras.Sequential):
            yield from _outermost(layer)
        elif not isinstance(layer, keras.layers.InputLayer):
            yield layer


def _chosen(
    layers: Sequence[keras.layers.Layer], options: Mapping[str, Any]
) -> Sequence[keras.layers.Layer]:
    if unknown := sorted(set(options) - set(OPTIONS)):
        raise ConfigurationError(
            f"gradient_checkpointing_kwargs has no option {unknown[0]!r} (leave out PyTorch's "
            f"options). Known options: {', '.join(OPTIONS)}."
        )
    every = options.get("every_n_layers", 1)
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        raise ConfigurationError(
            "gradient_checkpointing_kwargs: every_n_layers must be a whole number of at least 1. "
            f"Received: {every!r}."
        )
    names = options.get("layer_names")
    if names is None:
        return layers[::every]
    known = [layer.name for layer in layers]
    if missing := [name for name in names if name not in known]:
        raise ConfigurationError(
            f"gradient_checkpointing_kwargs: the model has no layer {missing[0]!r}. "
            f"Its layers: {', '.join(known)}."
        )
    return [layer for layer in layers if layer.name in names][::every]


class _Recomputed:
    """One call of a layer as a pure function of tensors, which can be run twice.

    Inputs are the arguments' tensors and masks; outputs are the layer's tensors, their masks and
    the losses of ``add_loss``.
    """

    def __init__(self, layer: Any, call: Call, args: Any, kwargs: Any) -> None:
        self._layer, self._call = layer, call
        self._structure = (args, kwargs)
        self._leaves = keras.tree.flatten(self._structure)
        self._places = [i for i, leaf in enumerate(self._leaves) if ops.is_tensor(leaf)]
        masks = [(i, get_keras_mask(self._leaves[i])) for i in self._places]
        self._masks = [(i, mask) for i, mask in masks if mask is not None]
        names = ("current_call_ctx", "autocast_scope")
        self._surroundings = {name: get_global_attribute(name) for name in names}
        self._outputs: Any = None
        self._out: list[Any] = []
        self._masked: list[int] = []

    def run(self, backend: Backend, unseeded: keras.Variable) -> Any:
        """The layer's outputs; ``unseeded`` is the state of Keras' global generator."""
        stateless_scope()  # fails here if it is going to: torch cannot leave a layer halfway
        tensors = [self._leaves[i] for i in self._places] + [mask for _, mask in self._masks]
        variables = [*self._layer.variables, unseeded]
        results = backend.recompute(self._function, tensors, variables)
        count = sum(ops.is_tensor(x) for x in self._out)
        found = iter(results[:count])
        flat = [next(found) if ops.is_tensor(x) else x for x in self._out]
        masks = results[count : count + len(self._masked)]
        for i, mask in zip(self._masked, masks, strict=True):
            set_keras_mask(flat[i], mask)
        for loss in results[count + len(self._masked) :]:
            self._layer.add_loss(loss)
        return keras.tree.pack_sequence_as(self._outputs, flat)

    def _function(self, tensors: Sequence[Any]) -> list[Any]:
        leaves = list(self._leaves)
        values, masks = tensors[: len(self._places)], tensors[len(self._places) :]
        for i, value in zip(self._places, values, strict=True):
            leaves[i] = value
        for (i, _), mask in zip(self._masks, masks, strict=True):
            set_keras_mask(leaves[i], mask)
        args, kwargs = keras.tree.pack_sequence_as(self._structure, leaves)
        with self._same_surroundings():
            self._outputs = self._call(*args, **kwargs)
        self._out = keras.tree.flatten(self._outputs)
        pairs = [(i, get_keras_mask(x)) for i, x in enumerate(self._out) if ops.is_tensor(x)]
        self._masked = [i for i, mask in pairs if mask is not None]
        scope = stateless_scope()
        return [
            *(x for x in self._out if ops.is_tensor(x)),
            *(mask for _, mask in pairs if mask is not None),
            *([] if scope is None else scope.losses),
        ]

    @contextlib.contextmanager
    def _same_surroundings(self) -> Iterator[None]:
        """Restore mixed precision and ``training`` as they were when the layer was called."""
        before = {name: get_global_attribute(name) for name in self._surroundings}
        for name, value in self._surroundings.items():
            set_global_attribute(name, value)
        try:
            yield
        finally:
            for name, value in before.items():
                set_global_attribute(name, value)
