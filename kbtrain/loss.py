"""Losses as ``(sum, count)`` pairs, so that the trainer owns the reduction.

Over micro-batches, devices and an evaluation set alike, ``loss = sum of sums / sum of counts``:
accumulation over 4 x 2 equals one batch of 8 to rounding, padded positions never count, and the
evaluation loss does not depend on the evaluation batch size.

What counts is what Keras counts with ``reduction="sum_over_batch_size"``: every element of the
unreduced loss that is not masked. Sample weights scale the numerator only (with
``reduction="mean_with_sample_weight"`` the denominator is the sum of the weights instead).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import keras
from keras import ops

# A mask is an attribute of the tensor, or, where tensors take none (JAX), in a table of Keras' own;
# there is no public door to it.
from keras.src.backend.common.masking import get_keras_mask

from kbtrain.errors import ConfigurationError, DataError, first_lines

IGNORE_INDEX = -100
"""Integer labels with this value are left out of the loss and of the metrics."""


class LossPair(NamedTuple):
    """A loss before its reduction.

    Attributes:
        sum: Scalar float32 tensor, the sum of the weighted losses.
        count: Scalar float32 tensor, what to divide by.
        extras: More named scalar tensors to average and log.
    """

    sum: Any
    count: Any
    extras: Mapping[str, Any] = {}


def as_float(value: Any) -> Any:
    """``value`` as a float32 tensor."""
    return ops.cast(ops.convert_to_tensor(value), "float32")


def mean(total: Any, count: Any) -> Any:
    """``total / count``, and ``total`` itself (0, or NaN if it is NaN) where nothing counts."""
    return total / divisor(count)


def divisor(count: Any) -> Any:
    """What a sum is divided by for its mean: ``count``, and 1 where nothing counts."""
    return ops.where(count == 0, ops.ones_like(count), count)


TAKEN = ("loss", "grad_norm", "learning_rate", "epoch", "step")
"""Names of a log that a value or a metric of the user's would hide."""


def as_extra(name: Any, value: Any, source: str) -> Any:
    """A value to log as a scalar tensor: the mean of all its elements.

    Args:
        name: Its name in the logs.
        value: A number or a tensor.
        source: What errors begin with, such as "track() got".

    Raises:
        ConfigurationError: The name is no text or has a meaning already, or there is no number.
    """
    check_name(name, source)
    try:
        if isinstance(value, str | bytes):
            raise TypeError  # each backend has an error of its own for it
        return ops.mean(as_float(value))
    except (TypeError, ValueError):
        raise ConfigurationError(
            f"{source} something that is no number or tensor under the name {name!r}. "
            f"Received: {type(value).__name__}."
        ) from None


def check_name(name: Any, source: str) -> None:
    """Make sure that values can be logged under a name.

    Raises:
        ConfigurationError: It is no text, or the Trainer logs something else under it.
    """
    if not isinstance(name, str) or not name:
        raise ConfigurationError(f"{source} a name that is no text. Received: {name!r}.")
    if name in TAKEN:
        raise ConfigurationError(
            f"{source} the name {name!r}, under which the Trainer logs something else: it would be "
            f"hidden. Choose another one than {', '.join(TAKEN)}."
        )


# --- what a user's function may return ------------------------------------------------------------


def _extras(values: Mapping[Any, Any]) -> dict[str, Any]:
    return {n: as_extra(n, v, "The loss came with values to log, with") for n, v in values.items()}


