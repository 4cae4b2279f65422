"""Losses as ``(sum, count)`` pairs, so that the trainer controls the reduction.

Over micro-batches, devices and an evaluation set alike, ``loss = sum of sums / sum of counts``.
Accumulating 4 x 2 samples equals one batch of 8 up to rounding, padded positions never count, and
the evaluation loss does not depend on the evaluation batch size.

The count is that of Keras' ``reduction="sum_over_batch_size"``: every element of the unreduced loss
that is not masked. Sample weights scale the numerator only (with
``reduction="mean_with_sample_weight"`` the denominator is the sum of the weights).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import keras
from keras import ops

from kbtrain.errors import ConfigurationError
from kbtrain.utils.float64 import float_dtype

IGNORE_INDEX = -100
"""Integer labels with this value are left out of the loss and of the metrics."""


class LossPair(NamedTuple):
    """A loss before its reduction.

    Attributes:
        sum: Scalar tensor, the sum of the weighted losses: float32, or float64 if the losses are.
        count: Scalar tensor of the same dtype, the divisor; 0 if no element counts.
        extras: Additional named scalar tensors to average and log.
    """

    sum: Any
    count: Any
    extras: Mapping[str, Any] = {}


def as_float(value: Any) -> Any:
    """``value`` as a float32 tensor; float64 is kept."""
    tensor = ops.convert_to_tensor(value)
    return ops.cast(tensor, float_dtype(tensor))


def as_dtype_of(value: Any, reference: Any) -> Any:
    """Cast a number or tensor to the dtype of ``reference``; TensorFlow needs equal dtypes."""
    if getattr(value, "dtype", None) == reference.dtype:
        return value
    return ops.convert_to_tensor(value, dtype=reference.dtype)


def mean(total: Any, count: Any) -> Any:
    """``total / count``, or ``total`` itself (0, or NaN) where the count is 0."""
    count = divisor(count)
    return total / (as_dtype_of(count, total) if ops.is_tensor(total) else count)


def divisor(count: Any) -> Any:
    """The divisor of a mean: ``count``, or 1 where it is 0."""
    return ops.where(count == 0, ops.ones_like(count), count)


RESERVED_NAMES = ("loss", "grad_norm", "learning_rate", "epoch", "step")
"""Names in a log entry that a user's value or metric must not overwrite."""


def as_extra(name: Any, value: Any, source: str) -> Any:
    """A value to log as a scalar tensor: the mean of its elements.

    Args:
        name: Its name in the logs.
        value: A number or a tensor.
        source: The beginning of error messages, such as "track() got".

    Raises:
        ConfigurationError: The name is not a string or is reserved, or the value is not numeric.
    """
    check_name(name, source)
    try:
        if isinstance(value, str | bytes):
            raise TypeError  # each backend would raise a different error
        return ops.mean(as_float(value))
    except (TypeError, ValueError):
        raise ConfigurationError(
            f"{source} a value that is not a number or tensor under the name {name!r}. "
            f"Received: {type(value).__name__}."
        ) from None


def check_name(name: Any, source: str) -> None:
    """Check that values can be logged under a name.

    Raises:
        ConfigurationError: It is not a string, or it is reserved.
    """
    if not isinstance(name, str) or not name:
        raise ConfigurationError(f"{source} a name that is not a string. Received: {name!r}.")
    if name in RESERVED_NAMES:
        raise ConfigurationError(
            f"{source} the name {name!r}, which is reserved for a value that the Trainer logs. "
            f"Choose a name other than {', '.join(RESERVED_NAMES)}."
        )


# --- results of loss functions --------------------------------------------------------------------


def _extras(values: Mapping[Any, Any]) -> dict[str, Any]:
    return {n: as_extra(n, v, "The loss came with values to log, with") for n, v in values.items()}


