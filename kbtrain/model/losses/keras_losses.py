"""Keras losses, and custom functions and objects with their signature, as ``(sum, count)`` pairs.

The semantics are those of ``Model.compile``: for a function the labels are cast and brought to the
rank of the outputs, a ``keras.losses.Loss`` is evaluated without its reduction, and one that
overrides ``__call__`` is called unchanged.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import keras
from keras import ops

from kbtrain.errors import ConfigurationError, DataError, KbtrainError, first_lines
from kbtrain.model.losses.pairs import (
    IGNORE_INDEX,
    LossPair,
    as_dtype_of,
    as_float,
    as_pair,
    weighted_sum,
)
from kbtrain.utils.packages.keras_private import get_keras_mask


def resolve_loss(loss: Any) -> Any:
    """Replace names by Keras losses, in dicts and lists as well; keep functions and objects.

    Raises:
        ConfigurationError: A name is unknown, or a loss is not callable.
    """
    if loss is None:
        return None
    if isinstance(loss, Mapping):
        return {name: resolve_loss(item) for name, item in loss.items()}
    if isinstance(loss, list | tuple):
        return [resolve_loss(item) for item in loss]
    if isinstance(loss, str):
        loss = _loss_by_name(loss)
    if isinstance(loss, type) or not callable(loss):
        raise ConfigurationError(
            "loss must be the name of a Keras loss, a keras.losses.Loss, a function "
            f"(y_true, y_pred) -> losses, or a dict or list of these. Received: loss={loss!r}"
            + (f". Instantiate it: {loss.__name__}()." if isinstance(loss, type) else "")
        )
    return loss


def _loss_by_name(name: str) -> Any:
    if name.lower() in ("crossentropy", "ce"):
        return NamedLoss(crossentropy, name)
    try:
        loss = keras.losses.get(name)
    except ValueError:
        known = sorted({n for n in dir(keras.losses) if n[0].islower()} - {"get", "serialize"})
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ConfigurationError(
            f"loss={name!r} is not a loss of Keras.{hint} Known functions: {', '.join(known)}."
        ) from None
    return loss if isinstance(loss, keras.losses.Loss) else NamedLoss(loss, name)


class NamedLoss(keras.losses.Loss):  # type: ignore[misc]
    """A loss function of Keras under the name that the user gave.

    Args:
        fn: ``(y_true, y_pred) -> losses``.
        name: Its name in logs.
    """

    def __init__(self, fn: Callable[..., Any], name: str) -> None:
        super().__init__(name=name)
        self.fn = fn

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """Per-element losses."""
        return self.fn(*same_rank(y_true, y_pred))


def crossentropy(y_true: Any, y_pred: Any) -> Any:
    """The loss named "crossentropy": binary, sparse or categorical, depending on the shapes."""
    return resolve_crossentropy(crossentropy, y_true, y_pred)(y_true, y_pred)


def resolve_crossentropy(loss: Any, y: Any, outputs: Any) -> Any:
    """The loss; "crossentropy" is resolved as ``Model.compile`` does for these shapes."""
    if getattr(loss, "fn", loss) is not crossentropy:
        return loss
    labels, classes = tuple(y.shape), outputs.shape[-1]
    if classes == 1:
        return keras.losses.binary_crossentropy
    if len(labels) < len(outputs.shape) or labels[-1] == 1:
        return keras.losses.sparse_categorical_crossentropy
    return keras.losses.categorical_crossentropy


def is_sparse(loss: Any) -> bool:
    """Whether ``loss`` is a cross-entropy of integer labels."""
    return (
        isinstance(loss, keras.losses.SparseCategoricalCrossentropy)
        or getattr(loss, "fn", loss) is keras.losses.sparse_categorical_crossentropy
    )


def may_be_sparse(loss: Any) -> bool:
    """Whether ``loss`` is sparse, or ``resolve_crossentropy`` may make it so."""
    return is_sparse(loss) or getattr(loss, "fn", loss) is crossentropy


def takes_any_labels(loss: Any) -> bool:
    """Whether ``loss`` is a custom function, which may take labels in any structure."""
    return not isinstance(loss, keras.losses.Loss) and not _module(loss).startswith("keras.")


def is_summed(loss: Any) -> bool:
    """Whether Keras sums the losses of a batch without dividing."""
    return getattr(loss, "reduction", None) == "sum" and not _reduces_itself(loss)


def _reduces_itself(loss: Any) -> bool:
    own = type(loss).__call__
    return isinstance(loss, keras.losses.Loss) and own is not keras.losses.Loss.__call__


def ignored_labels(loss: Any, y: Any) -> Any:
    """Boolean tensor, True where a sparse integer label counts; None if none can be ignored."""
    if y is None or not is_sparse(loss) or not ops.is_tensor(y):
        return None
    if not keras.backend.is_int_dtype(y.dtype) or "uint" in keras.backend.standardize_dtype(
        y.dtype
    ):
        return None
    return ops.not_equal(y, IGNORE_INDEX)


def without_ignored(loss: Any, y: Any, outputs: Any) -> tuple[Any, Any]:
    """Labels with the ignored ones replaced by a valid class, and a mask (None: all count)."""
    keep = ignored_labels(loss, y)
    if keep is None:
        return y, None
    y = ops.where(keep, y, ops.zeros_like(y))
    if len(keep.shape) == len(outputs.shape) and keep.shape[-1] == 1:
        keep = ops.squeeze(keep, -1)
    return y, keep


def combine_masks(mask: Any, keep: Any) -> Any:
    """Logical and of two masks, where None stands for all True."""
    if mask is None or keep is None:
        return keep if mask is None else mask
    return ops.logical_and(ops.cast(mask, "bool"), ops.cast(keep, "bool"))


def keras_loss_pair(loss: Any, y: Any, outputs: Any, sample_weight: Any = None) -> LossPair:
    """Evaluate one Keras loss (object or function) on one output, as a pair.

    Args:
        loss: ``keras.losses.Loss`` or ``f(y_true, y_pred)``.
        y: Labels; integer labels equal to -100 are ignored by the sparse cross-entropies.
        outputs: The model's output, with its Keras mask if it has one.
        sample_weight: See ``weighted_sum``.

    Raises:
        ConfigurationError: There are several labels or outputs, or the weights do not fit.
        DataError: The Keras loss does not accept these labels and outputs.
    """
    own = takes_any_labels(loss)
    for what, tree in (("labels", y), ("model's outputs", outputs)):
        if not ops.is_tensor(tree) and not (own and tree is y):
            raise ConfigurationError(
                f"There is one loss, but the {what} are {describe(tree)}. Pass the loss in the "
                "same structure: a dict or a list with one entry per output."
            )
    loss = resolve_crossentropy(loss, y, outputs)
    size = keras.tree.flatten(y)[0].shape[0]
    if _reduces_itself(loss):
        return _of_own_call(loss, y, outputs, sample_weight, size)
    y, keep = without_ignored(loss, y, outputs)
    mask = get_keras_mask(outputs)
    losses = _unreduced(loss, y, outputs)
    own_mask = get_keras_mask(losses)
    losses = as_float(_checked(losses, loss))
    if not len(losses.shape):
        if sample_weight is None:
            return as_pair(losses, size)
        losses = losses * ops.ones_like(as_dtype_of(sample_weight, losses))  # as in Keras
        return LossPair(*weighted_sum(losses, sample_weight))
    for more in (own_mask, keep):
        mask = combine_masks(mask, more)
    reduction = getattr(loss, "reduction", None)
    count_weights = reduction == "mean_with_sample_weight"
    return LossPair(*weighted_sum(losses, sample_weight, mask, count_weights))


def _of_own_call(loss: Any, y: Any, outputs: Any, sample_weight: Any, size: int) -> LossPair:
    """Evaluate a ``Loss`` that overrides ``__call__``; a scalar is the mean over the batch."""
    try:
        inspect.signature(loss).bind(y, outputs, sample_weight)
        takes_weight = True
    except (TypeError, ValueError):
        takes_weight = False
    if takes_weight:
        return as_pair(loss(y, outputs, sample_weight), size)
    if sample_weight is not None:
        raise ConfigurationError(
            f"The data has sample weights, but {type(loss).__name__}.__call__ takes none. Define "
            "it as __call__(self, y_true, y_pred, sample_weight=None), or leave the weights out."
        )
    return as_pair(loss(y, outputs), size)


def _unreduced(loss: Any, y: Any, outputs: Any) -> Any:
    """Per-element losses; raises an explanation if the labels do not fit."""
    is_object = isinstance(loss, keras.losses.Loss)
    dtype = loss.dtype if is_object else keras.config.floatx()
    try:
        labels = keras.tree.map_structure(lambda t: ops.convert_to_tensor(t, dtype=dtype), y)
        values = ops.convert_to_tensor(outputs, dtype=dtype)
        if is_object:
            return loss.call(labels, values)
        if ops.is_tensor(labels):
            labels, values = same_rank(labels, values)
        return loss(labels, values)
    except Exception as error:
        origin = getattr(loss, "fn", type(loss)) if is_object else loss
        if not _module(origin).startswith("keras."):
            if not isinstance(error, KbtrainError):
                error.add_note(
                    f"Raised by the loss {name_of(loss)} for labels {_shape(y)} and model outputs "
                    f"{_shape(outputs)}. It is called as loss(y_true, y_pred)."
                )
            raise  # a custom loss: the user should see the original error
        raise DataError(
            f"The loss {name_of(loss)} does not fit labels {_shape(y)} and model outputs "
            f"{_shape(outputs)}. Keras says: {first_lines(error)}"
        ) from None


def _shape(tree: Any) -> str:
    """The dtype and shape of a tensor, or the kind of another structure."""
    if not ops.is_tensor(tree):
        return describe(tree)
    return f"{keras.backend.standardize_dtype(tree.dtype)}{list(tree.shape)}"


def _checked(losses: Any, loss: Any) -> Any:
    """What a loss has returned, if it is a tensor; 0 is accepted as a term that trains nothing."""
    constant = isinstance(losses, int | float) and losses == 0
    if ops.is_tensor(losses) or constant:
        return losses
    raise ConfigurationError(
        f"The loss {name_of(loss)} must return a tensor: a loss for each element, or their mean, "
        "computed from y_pred with keras.ops. Values of Python and NumPy do not depend on the "
        f"weights, so nothing would be trained. Received: {losses!r:.80}."
    )


def same_rank(labels: Any, outputs: Any) -> tuple[Any, Any]:
    """Bring labels and outputs to one rank if they differ by a last axis of length 1.

    Keras does the same around a loss function: ``(N,)`` and ``(N, 1)`` become ``(N, 1)``,
    ``(N, 5)`` and ``(N, 5, 1)`` become ``(N, 5)``. Other shapes are unchanged.
    """
    short, long = labels, outputs
    if len(labels.shape) > len(outputs.shape):
        short, long = outputs, labels
    if len(long.shape) != len(short.shape) + 1 or long.shape[-1] != 1:
        return labels, outputs
    if len(short.shape) == 1:
        short = ops.expand_dims(short, -1)
    else:
        long = ops.squeeze(long, -1)
    return (short, long) if len(labels.shape) < len(outputs.shape) else (long, short)


def _module(function: Callable[..., Any]) -> str:
    return getattr(function, "__module__", None) or ""


def name_of(loss: Any) -> str:
    """The name of a loss."""
    return getattr(loss, "name", None) or getattr(loss, "__name__", None) or type(loss).__name__


def describe(tree: Any) -> str:
    """A short description of labels or outputs, for error messages."""
    if isinstance(tree, Mapping):
        return f"a dict with {list(tree)}"
    if isinstance(tree, list | tuple):
        return f"a {type(tree).__name__} of {len(tree)}"
    if ops.is_tensor(tree):
        return f"one array {keras.backend.standardize_dtype(tree.dtype)}{list(tree.shape)}"
    return f"one {type(tree).__name__}"