def as_pair(value: Any, batch_size: int, sample_weight: Any = None) -> LossPair:
    """Turn what a loss function returned into a pair.

    Args:
        value: A scalar (the mean over the batch), a tensor whose first axis is the batch
            (per-element losses), ``(sum, count)``, or ``(any of these, dict of extras)``.
        batch_size: Number of samples in the batch.
        sample_weight: Optional tensor ``[batch]`` or broadcastable to per-element losses.

    Raises:
        ConfigurationError: The value has another form, or sample weights cannot be applied to it.
    """
    extras: Mapping[str, Any] = {}
    if isinstance(value, LossPair):
        value, extras = (value.sum, value.count), value.extras
    elif isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], Mapping):
        value, extras = value
    extras = _extras(extras)
    if isinstance(value, tuple) and len(value) == 2:
        total, count = as_float(value[0]), as_float(value[1])
        if len(total.shape) or len(count.shape):
            raise ConfigurationError(
                "A loss given as (sum, count) must be two scalars. "
                f"Received shapes {tuple(total.shape)} and {tuple(count.shape)}."
            )
        return LossPair(total, count, extras)
    if not ops.is_tensor(value) and not isinstance(value, int | float):
        raise ConfigurationError(
            "A loss must be a scalar, a tensor of per-element losses, (sum, count), or one of "
            f"these with a dict of values to log. Received: {type(value).__name__}."
        )
    losses = as_float(value)
    if len(losses.shape):
        return LossPair(*weighted_sum(losses, sample_weight), extras)
    if sample_weight is not None:
        raise ConfigurationError(
            "The data has sample weights, but the loss function returned a scalar, to which they "
            "cannot be applied. Return per-element losses, or (sum, count) with the weights "
            "applied (a function with an argument `sample_weight` receives them)."
        )
    count = as_float(batch_size)
    return LossPair(losses * count, count, extras)


def weighted_sum(
    losses: Any, sample_weight: Any = None, mask: Any = None, count_weights: bool = False
) -> tuple[Any, Any]:
    """Sum and count of per-element losses.

    Args:
        losses: Tensor ``[batch, ...]``.
        sample_weight: Tensor ``[batch]``, ``[batch, 1]`` or of the shape of ``losses``.
        mask: Boolean tensor of the shape of ``losses`` (or with fewer trailing axes); False is
            left out.
        count_weights: Divide by the sum of the weights instead of the number of elements.

    Returns:
        ``(sum, count)``, float32 scalars.
    """
    ones = ops.ones_like(losses)
    weight, valid = ones, ones
    if mask is not None:
        valid = ones * _expand_like(ops.cast(mask, "float32"), losses)
        # A masked element may hold anything, also NaN: select, do not multiply.
        losses = ops.where(valid > 0, losses, ops.zeros_like(losses))
        weight = valid
    if sample_weight is not None:
        weight = weight * _expand_like(as_float(sample_weight), losses)
    return ops.sum(losses * weight), ops.sum(weight if count_weights else valid)


def _expand_like(x: Any, reference: Any) -> Any:
    """Drop or add trailing axes of length 1 until ``x`` broadcasts to ``reference``."""
    while len(x.shape) > len(reference.shape) and x.shape[-1] == 1:
        x = ops.squeeze(x, -1)
    while len(x.shape) < len(reference.shape):
        x = ops.expand_dims(x, -1)
    if len(x.shape) != len(reference.shape) or any(
        a not in (1, b) for a, b in zip(x.shape, reference.shape, strict=True)
    ):
        raise ConfigurationError(
            f"Sample weights or a mask of shape {tuple(x.shape)} do not fit losses of shape "
            f"{tuple(reference.shape)}. Give one value per sample or one per loss element."
        )
    return x


# --- Keras losses ---------------------------------------------------------------------------------


def resolve_loss(loss: Any) -> Any:
    """Names become Keras losses; functions and ``Loss`` objects stay; dicts and lists are walked.

    Raises:
        ConfigurationError: Unknown name, not callable, or a loss with ``reduction="sum"``.
    """
    if loss is None:
        return None
    if isinstance(loss, Mapping):
        return {name: resolve_loss(item) for name, item in loss.items()}
    if isinstance(loss, list | tuple):
        return [resolve_loss(item) for item in loss]
    if isinstance(loss, str):
        loss = _loss_by_name(loss)
    if isinstance(loss, keras.losses.Loss) and loss.reduction == "sum":
        raise ConfigurationError(
            f"loss={type(loss).__name__}(reduction='sum') cannot be averaged over micro-batches "
            "and evaluation batches. Use the default reduction (and scale the learning rate), or a "
            "compute_loss_func that returns (sum, count)."
        )
    if isinstance(loss, type) or not callable(loss):
        raise ConfigurationError(
            "loss must be the name of a Keras loss, a keras.losses.Loss, a function "
            f"(y_true, y_pred) -> losses, or a dict or list of these. Received: loss={loss!r}"
            + (f". Make an object of it: {loss.__name__}()." if isinstance(loss, type) else "")
        )
    return loss


