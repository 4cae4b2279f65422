"""The forward pass of a batch through model and loss, shared by training and evaluation."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import keras
from keras import ops

from kbtrain import backends
from kbtrain.data import LabelNames, counting_leaf, unpack, with_none
from kbtrain.data.ragged import has_ragged, map_ragged
from kbtrain.errors import ConfigurationError, DataError, KbtrainError
from kbtrain.model.losses.keras_losses import (
    combine_masks,
    is_summed,
    keras_loss_pair,
    resolve_crossentropy,
    takes_any_labels,
    without_ignored,
)
from kbtrain.model.losses.output_losses import (
    LossTerms,
    OutputLosses,
    losses_of,
    with_added,
)
from kbtrain.model.losses.pairing import Outputs, loss_weights_of, only_tensors, pair_up
from kbtrain.model.losses.pairs import (
    LossPair,
    as_dtype_of,
    as_float,
    as_pair,
    call_loss_func,
    count_items,
)
from kbtrain.model.method_overrides import overrides
from kbtrain.utils.packages.keras_private import get_keras_mask

ComputeLoss = Callable[..., Any]


class _TrainingScope(keras.layers.Layer):  # type: ignore[misc]
    """Calls a function with Keras' ``training`` flag set, as inside an outer layer.

    ``model(x)`` in a user's ``compute_loss`` thus runs dropout in training and not in evaluation,
    without passing the flag.
    """

    def __init__(self, function: Callable[..., Any], model: keras.Model) -> None:
        super().__init__(autocast=False, name="training_scope")
        self._function = function
        self.model = model  # tracked, so that the losses of add_loss are cleared for each call
        self.built = True
        self._error: Exception | None = None

    def call(self, batch: Any, num_items: Any = None, training: bool | None = None) -> Any:
        try:
            return self._function(batch, num_items)
        except Exception as error:
            self._error = error
            raise

    def run(self, batch: Any, num_items: Any, training: bool) -> Any:
        """Call the layer. An error is the one that was raised, without Keras' words about a layer.

        Keras replaces it by one that names this class, which the user has never heard of.
        """
        try:
            return self(batch, num_items=num_items, training=training)
        except Exception:
            error, self._error = self._error, None  # its frames hold tensors
            if error is None:
                raise
        raise error


class ForwardPass:
    """The forward pass that a step runs on each batch.

    Args:
        model: A built model.
        compute_loss: ``Trainer.compute_loss``, possibly overridden.
        loss: The resolved loss, which determines the ignored labels.
        tracked: Dict that ``Trainer.track`` fills while the loss is computed.
        label_names: Keys of the labels in a batch that is a dict, if not the usual ones.
        with_metrics: Whether to return the arguments of metrics.
        by_model: Whether the model's ``compute_loss`` computes the loss.
        without_labels: Whether metrics are also updated for batches without labels.
        batch_size: The batch size that stateful layers require, or None.

    Attributes:
        has_terms: Whether the loss may have several terms. Their counts for the whole update are
            then needed before its first micro-batch is differentiated.
    """

    def __init__(
        self,
        model: keras.Model,
        compute_loss: ComputeLoss,
        loss: Any,
        tracked: dict[str, Any],
        label_names: LabelNames = None,
        *,
        with_metrics: bool = True,
        has_terms: bool = False,
        by_model: bool = False,
        without_labels: bool = False,
        batch_size: int | None = None,
    ) -> None:
        self._model, self._tracked = model, tracked
        self._loss = loss
        self._label_names, self._with_metrics = label_names, with_metrics
        self.has_terms = has_terms
        self._by_model, self._without_labels = by_model, without_labels
        self._batch_size = batch_size
        self._training = False
        self._added_is_in = False  # losses of add_loss and regularizers are part of the loss

        def with_loss(batch: Any, num_items: Any) -> Any:
            return compute_loss(model, batch, return_outputs=True, num_items_in_batch=num_items)

        self._with_loss = _TrainingScope(with_loss, model)

    def __call__(
        self, batch: Any, num_items: Any, training: bool
    ) -> tuple[LossPair | LossTerms, Any, tuple[Any, ...] | None]:
        """Loss, outputs and the metrics' arguments; see ``Forward``."""
        batch = restore_structure(batch)
        x, y, sample_weight = unpack(batch, self._label_names)
        self._check_size(x)
        self._tracked.clear()
        self._training, self._added_is_in = training, False
        result = (
            self.model_loss(batch)
            if self._by_model
            else self._with_loss.run(batch, num_items, training)
        )
        if not isinstance(result, tuple) or len(result) != 2:
            raise ConfigurationError(
                "compute_loss(..., return_outputs=True) must return (loss, outputs). "
                f"Received: {type(result).__name__}."
            )
        loss, outputs = result
        size = counting_leaf(x, y, sample_weight).shape[0]
        value: LossPair | LossTerms
        if isinstance(loss, OutputLosses):
            value = loss.terms(training)
        else:
            value = as_pair(loss, size, None if isinstance(loss, LossPair) else sample_weight)
        if self._tracked:
            value = value._replace(extras={**value.extras, **self._tracked})
            self._tracked.clear()  # tensors of this trace must not outlive it
        added = [] if self._added_is_in else self._model.losses
        if added:
            value = with_added(value, added, size, training and self.has_terms)
        if not self._with_metrics or (y is None and not self._without_labels):
            return value, outputs, None
        if y is None or self._by_model:  # only the model can match labels to outputs
            tensors = only_tensors(outputs)
            masks = [None] * len(keras.tree.flatten(tensors))
            return value, outputs, (x, y, tensors, sample_weight, masks)
        return value, outputs, self._metric_inputs(x, y, outputs, sample_weight)

    def model_loss(self, batch: Any) -> tuple[LossPair, Any]:
        """The loss from the model's ``compute_loss``, called as in Keras' ``fit``.

        The method is responsible for ``model.losses`` and for the sample weights.
        """
        x, y, sample_weight = unpack(batch, self._label_names)
        outputs = _call(self._model, x, training=self._training)
        compute = self._model.compute_loss
        takes_training = "training" in inspect.signature(compute).parameters
        named = {"training": self._training} if takes_training else {}
        try:
            loss = compute(x, y, outputs, sample_weight, **named)
        except AttributeError as error:
            if getattr(self._model, "compiled", False):
                raise
            name = type(self._model).__name__
            raise ConfigurationError(
                f"{name}.compute_loss uses None, and the model is not compiled. Call its "
                f"compile() first, if that is what sets it. Python says: {error}"
            ) from error
        self._added_is_in = True
        return as_pair(loss, counting_leaf(x, y, sample_weight).shape[0]), outputs

    def _metric_inputs(self, x: Any, y: Any, outputs: Any, weight: Any) -> tuple[Any, ...]:
        """``(x, y, outputs, sample_weight, masks)`` in the structure of the outputs.

        There is one mask per output, False at positions to leave out, or None. Ignored labels are
        replaced by a valid one.
        """
        outputs = only_tensors(outputs)
        known = Outputs(outputs, output_names(self._model))
        losses = {} if self._loss is None else known.assign(self._loss, "loss")
        active = [i for i in range(len(known.leaves)) if losses.get(i) is not None]
        if keras.tree.is_nested(y) and not known.nested and takes_any_labels(self._loss):
            return x, y, outputs, weight, [get_keras_mask(outputs)]
        labels = known.labels(y, active, label_names=self._label_names)
        if keras.tree.is_nested(weight):
            weights = known.labels(weight, active, "sample weight", self._label_names)
            weight = known.pack(weights)
        masks: list[Any] = []
        for i, output in enumerate(known.leaves):
            mask = get_keras_mask(output) if ops.is_tensor(output) else None
            if losses.get(i) is not None and ops.is_tensor(labels.get(i)):
                loss = resolve_crossentropy(losses[i], labels[i], output)
                labels[i], keep = without_ignored(loss, labels[i], output)
                mask = combine_masks(mask, keep)
            masks.append(mask)
        return x, known.pack(labels), outputs, weight, masks

    def predict(self, batch: Any, num_items: Any, training: bool) -> tuple[None, Any, None]:
        """Outputs only, for data without labels."""
        x = unwrap_single_input(self._model, unpack(restore_structure(batch), self._label_names).x)
        self._check_size(x)
        return None, self._model(x, training=training), None

    def _check_size(self, x: Any) -> None:
        size = keras.tree.flatten(x)[0].shape[0]
        if self._batch_size not in (None, size):
            raise DataError(
                f"The model {self._model.name!r} has a stateful RNN, whose states are for batches "
                f"of {self._batch_size} samples. Received: a batch of {size}. Set "
                "dataloader_drop_last=True, or a batch size that divides the number of samples; "
                "for evaluations per_device_eval_batch_size, too."
            )


