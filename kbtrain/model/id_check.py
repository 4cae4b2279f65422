"""Detects token ids that an embedding has no row for, on the host, before they are trained on.

Without it JAX computes NaN, and the others raise an error from inside a graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from kbtrain.data import LabelNames, unpack
from kbtrain.errors import DataError
from kbtrain.model.losses.label_check import first_place, outside


class IdCheck:
    """Checks the inputs that a functional or sequential model's Embedding layers read directly.

    Args:
        model: A built model.
        label_names: Keys of the labels in a batch that is a dict, if not the usual ones.
    """

    def __init__(self, model: keras.Model, label_names: LabelNames = None) -> None:
        self._label_names = label_names
        self._inputs = list(getattr(model, "inputs", None) or ())
        self._tables: list[tuple[int, str, int]] = []
        for layer in getattr(model, "layers", ()):
            if isinstance(layer, keras.layers.Embedding) and layer.input_dim is not None:
                read = _input_of(layer)
                for i, tensor in enumerate(self._inputs):
                    if tensor is read:
                        self._tables.append((i, layer.name, int(layer.input_dim)))

    def __call__(self, batches: Any, count: int, axes: Sequence[str], first: int) -> None:
        """Check the ids of several batches.

        Args:
            batches: A NumPy batch with additional leading axes.
            count: Number of valid entries along the first axis.
            axes: Names of the leading axes for the message: ``("update", "micro-batch")``.
            first: Number of the first entry along the first axis, for the message.

        Raises:
            DataError: An id is outside the range of a table.
        """
        if not self._tables:
            return
        x = unpack(batches, self._label_names).x
        for i, layer, rows in self._tables:
            ids = self._array(x, i)
            if ids is None or ids.dtype.kind not in "iuf":
                continue
            ids = ids[:count]
            wrong = outside(ids, rows)
            if wrong is None:
                continue
            value, where = first_place(ids, wrong, axes, first)
            raise DataError(
                f"A token id is outside the table of the layer {layer!r}: its input_dim is {rows}, "
                f"so ids must be 0 to {rows - 1}. Received: the id {value} ({where}). Give the "
                "layer a larger input_dim, or map the ids to this range first."
            )

    def _array(self, x: Any, i: int) -> np.ndarray | None:
        """The data of an input, if the structure of the data says which they are."""
        if isinstance(x, Mapping):
            x = x.get(self._inputs[i].name)
        elif isinstance(x, list | tuple):
            x = x[i] if len(x) == len(self._inputs) else None
        elif len(self._inputs) > 1:
            return None
        return x if isinstance(x, np.ndarray) else None


def _input_of(layer: keras.layers.Layer) -> Any:
    """What a layer was called on; None if it was called several times, or never."""
    try:
        return layer.input
    except (AttributeError, ValueError):
        return None