def _loss_by_name(name: str) -> Any:
    try:
        return keras.losses.get(name)
    except ValueError:
        import difflib

        known = sorted({n for n in dir(keras.losses) if n[0].islower()} - {"get", "serialize"})
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ConfigurationError(
            f"loss={name!r} is not a loss of Keras.{hint} Known functions: {', '.join(known)}."
        ) from None


def is_sparse(loss: Any) -> bool:
    """Whether it is a cross-entropy of integer labels."""
    return (
        isinstance(loss, keras.losses.SparseCategoricalCrossentropy)
        or loss is keras.losses.sparse_categorical_crossentropy
    )


def ignored_labels(loss: Any, y: Any) -> Any:
    """Boolean tensor, True where a sparse integer label counts; None where nothing is ignored."""
    if y is None or not is_sparse(loss) or not ops.is_tensor(y):
        return None
    if not keras.backend.is_int_dtype(y.dtype) or "uint" in keras.backend.standardize_dtype(
        y.dtype
    ):
        return None
    return ops.not_equal(y, IGNORE_INDEX)


def keras_loss_pair(loss: Any, y: Any, outputs: Any, sample_weight: Any = None) -> LossPair:
    """One Keras loss (object or function) on one output, unreduced, as a pair.

    Args:
        loss: ``keras.losses.Loss`` or ``f(y_true, y_pred)``.
        y: Labels; integer labels equal to -100 are ignored by the sparse cross-entropies.
        outputs: The model's output, with its Keras mask if it has one.
        sample_weight: See ``weighted_sum``.
    """
    own = not isinstance(loss, keras.losses.Loss)  # a function may take any labels
    for what, tree in (("labels", y), ("model's outputs", outputs)):
        if not ops.is_tensor(tree) and not (own and tree is y):
            raise ConfigurationError(
                f"There is one loss, but the {what} are {_describe(tree)}. Give the loss in the "
                "same form: a dict or a list with one entry for each output."
            )
    keep = ignored_labels(loss, y)
    if keep is not None:
        y = ops.where(keep, y, ops.zeros_like(y))
        if len(y.shape) == len(outputs.shape) and y.shape[-1] == 1:
            keep = ops.squeeze(keep, -1)
    mask = get_keras_mask(outputs)
    losses = _unreduced(loss, y, outputs)
    own_mask = get_keras_mask(losses)
    losses = as_float(losses)
    if not len(losses.shape):
        return as_pair(losses, y.shape[0], sample_weight)
    for more in (own_mask, keep):
        if more is not None:
            more = ops.cast(more, "bool")
            mask = more if mask is None else ops.logical_and(ops.cast(mask, "bool"), more)
    reduction = getattr(loss, "reduction", None)
    count_weights = reduction == "mean_with_sample_weight"
    return LossPair(*weighted_sum(losses, sample_weight, mask, count_weights))


def _unreduced(loss: Any, y: Any, outputs: Any) -> Any:
    """The losses of the elements; a label that does not fit is explained."""
    try:
        if not isinstance(loss, keras.losses.Loss):
            # As Keras' own training does: half precision is for layers, not for sums of squares.
            half = keras.backend.standardize_dtype(outputs.dtype) in ("float16", "bfloat16")
            return loss(y, as_float(outputs) if half else outputs)
        labels = ops.convert_to_tensor(y, dtype=loss.dtype)
        return loss.call(labels, ops.convert_to_tensor(outputs, dtype=loss.dtype))
    except Exception as error:
        own = type(loss).__module__ if isinstance(loss, keras.losses.Loss) else loss.__module__
        if not own.startswith("keras."):
            raise  # a user's own loss: the error is theirs to see as it is
        name = getattr(loss, "name", None) or getattr(loss, "__name__", "loss")
        shapes = [
            f"{keras.backend.standardize_dtype(t.dtype)}{list(t.shape)}" for t in (y, outputs)
        ]
        raise DataError(
            f"The loss {name} does not fit labels {shapes[0]} and model outputs {shapes[1]}. "
            f"Keras says: {first_lines(error)}"
        ) from None