def restore_structure(batch: Any) -> Any:
    """Restore the structure in which the data was given: None entries and ragged arrays."""
    batch = with_none(batch)
    return map_ragged(backends.load().ragged, batch) if has_ragged(batch) else batch


def inputs_of(model: Any) -> Any:
    """The ``keras.Input`` objects of a functional model in their structure, else None."""
    try:
        return model.inputs[0] if isinstance(model, keras.Sequential) else model.input
    except (AttributeError, ValueError):
        return None


def unwrap_single_input(model: keras.Model, x: Any) -> Any:
    """Unwrap a dict with one entry for a model with one input; Keras would warn at each trace."""
    taken = inputs_of(model)
    named = isinstance(x, Mapping) and isinstance(taken, keras.KerasTensor) and taken.name in x
    return x[taken.name] if named else x


def output_names(model: keras.Model) -> list[str] | None:
    """The names of a functional model's outputs, else None."""
    names = getattr(model, "output_names", None)
    return list(names) if names else None


def default_loss(
    model: keras.Model,
    batch: Any,
    num_items: Any,
    loss: Any,
    loss_weights: Any,
    loss_func: Callable[..., Any] | None,
    label_names: LabelNames = None,
) -> tuple[LossPair | OutputLosses, Any]:
    """The default implementation of ``Trainer.compute_loss``.

    Raises:
        ConfigurationError: There is no loss.
        DataError: The loss needs labels and the data has none.
    """
    x, y, sample_weight = unpack(batch, label_names)
    outputs = _call(model, x)
    size = counting_leaf(x, y, sample_weight).shape[0]
    if loss is None and loss_func is None:
        return _own_loss(model, outputs, size), outputs
    if y is None:
        raise DataError(
            "The data has no labels, but the loss needs them. Pass (x, y) arrays, or a dict with "
            f"the key 'labels'. Received: {_keys(batch)}."
        )
    if loss_func is not None:
        return call_loss_func(loss_func, outputs, y, sample_weight, num_items, size), outputs
    known = Outputs(only_tensors(outputs), output_names(model))
    nested = [keras.tree.is_nested(tree) for tree in (loss, outputs, y)]
    whole = nested == [False, False, True] and takes_any_labels(loss)  # a function of all labels
    if (any(nested) and not whole) or is_summed(loss):
        rows = pair_up(loss, loss_weights, y, known, sample_weight, label_names)
        return losses_of(rows, size), outputs
    pair = keras_loss_pair(loss, y, outputs, sample_weight)
    if loss_weights is not None:
        (weight,) = loss_weights_of(loss_weights, [0], known).values()
        pair = pair._replace(sum=pair.sum * as_dtype_of(weight, pair.sum))
    return pair, outputs