def as_pair(value: Any, batch_size: int, sample_weight: Any = None) -> LossPair:
    """Convert the result of a loss function to a pair.

    Args:
        value: A scalar (the mean over the batch), a tensor whose first axis is the batch
            (per-element losses), ``(sum, count)``, or ``(any of these, dict of extras)``.
        batch_size: Number of samples in the batch.
        sample_weight: Optional tensor ``[batch]`` or broadcastable to per-element losses.

    Raises:
        ConfigurationError: The value has none of these forms, or sample weights cannot be applied.
    """
    extras: Mapping[str, Any] = {}
    if isinstance(value, LossPair):
        value, extras = (value.sum, value.count), value.extras
    elif isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], Mapping):
        value, extras = value
    extras = _extras(extras)
    if isinstance(value, tuple) and len(value) == 2:
        total = as_float(value[0])
        count = as_dtype_of(value[1], total)
        if len(total.shape) or len(count.shape):
            raise ConfigurationError(
                "A loss given as (sum, count) must be two scalars. "
                f"Received shapes {tuple(total.shape)} and {tuple(count.shape)}."
            )
        return LossPair(total, count, extras)
    if not ops.is_tensor(value) and not isinstance(value, int | float):
        raise ConfigurationError(
            "A loss must be a scalar, a tensor of per-element losses, (sum, count), or a tuple of "
            f"one of these and a dict of values to log. Received: {type(value).__name__}."
        )
    losses = as_float(value)
    if len(losses.shape):
        return LossPair(*weighted_sum(losses, sample_weight), extras)
    if sample_weight is not None:
        raise ConfigurationError(
            "The data has sample weights, which cannot be applied to the scalar that the loss "
            "function returned. Return per-element losses, or (sum, count) with the weights "
            "applied (a function with an argument sample_weight receives them). The third element "
            "of a batch is its sample weights; nest several inputs as ((x1, x2), y)."
        )
    count = as_dtype_of(batch_size, losses)
    return LossPair(losses * count, count, extras)


def weighted_sum(
    losses: Any, sample_weight: Any = None, mask: Any = None, count_weights: bool = False
) -> tuple[Any, Any]:
    """Sum and count of per-element losses.

    Args:
        losses: Tensor ``[batch, ...]``.
        sample_weight: Tensor ``[batch]``, ``[batch, 1]`` or of the shape of ``losses``.
        mask: Boolean tensor of the shape of ``losses`` (or with fewer trailing axes); elements
            with False are left out.
        count_weights: Count the sum of the weights instead of the number of elements.

    Returns:
        ``(sum, count)``, scalars of the dtype of ``losses``.
    """
    ones = ops.ones_like(losses)
    weight, valid = ones, ones
    if mask is not None:
        valid = ones * _expand_like(ops.cast(mask, losses.dtype), losses)
        # A masked element may be NaN: select, do not multiply.
        losses = ops.where(valid > 0, losses, ops.zeros_like(losses))
        weight = valid
    if sample_weight is not None:
        weight = weight * _expand_like(as_dtype_of(sample_weight, losses), losses)
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
            f"{tuple(reference.shape)}. Pass one value per sample or one per loss element. The "
            "third element of a batch is its sample weights; nest several inputs as ((x1, x2), y)."
        )
    return x


# --- a user's compute_loss_func -------------------------------------------------------------------


def call_loss_func(
    function: Callable[..., Any],
    outputs: Any,
    y: Any,
    sample_weight: Any,
    num_items: Any,
    batch_size: int,
) -> LossPair:
    """Call ``compute_loss_func(outputs, labels)`` and convert its result to a pair.

    A function with an argument ``num_items_in_batch`` receives the number of labels in the whole
    update (all micro-batches, without -100) and must divide by it, as in Transformers. One with an
    argument ``sample_weight`` receives the weights and must apply them.
    """
    parameters = inspect.signature(function).parameters
    kwargs: dict[str, Any] = {}
    if "sample_weight" in parameters:
        kwargs["sample_weight"], sample_weight = sample_weight, None
    if "num_items_in_batch" not in parameters:
        return as_pair(function(outputs, y, **kwargs), batch_size, sample_weight)
    items = count_items(y, batch_size)
    if num_items is None:  # in an evaluation each batch stands alone
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
    # Undo the division by the update's total, so that the pairs of micro-batches add up.
    total = value * as_dtype_of(num_items, value)
    return LossPair(total, as_dtype_of(items, value), _extras(extras))


def count_items(y: Any, batch_size: int) -> Any:
    """The number of integer labels other than -100; the batch size for other labels."""
    if ops.is_tensor(y) and keras.backend.is_int_dtype(y.dtype):
        return ops.sum(ops.cast(ops.not_equal(y, IGNORE_INDEX), "float32"))
    return as_float(batch_size)
