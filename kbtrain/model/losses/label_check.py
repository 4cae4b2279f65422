"""Detects integer labels outside the model's classes, on the host, before they are trained on.

Without it JAX silently computes wrong numbers, and the others raise an error from inside a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from kbtrain.data import LabelNames, unpack
from kbtrain.errors import DataError
from kbtrain.model.losses.keras_losses import is_sparse, may_be_sparse, resolve_crossentropy
from kbtrain.model.losses.pairing import Outputs
from kbtrain.model.losses.pairs import IGNORE_INDEX

BatchCheck = Callable[[Any, int, Sequence[str], int], None]
"""A check of the data of several batches, called like a ``LabelCheck``."""


class LabelCheck:
    """Checks labels against the number of classes of each output.

    Args:
        loss: A resolved loss, or a dict or list of these. Only sparse cross-entropies are checked.
        labels: The labels of a batch, for their structure.
        outputs: The model's outputs for it; shapes suffice.
        output_names: The names of the outputs, if the model has any.
        label_names: Keys of the labels in a batch that is a dict, if not the usual ones.

    Raises:
        ConfigurationError: Losses, labels and outputs do not match.
    """

    def __init__(
        self,
        loss: Any,
        labels: Any,
        outputs: Any,
        output_names: Sequence[str] | None = None,
        label_names: LabelNames = None,
    ) -> None:
        self._label_names = label_names
        self._known = known = Outputs(outputs, output_names)
        losses = {} if loss is None else known.assign(loss, "loss")
        self._active = [i for i in range(len(self._known.leaves)) if losses.get(i) is not None]
        self._classes: list[tuple[int, int, int | None]] = []
        checked = [i for i in self._active if may_be_sparse(losses[i])]
        found = known.labels(labels, self._active, label_names=label_names) if checked else {}
        for i in checked:
            label, output = found.get(i), self._known.leaves[i]
            if not hasattr(label, "shape") or len(getattr(output, "shape", ())) < 2:
                continue
            each = resolve_crossentropy(losses[i], label, output)
            if is_sparse(each):
                classes = output.shape[getattr(each, "_fn_kwargs", {}).get("axis", -1)]
                if classes is not None:
                    self._classes.append((i, classes, getattr(each, "ignore_class", None)))

    def __call__(self, batches: Any, count: int, axes: Sequence[str], first: int) -> None:
        """Check the labels of several batches.

        Args:
            batches: A NumPy batch with additional leading axes.
            count: Number of valid entries along the first axis.
            axes: Names of the leading axes for the message: ``("update", "micro-batch")``.
            first: Number of the first entry along the first axis, for the message.

        Raises:
            DataError: A label is outside the range of classes.
        """
        if not self._classes:
            return
        _, y, weights = unpack(batches, self._label_names)
        known, names = self._known, self._label_names
        found = known.labels(y, self._active, label_names=names)
        nested = isinstance(weights, Mapping | list | tuple)
        weighed = known.labels(weights, self._active, "sample weight", names) if nested else {}
        for i, classes, ignored in self._classes:
            labels = found.get(i)
            if not isinstance(labels, np.ndarray) or labels.dtype.kind not in "iuf":
                continue
            labels = labels[:count]
            wrong = outside(labels, classes)
            if wrong is None:
                continue
            wrong &= labels != ignored
            if labels.dtype.kind == "i":
                wrong &= labels != IGNORE_INDEX
            wrong &= _weighed(weighed.get(i) if nested else weights, wrong)
            if wrong.any():
                key = known.names[i] if len(known.tensors) > 1 else None
                _complain(labels, wrong, classes, key, axes, first)


def _weighed(weights: Any, like: np.ndarray) -> Any:
    """Mask of nonzero weights: a label with weight 0 may have any value."""
    if not isinstance(weights, np.ndarray) or weights.ndim > like.ndim:
        return True
    weights = weights[: len(like)]
    return (weights != 0).reshape(weights.shape + (1,) * (like.ndim - weights.ndim))


def outside(values: np.ndarray, size: int) -> np.ndarray | None:
    """Mask of the values that are not in ``[0, size)``; None, without making one, if all are."""
    if not values.size or (values.min() >= 0 and values.max() < size):
        return None
    return ~((values >= 0) & (values < size))


def first_place(
    values: np.ndarray, wrong: np.ndarray, axes: Sequence[str], first: int
) -> tuple[Any, str]:
    """The first wrong value, and where it is.

    Args:
        values: The data of several batches.
        wrong: Which of them are wrong.
        axes: Names of the leading axes.
        first: Number of the first entry along the first axis.
    """
    place = [int(i) for i in np.argwhere(wrong)[0]]
    value = values[tuple(place)]
    place[0] += first
    named = [*axes, "row", "position"]
    return value, ", ".join(f"{name} {i}" for name, i in zip(named, place, strict=False))


def _complain(
    labels: np.ndarray, wrong: np.ndarray, classes: int, key: Any, axes: Sequence[str], first: int
) -> None:
    label, where = first_place(labels, wrong, axes, first)
    right = labels[~wrong]
    if label == classes and not (right == 0).any():
        hint = "If the labels begin at 1, subtract 1."
    else:
        hint = "Give the last layer more units, or map the labels to this range first."
    output = "the model's output" if key is None else f"the output {key!r}"
    raise DataError(
        f"A label is outside the model's classes: {output} has {classes}, so labels must be 0 to "
        f"{classes - 1}, or {IGNORE_INDEX} to ignore a position. Received: the label {label} "
        f"({where}). {hint}"
    )
