"""LoRA: small trainable matrices beside frozen layers, over Keras' own ``enable_lora``.

What is frozen here for good is left out of checkpoints (``checkpoint.frozen_base``).
"""

from __future__ import annotations

import contextlib
import copy
import fnmatch
import math
import numbers
import tempfile
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import keras
import numpy as np

from kbtrain.errors import ConfigurationError, concise, first_lines
from kbtrain.utils.layers import walk_layers
from kbtrain.utils.packages import tensorflow_import

DEFAULT_PATTERNS = ("query", "value")
"""The layers that the paper adapts, by the names they have in Keras and KerasHub."""


@dataclass
class Lora:
    """What ``enable_lora`` did to a model.

    Attributes:
        rank: Rank of the adapters.
        alpha: Their scale is ``alpha / rank``.
        patterns: Names of the adapted layers.
        train: Names of further layers that are trained.
        base: The variables that it froze. One that is trained or changed later is removed.
        checksums: Of these, by the variable's ``id``, during a run; see ``checkpoint.frozen_base``.
        blocks: Of what this process has of those that are divided, too.
    """

    rank: int
    alpha: float
    patterns: tuple[str, ...]
    train: tuple[str, ...]
    base: list[keras.Variable]
    checksums: dict[int, Any] = field(default_factory=dict)
    blocks: dict[int, list[bytes]] = field(default_factory=dict)


_known: weakref.WeakKeyDictionary[keras.layers.Layer, Lora] = weakref.WeakKeyDictionary()


@concise
def enable_lora(
    model: keras.Model,
    rank: int = 8,
    patterns: str | Sequence[str] = DEFAULT_PATTERNS,
    *,
    alpha: float | None = None,
    train: str | Sequence[str] = (),
) -> list[str]:
    """Freeze a model, and add LoRA adapters to some of its layers.

    Each adapted layer gets two matrices A and B beside its kernel W and computes with
    ``W + alpha / rank * A B``. B is zero at first, so the model computes what it did. Only the
    adapters are trained; checkpoints hold them and not the frozen weights.

    The model may be quantized: ``model.quantize("int8")`` or ``"int4"`` before the call.

    Args:
        model: A built model, with its pretrained weights.
        rank: Rank of the adapters.
        patterns: Which layers are adapted: names or paths, with ``*`` and ``?`` as in a shell.
            Keras has adapters for ``Dense``, ``EinsumDense`` (``query``, ``key``, ``value`` and
            ``attention_output`` of an attention layer), ``Embedding`` and convolutions.
        alpha: Scale of the adapters; the default is ``rank``.
        train: Which layers are trained as they are, such as a new head; names or paths, too.

    Returns:
        The paths of the adapted layers.

    Raises:
        ConfigurationError: The model is not built, rank or alpha make no sense, no layer fits a
            pattern, or Keras cannot adapt one.

    Example:
        >>> import keras
        >>> layers = [keras.layers.Dense(16, name="body"), keras.layers.Dense(2, name="head")]
        >>> model = keras.Sequential([keras.Input((8,)), *layers], name="net")
        >>> enable_lora(model, rank=2, patterns="body", train="head")
        ['net/body']
        >>> [v.path for v in model.trainable_variables][:2]
        ['net/body/lora_kernel_a', 'net/body/lora_kernel_b']

    Reference:
        Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021.
    """
    if not isinstance(model, keras.Model) or not model.built:
        raise ConfigurationError(
            "enable_lora needs a keras.Model that is built: call it on a batch first, or give it a "
            f"keras.Input. Received: {type(model).__name__}."
        )
    alpha = _checked_scale(rank, alpha)
    names, kept_names = _as_patterns("patterns", patterns), _as_patterns("train", train)
    layers = list(walk_layers(model))
    able = [x for x in layers if hasattr(x, "enable_lora") and not isinstance(x, keras.Model)]
    adapted = _matching(names, able, "Layers that Keras can adapt")
    kept = _matching(kept_names, layers[1:], "The layers")
    _check_adaptable(adapted, kept, rank)
    before = {id(v) for v in model.variables}
    flags = [(x, x.trainable) for x in (*layers, *model.variables)]
    _unfreeze(model)  # so that all that could be trained is listed
    base = [
        *model.trainable_variables,
        *(v for x in layers if _is_quantized(x) for v in x.variables),
    ]
    stays = {id(v) for layer in kept for v in layer.variables}
    base = [v for v in {id(v): v for v in base}.values() if id(v) not in stays]
    try:
        for layer in adapted:
            layer.enable_lora(rank, lora_alpha=alpha)
    except Exception as error:
        for each, flag in flags:
            each.trainable = flag
        raise ConfigurationError(
            f"Keras cannot add an adapter to {layer.path!r}: {first_lines(error)} Leave that layer "
            f"out of patterns. Received: patterns={list(names)}."
        ) from error
    added = {id(v) for v in model.variables if id(v) not in before}
    _freeze(model, {id(x) for x in (*adapted, *kept)}, added | stays)
    _known[model] = Lora(rank, alpha, names, kept_names, base)
    return [_path(layer) for layer in adapted]


