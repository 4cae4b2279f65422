"""Integer labels that the model has no class for, found on the host before they are trained on.

A backend on its own says nothing (JAX), or shows where in its graph it happened.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from kbtrain.data import unpack
from kbtrain.errors import DataError
from kbtrain.forward import by_output_name
from kbtrain.loss import IGNORE_INDEX, is_sparse


class LabelCheck:
    """The classes of a model's outputs, and whether labels are among them.

    Args:
        model: Names the outputs.
        loss: A resolved loss, or a dict or list of these. Only sparse cross-entropies are checked.
        labels: The labels of a batch, for their structure.
        outputs: What the model returns for it; shapes are enough.
        label_names: Keys of the labels in a batch that is a dict, if not the usual ones.
    """

    def __init__(
        self,
        model: keras.Model,
        loss: Any,
        labels: Any,
        outputs: Any,
        label_names: Sequence[str] | None = None,
    ) -> None:
        self._label_names = label_names
        self._outputs: list[tuple[Any, int, int | None]] = []
        named = by_output_name(model, labels, outputs)
        if isinstance(loss, Mapping):
            losses = dict(loss)
        else:
            losses = dict(enumerate(loss)) if isinstance(loss, list) else {None: loss}
        for key, each in losses.items():
            output = _pick(named, key)
            if is_sparse(each) and len(getattr(output, "shape", ())) > 1:
                axis = getattr(each, "_fn_kwargs", {}).get("axis", -1)
                classes = output.shape[axis]
                if classes is not None:
                    self._outputs.append((key, classes, getattr(each, "ignore_class", None)))

    def __call__(self, batches: Any, count: int, axes: Sequence[str], first: int) -> None:
        """Look at the labels of several batches.

        Args:
            batches: A batch with more axes in front, NumPy.
            count: Entries of the first axis that mean something.
            axes: What these axes count, for the message: ``("update", "micro-batch")``.
            first: The number of the first entry of the first axis, for the message.

        Raises:
            DataError: A label is outside of the classes.
        """
        _, y, weights = unpack(batches, self._label_names)
        for key, classes, ignored in self._outputs:
            labels = _pick(y, key)
            if not isinstance(labels, np.ndarray) or labels.dtype.kind not in "iuf":
                continue
            labels = labels[:count]
            if labels.min() >= 0 and labels.max() < classes:
                continue
            wrong = ~((labels >= 0) & (labels < classes)) & (labels != ignored)
            if labels.dtype.kind == "i":
                wrong &= labels != IGNORE_INDEX
            wrong &= _weighed(
                _pick(weights, key) if isinstance(weights, Mapping) else weights, wrong
            )
            if wrong.any():
                _complain(labels, wrong, classes, key, axes, first)


def _pick(tree: Any, key: Any) -> Any:
    """One part of labels or outputs; None where they have another structure."""
    if key is None:
        return tree
    if isinstance(tree, Mapping):
        return tree.get(key)
    fits = isinstance(tree, list | tuple) and isinstance(key, int) and key < len(tree)
    return tree[key] if fits else None


def _weighed(weights: Any, like: np.ndarray) -> Any:
    """Where the weight is not 0: a label without one may be anything."""
    if not isinstance(weights, np.ndarray) or weights.ndim > like.ndim:
        return True
    weights = weights[: len(like)]
    return (weights != 0).reshape(weights.shape + (1,) * (like.ndim - weights.ndim))


def _complain(
    labels: np.ndarray, wrong: np.ndarray, classes: int, key: Any, axes: Sequence[str], first: int
) -> None:
    place = [int(i) for i in np.argwhere(wrong)[0]]
    label = labels[tuple(place)]
    place[0] += first
    named = [*axes, "row", "position"]
    where = ", ".join(f"{name} {i}" for name, i in zip(named, place, strict=False))
    right = labels[~wrong]
    if label == classes and not (right == 0).any():
        hint = "If the labels begin at 1, subtract 1."
    else:
        hint = "Give the last layer more units, or map the labels to this range first."
    output = "the model's output" if key is None else f"the output {key!r}"
    raise DataError(
        f"A label is none of the model's classes: {output} has {classes} of them, so labels are 0 "
        f"to {classes - 1}, or {IGNORE_INDEX} for what is to be left out. Received: the label "
        f"{label} ({where}). {hint}"
    )
