"""One pass of a batch through the model and the loss, for the train and the evaluation step."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
from keras import ops

from kbtrain.data import unpack
from kbtrain.errors import ConfigurationError, DataError, KbtrainError
from kbtrain.loss import (
    LossPair,
    as_float,
    as_pair,
    call_loss_func,
    count_items,
    get_keras_mask,
    ignored_labels,
    keras_loss_pair,
    structured_loss_pair,
)

ComputeLoss = Callable[..., Any]


class _TrainingScope(keras.layers.Layer):
    """Calls a function with the layers' ``training`` flag set, as inside an outer layer.

    So ``model(x)`` in a user's ``compute_loss`` runs dropout in training and not in evaluation,
    without having to pass a flag on.
    """

    def __init__(self, function: Callable[..., Any], model: keras.Model) -> None:
        super().__init__(autocast=False, name="training_scope")
        self._function = function
        self.model = model  # tracked, so that the losses of add_loss are cleared for each call
        self.built = True

    def call(self, batch: Any, num_items: Any = None, training: bool | None = None) -> Any:
        return self._function(batch, num_items)


class ForwardPass:
    """What a step runs on each batch.

    Args:
        model: A built model.
        compute_loss: ``Trainer.compute_loss``, possibly overridden.
        loss: The resolved loss, to know which labels are ignored.
        tracked: Where ``Trainer.track`` puts values while the loss is computed.
        label_names: Keys of the labels in a batch that is a dict, if not the usual ones.
    """

    def __init__(
        self,
        model: keras.Model,
        compute_loss: ComputeLoss,
        loss: Any,
        tracked: dict[str, Any],
        label_names: Sequence[str] | None = None,
    ) -> None:
        self._model, self._tracked = model, tracked
        self._loss = loss
        self._label_names = label_names

        def with_loss(batch: Any, num_items: Any) -> Any:
            return compute_loss(model, batch, return_outputs=True, num_items_in_batch=num_items)

        self._with_loss = _TrainingScope(with_loss, model)

    def __call__(
        self, batch: Any, num_items: Any, training: bool
    ) -> tuple[LossPair, Any, tuple[Any, ...] | None]:
        """Loss, outputs and the metrics' arguments; see ``kbtrain.step.Forward``."""
        x, y, sample_weight = unpack(batch, self._label_names)
        self._tracked.clear()
        result = self._with_loss(batch, num_items=num_items, training=training)
        if not isinstance(result, tuple) or len(result) != 2:
            raise ConfigurationError(
                "compute_loss(..., return_outputs=True) must return (loss, outputs). "
                f"Received: {type(result).__name__}."
            )
        loss, outputs = result
        size = keras.tree.flatten(x)[0].shape[0]
        pair = as_pair(loss, size, None if isinstance(loss, LossPair) else sample_weight)
        if self._tracked:
            pair = pair._replace(extras={**pair.extras, **self._tracked})
            self._tracked.clear()  # values of this trace must not live on
        added = self._model.losses  # add_loss and regularizers: means, weighted like the batch
        if added:
            total = sum(ops.mean(as_float(value)) for value in added)
            pair = pair._replace(sum=pair.sum + total * pair.count)
        if y is None:
            return pair, outputs, None
        return pair, outputs, self._metric_inputs(x, y, outputs, sample_weight)

    def _metric_inputs(self, x: Any, y: Any, outputs: Any, weight: Any) -> tuple[Any, ...]:
        """``(x, y, outputs, sample_weight, mask)``, the mask False at what does not count.

        Ignored labels become a label that every metric can take.
        """
        outputs = by_output_name(self._model, y, outputs)
        mask = get_keras_mask(outputs) if ops.is_tensor(outputs) else None
        if (keep := ignored_labels(self._loss, y)) is not None:
            y = ops.where(keep, y, ops.zeros_like(y))
            if len(keep.shape) == len(outputs.shape) and keep.shape[-1] == 1:
                keep = ops.squeeze(keep, -1)
            mask = keep if mask is None else ops.logical_and(ops.cast(mask, "bool"), keep)
        return x, y, outputs, weight, mask

    def predict(self, batch: Any, num_items: Any, training: bool) -> tuple[None, Any, None]:
        """Outputs only, for data without labels."""
        x = as_taken(self._model, unpack(batch, self._label_names).x)
        return None, self._model(x, training=training), None