def structured_loss_pair(
    losses: Any, weights: Any, y: Any, outputs: Any, sample_weight: Any, batch_size: int
) -> LossPair:
    """Several outputs, each with its own loss: the weighted sum of their means, per sample.

    One pair can hold only one count, so the means are combined per batch and counted in samples.
    """
    names = list(losses) if isinstance(losses, Mapping) else list(range(len(losses)))

    def pick(tree: Any, name: Any, what: str) -> Any:
        try:
            if ops.is_tensor(tree) and len(names) > 1:
                raise TypeError  # an index would take a sample of it
            return tree if ops.is_tensor(tree) and name == 0 else tree[name]
        except (KeyError, IndexError, TypeError):
            raise ConfigurationError(
                f"The loss for {name!r} has no {what}: the losses are keyed by {names}, "
                f"the {what} is {_describe(tree)}. Use the same keys (or order) for both."
            ) from None

    total, extras = as_float(0.0), {}
    for position, name in enumerate(names):
        if losses[name] is None:
            continue
        each = sample_weight
        if isinstance(sample_weight, Mapping | list | tuple):
            each = pick(sample_weight, name, "sample weight")
        pair = keras_loss_pair(
            losses[name], pick(y, name, "label"), pick(outputs, name, "model output"), each
        )
        value = mean(pair.sum, pair.count)
        extras[f"{name}_loss" if isinstance(name, str) else f"output_{position}_loss"] = value
        factor = 1.0 if weights is None else pick(weights, name, "loss weight")
        total = total + value * factor
    count = as_float(batch_size)
    return LossPair(total * count, count, extras)


def _describe(tree: Any) -> str:
    if isinstance(tree, Mapping):
        return f"a dict with {list(tree)}"
    if isinstance(tree, list | tuple):
        return f"a {type(tree).__name__} of {len(tree)}"
    if ops.is_tensor(tree):
        return f"one array {keras.backend.standardize_dtype(tree.dtype)}{list(tree.shape)}"
    return f"one {type(tree).__name__}"


# --- a user's compute_loss_func -------------------------------------------------------------------


def call_loss_func(
    function: Callable[..., Any],
    outputs: Any,
    y: Any,
    sample_weight: Any,
    num_items: Any,
    batch_size: int,
) -> LossPair:
    """Call ``compute_loss_func(outputs, labels)`` and turn its result into a pair.

    A function with an argument ``num_items_in_batch`` gets the number of labels of the whole
    update (all micro-batches, without -100) and must divide by it itself, as in the reference;
    one with an argument ``sample_weight`` gets the weights and must apply them.
    """
    parameters = inspect.signature(function).parameters
    kwargs: dict[str, Any] = {}
    if "sample_weight" in parameters:
        kwargs["sample_weight"], sample_weight = sample_weight, None
    if "num_items_in_batch" not in parameters:
        return as_pair(function(outputs, y, **kwargs), batch_size, sample_weight)
    items = count_items(y, batch_size)
    if num_items is None:  # an evaluation: each batch is on its own
        num_items = items
    value = function(outputs, y, num_items_in_batch=num_items, **kwargs)
    extras: Mapping[str, Any] = {}
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], Mapping):
        value, extras = value
    value = as_float(value)
    if len(value.shape):
        raise ConfigurationError(
            "A compute_loss_func with the argument num_items_in_batch must return one scalar: the "
            f"sum divided by num_items_in_batch. Received a tensor of shape {tuple(value.shape)}."
        )
    # Already divided by the update's total: undo it, so that the pair adds up like every other.
    return LossPair(value * num_items, items, _extras(extras))


def count_items(y: Any, batch_size: int) -> Any:
    """How many labels count: integer labels other than -100, or samples where there are none."""
    if ops.is_tensor(y) and keras.backend.is_int_dtype(y.dtype):
        return ops.sum(ops.cast(ops.not_equal(y, IGNORE_INDEX), "float32"))
    return as_float(batch_size)