def lora_of(model: keras.Model) -> Lora | None:
    """What ``enable_lora`` did to a model or to a part of it; None if it was not called."""
    return next((_known[x] for x in walk_layers(model) if x in _known), None)


def note_trained(model: keras.Model, variables: Iterable[keras.Variable]) -> None:
    """Note that these variables are trained: from now on they are not part of the frozen base."""
    if (lora := lora_of(model)) is not None:
        trained = {id(v) for v in variables}
        lora.base = [v for v in lora.base if id(v) not in trained]


@concise
def merge_lora(model: keras.Model) -> keras.Model:
    """A plain copy of a model, with its adapters added to the kernels.

    It computes what the model does, needs nothing of LoRA, and can be saved, exported and
    trained as any other. The kernels of a quantized model are quantized anew, which rounds them.

    Args:
        model: A model with adapters.

    Returns:
        A new model, built from the configuration of ``model``, with no layer frozen.

    Raises:
        ConfigurationError: The model has no adapters, or Keras cannot rebuild it.
    """
    return merged_copy(model)


def merged_copy(
    model: keras.Model, values: Sequence[tuple[keras.Variable, np.ndarray]] = ()
) -> keras.Model:
    """``merge_lora`` with other values of some variables: of those that are divided, the whole.

    Raises:
        ConfigurationError: The model has no adapters, or Keras cannot rebuild it.
    """
    if not has_adapters(model):
        raise ConfigurationError(
            f"The model {model.name!r} has no LoRA adapters to merge. Call enable_lora first."
        )
    try:
        with tensorflow_import.not_imported(), tempfile.TemporaryDirectory() as folder:
            config = keras.saving.serialize_keras_object(model)
            merged = keras.saving.deserialize_keras_object(_without_lora(config))
            _quantize_like(merged, model)
            _unfreeze(merged)
            path = Path(folder) / "merged.weights.h5"
            with keras.StatelessScope(list(values)) if values else contextlib.nullcontext():
                model.save_weights(path)  # Keras writes the kernels with the adapters added
            merged.load_weights(path)
    except Exception as error:  # a model's get_config may raise anything
        raise ConfigurationError(
            f"The model {model.name!r} cannot be rebuilt without its adapters: "
            f"{first_lines(error)} Register its classes with "
            "keras.saving.register_keras_serializable and give them get_config; or load what "
            "model.save_weights(path) writes, which is merged, into a model without adapters."
        ) from error
    return merged


def has_adapters(model: keras.Model) -> bool:
    """Whether any layer has an adapter, whoever added it."""
    return any(getattr(layer, "lora_enabled", False) for layer in walk_layers(model))