def inputs_of(model: Any) -> Any:
    """The ``keras.Input`` objects of a model in their structure; None if only its code says."""
    try:
        return model.inputs[0] if isinstance(model, keras.Sequential) else model.input
    except (AttributeError, ValueError):
        return None


def as_taken(model: keras.Model, x: Any) -> Any:
    """What a dict holds for a model with one input: Keras would warn of the dict at each trace."""
    taken = inputs_of(model)
    named = isinstance(x, Mapping) and isinstance(taken, keras.KerasTensor) and taken.name in x
    return x[taken.name] if named else x


def by_output_name(model: keras.Model, y: Any, outputs: Any) -> Any:
    """A list of outputs as a dict, where the labels are one: Keras names a model's outputs."""
    names = getattr(model, "output_names", None)
    if names and isinstance(y, Mapping) and isinstance(outputs, list | tuple):
        return dict(zip(names, outputs, strict=True))
    return outputs


def default_loss(
    model: keras.Model,
    batch: Any,
    num_items: Any,
    loss: Any,
    loss_weights: Any,
    loss_func: Callable[..., Any] | None,
    label_names: Sequence[str] | None = None,
) -> tuple[LossPair, Any]:
    """What ``Trainer.compute_loss`` does unless it is overridden.

    Raises:
        ConfigurationError: There is nothing to compute a loss with.
        DataError: The data has no labels, and the loss needs some.
    """
    x, y, sample_weight = unpack(batch, label_names)
    outputs = _call(model, x)
    size = keras.tree.flatten(x)[0].shape[0]
    if loss is None and loss_func is None:
        return _own_loss(model, outputs, size), outputs
    if y is None:
        raise DataError(
            "The data has no labels, but the loss needs them. Give (x, y) arrays, or a dict with "
            f"the key 'labels'. Received: {_keys(batch)}."
        )
    if loss_func is not None:
        return call_loss_func(loss_func, outputs, y, sample_weight, num_items, size), outputs
    if isinstance(loss, Mapping | list):
        named = by_output_name(model, y, outputs)
        pair = structured_loss_pair(loss, loss_weights, y, named, sample_weight, size)
    else:
        pair = keras_loss_pair(loss, y, outputs, sample_weight)
    return pair, outputs


def _call(model: keras.Model, x: Any) -> Any:
    x = as_taken(model, x)
    try:
        return model(x)
    except ValueError as error:
        # Only real inputs are compared with the rank of keras.Input.
        if isinstance(error, KbtrainError) or "Invalid input shape for input" not in str(error):
            raise
        shapes = keras.tree.map_structure(lambda t: str(tuple(t.shape)), x)
        expected = re.search(r"Expected shape (\(.*?\))", str(error))
        raise DataError(
            f"The model {model.name!r} does not accept the inputs of the data: one of these has "
            f"another shape than its keras.Input. Received: {shapes}."
            + (f" Expected: {expected[1]}." if expected else "")
        ) from None


def _own_loss(model: keras.Model, outputs: Any, size: int) -> LossPair:
    if isinstance(outputs, Mapping) and "loss" in outputs:
        return as_pair(outputs["loss"], size)
    if model.losses:
        return LossPair(as_float(0.0), as_float(size))
    raise ConfigurationError(
        "There is no loss: pass loss=... or compute_loss_func=... to the Trainer, compile the "
        "model with one, return a dict with the key 'loss' from it, or use add_loss in it."
    )


def _keys(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return f"a dict with the keys {sorted(map(str, batch))}"
    if ops.is_tensor(batch):
        return "one array"
    return f"a {type(batch).__name__}" + (f" of {len(batch)}" if isinstance(batch, tuple) else "")


def items_counter(
    loss_func: Callable[..., Any] | None, label_names: Sequence[str] | None = None
) -> Callable[[Any, int], Any] | None:
    """``count(batch, batch_axes)`` of labels, if the loss function asks for the total; else None.

    ``batch_axes`` is 1 for a batch and 2 for micro-batches stacked along one more axis.
    """
    if loss_func is None or "num_items_in_batch" not in inspect.signature(loss_func).parameters:
        return None

    def count(batch: Any, batch_axes: int) -> Any:
        x, y, _ = unpack(batch, label_names)
        return count_items(y, math.prod(keras.tree.flatten(x)[0].shape[:batch_axes]))

    return count