def _call(model: keras.Model, x: Any, **kwargs: Any) -> Any:
    x = unwrap_single_input(model, x)
    try:
        return model(x, **kwargs)
    except ValueError as error:
        # Keras checks the rank against keras.Input only for actual inputs.
        if isinstance(error, KbtrainError) or "Invalid input shape for input" not in str(error):
            raise
        shapes = keras.tree.map_structure(lambda t: str(tuple(t.shape)), x)
        expected = re.search(r"Expected shape (\(.*?\))", str(error))
        raise DataError(
            f"The model {model.name!r} does not accept the inputs of the data: the shape of one "
            f"of them differs from its keras.Input. Received: {shapes}."
            + (f" Expected: {expected[1]}." if expected else "")
        ) from None


def _own_loss(model: keras.Model, outputs: Any, size: int) -> LossPair:
    if isinstance(outputs, Mapping) and "loss" in outputs:
        return as_pair(outputs["loss"], size)
    if model.losses:
        zero = as_dtype_of(0.0, as_float(model.losses[0]))
        return LossPair(zero, as_dtype_of(size, zero))
    raise ConfigurationError(
        "There is no loss: pass loss=... or compute_loss_func=... to the Trainer, compile the "
        "model with one, return a dict with the key 'loss' from it, or use add_loss in it."
        + _instead_of_loss(model)
    )


def _instead_of_loss(model: keras.Model) -> str:
    """Further ways to give a model of this class a loss, for the error message."""
    name = type(model).__name__
    if overrides(model, "train_step"):
        return (
            f" {name} has a custom train_step but no test_step, so it is evaluated like any "
            "keras.Model. Define test_step as well, or turn evaluation off (eval_strategy='no')."
        )
    if overrides(model, "compile") and not getattr(model, "compiled", False):
        return f" {name} has a custom compile method, which was not called."
    return " Or define compute_loss(self, x, y, y_pred, sample_weight, training) in it."


def _keys(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return f"a dict with the keys {sorted(map(str, batch))}"
    if ops.is_tensor(batch):
        return "one array"
    return f"a {type(batch).__name__}" + (f" of {len(batch)}" if isinstance(batch, tuple) else "")


def items_counter(
    loss_func: Callable[..., Any] | None, label_names: LabelNames = None
) -> Callable[[Any, int], Any] | None:
    """A function ``count(batch, batch_axes)`` of labels if the loss needs the total, else None.

    ``batch_axes`` is 1 for a batch and 2 for micro-batches stacked along one more axis.
    """
    if loss_func is None or "num_items_in_batch" not in inspect.signature(loss_func).parameters:
        return None

    def count(batch: Any, batch_axes: int) -> Any:
        parts = unpack(with_none(batch), label_names)
        return count_items(parts.y, math.prod(counting_leaf(*parts).shape[:batch_axes]))

    return count


class Forward(Protocol):
    """One pass through the model.

    Returns ``(loss, outputs, metric_inputs)``: the loss of the batch including ``add_loss`` and
    regularizers, the model's outputs, and the arguments for ``MetricSet.update``. Without labels
    (in prediction) the first and the last are None.
    """

    def __call__(
        self, batch: Any, num_items: Any, training: bool
    ) -> tuple[LossPair | LossTerms | None, Any, tuple[Any, ...] | None]:
        """Run the model on one batch."""