def _checked_scale(rank: Any, alpha: Any) -> float:
    """Alpha as a number.

    Raises:
        ConfigurationError: The rank or alpha make no sense.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ConfigurationError(f"rank must be a positive integer. Received: rank={rank!r}")
    if alpha is None:
        return float(rank)
    # A NumPy number is a Real too.
    is_number = isinstance(alpha, numbers.Real) and not isinstance(alpha, bool)
    if not is_number or not math.isfinite(alpha) or alpha <= 0:
        raise ConfigurationError(
            "alpha must be a positive number, or None for the rank: adapters are scaled by "
            f"alpha / rank. Received: alpha={alpha!r}"
        )
    return float(alpha)


def _as_patterns(name: str, given: Any) -> tuple[str, ...]:
    patterns = (given,) if isinstance(given, str) else given
    if isinstance(patterns, Iterable):
        found = tuple(patterns)
        if all(isinstance(pattern, str) and pattern for pattern in found):
            return found
    raise ConfigurationError(f"{name} must be a list of layers' names. Received: {name}={given!r}")


def _matching(
    patterns: Sequence[str], layers: Sequence[keras.layers.Layer], known: str
) -> list[keras.layers.Layer]:
    """The layers that fit a pattern; each must fit one."""
    found: dict[int, keras.layers.Layer] = {}
    for pattern in patterns:
        fitting = [
            layer
            for layer in layers
            if any(fnmatch.fnmatchcase(name, pattern) for name in (layer.name, _path(layer)))
        ]
        if not fitting:
            paths = [_path(layer) for layer in layers if layer.weights]
            shown = ", ".join(paths[:20]) + (f" and {len(paths) - 20} more" * (len(paths) > 20))
            raise ConfigurationError(
                f"No layer fits the pattern {pattern!r}. {known}: {shown or 'none'}."
            )
        found |= {id(layer): layer for layer in fitting}
    return [layer for layer in layers if id(layer) in found]


def _check_adaptable(
    adapted: Sequence[keras.layers.Layer], kept: Sequence[keras.layers.Layer], rank: int
) -> None:
    """Check what can be known before anything is changed.

    Raises:
        ConfigurationError: A layer has an adapter, is to be trained as well, or is smaller than the
            rank; or nothing is adapted.
    """
    if not adapted:
        raise ConfigurationError("enable_lora needs patterns of layers to adapt. Received: none")
    inside = {id(x): x for layer in kept for x in walk_layers(layer)}
    for layer in inside.values():
        if _is_quantized(layer):
            raise ConfigurationError(
                f"The layer {_path(layer)!r} is quantized, so it cannot be trained as it is. Adapt "
                "it (patterns), or do not quantize it: model.quantize(..., filters=...)."
            )
    for layer in adapted:
        if getattr(layer, "lora_enabled", False):
            raise ConfigurationError(
                f"The layer {layer.path!r} has an adapter. enable_lora can be called once."
            )
        if id(layer) in inside:
            raise ConfigurationError(
                f"The layer {layer.path!r} fits both patterns and train: it can be adapted, or "
                "trained as it is."
            )
        if rank > (limit := _largest_rank(layer)):
            raise ConfigurationError(
                f"The kernel of {layer.path!r} has at most {limit} rows or columns, so an adapter "
                f"of a larger rank adds nothing. Received: rank={rank}"
            )


def _largest_rank(layer: keras.layers.Layer) -> int:
    """The larger side of a layer's kernel, as Keras' adapters see it."""
    shapes = (tuple(map(int, v.shape)) for v in layer.variables)
    shape = max(shapes, key=math.prod, default=(1,))
    packed = getattr(layer, "quantization_mode", None) == "int4"  # two numbers in a byte
    side: int = max(math.prod(shape[:-1]), shape[-1])
    return side * (2 if packed else 1)


def _path(layer: keras.layers.Layer) -> str:
    return str(layer.path or layer.name)


def _is_quantized(layer: keras.layers.Layer) -> bool:
    return getattr(layer, "quantization_mode", None) is not None


def _unfreeze(model: keras.Model) -> None:
    for layer in walk_layers(model):  # on TensorFlow the flag of a model does not reach all of them
        layer.trainable = True


def _freeze(model: keras.Model, layers: set[int], variables: set[int]) -> None:
    """Freeze all but some layers and what they are in, and all but some variables."""
    for layer in walk_layers(model):
        if not any(id(inner) in layers for inner in walk_layers(layer)) and not _within(
            model, layer, layers
        ):
            layer.trainable = False
    for variable in model.trainable_variables:
        if id(variable) not in variables:
            variable.trainable = False


def _within(model: keras.Model, layer: keras.layers.Layer, layers: set[int]) -> bool:
    """Whether a layer is inside one of some layers."""
    outer = (x for x in walk_layers(model) if id(x) in layers)
    return any(inner is layer for x in outer for inner in walk_layers(x))


def _quantize_like(copied: keras.Model, model: keras.Model) -> None:
    """Quantize the layers of a copy that are quantized in the model.

    Configurations do not say so of layers that their owner creates, such as those of attention.
    """
    for layer, original in zip(walk_layers(copied), walk_layers(model), strict=True):
        if _is_quantized(original) and not _is_quantized(layer):
            layer.quantize(original.quantization_mode, config=original.quantization_config)


def _without_lora(config: Any) -> Any:
    """A serialized model without the adapters of its layers."""
    if isinstance(config, dict):
        dropped = ("lora_rank", "lora_alpha")
        return {k: _without_lora(v) for k, v in config.items() if k not in dropped}
    if isinstance(config, list | tuple):
        return type(config)(map(_without_lora, config))
    return copy.copy(config)
