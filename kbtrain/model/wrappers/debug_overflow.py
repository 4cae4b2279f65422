"""``debug="underflow_overflow"``: find the first layer or gradient that is not finite."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from kbtrain.backends.protocol import Backend
from kbtrain.data import map_structure, micro_batches, without_none
from kbtrain.model.forward import ForwardPass
from kbtrain.model.losses.output_losses import counts_of, value_of
from kbtrain.model.losses.pairs import LossPair, as_float
from kbtrain.model.wrappers import gradient_checkpointing
from kbtrain.model.wrappers.layer_calls import Call, replaced_calls
from kbtrain.utils.layers import walk_layers

SHOWN = 5
"""Number of layers shown before the first non-finite one, and of gradients named."""


class Diagnosis:
    """Reruns the batches of a non-finite update and inspects each layer's outputs.

    Args:
        backend: The backend in use.
        model: The model, in its state before the update.
        forward: The forward pass with the loss.
        count_items: See ``kbtrain.model.forward.items_counter``.
        trainable: The variables to compute gradients for.
        variables: All variables that a step reads or assigns.
    """

    def __init__(
        self,
        backend: Backend,
        model: keras.Model,
        forward: ForwardPass,
        count_items: Callable[[Any, int], Any] | None,
        trainable: Sequence[keras.Variable],
        variables: Sequence[keras.Variable],
    ) -> None:
        self._backend, self._model, self._forward = backend, model, forward
        self._count_items, self._trainable = count_items, list(trainable)
        self._variables = list(variables)
        self._seen: list[tuple[str, Any]] = []

    def explain(self, chunks: Sequence[dict[str, Any]], index: int) -> str:
        """Describe the first non-finite value of an update.

        Args:
            chunks: The chunks of a block (NumPy), see ``kbtrain.data.Block``.
            index: Index of the update in the block.
        """
        layers = [layer for layer in walk_layers(self._model) if layer is not self._model]
        for number, batch in enumerate(micro_batches(chunks, index)):
            where = f"In micro-batch {number}: "
            if bad := _bad_inputs(batch):
                return f"{where}the data itself is not finite ({bad})."
            with gradient_checkpointing.switched_off(), replaced_calls(layers, self._watched):
                probe = self._backend.compile_step(self._probe, self._variables)
                rows = map_structure(lambda x: x[None], without_none(batch))
                found = self._backend.to_host(probe(self._backend.to_device(rows)))
            if (text := self._judge(found)) is not None:
                return where + text
        return "On rerunning batch by batch, every layer, the loss and all gradients are finite."

    def _watched(self, layer: keras.layers.Layer, call: Call) -> Call:
        name = f"{layer.path or layer.name} ({type(layer).__name__})"

        def watched(*args: Any, **kwargs: Any) -> Any:
            outputs = call(*args, **kwargs)
            tensors = [x for x in keras.tree.flatten(outputs) if ops.is_tensor(x)]
            floats = [x for x in tensors if "float" in str(x.dtype)]
            if floats:
                self._seen.append((name, _largest(floats)))
            return outputs

        return watched

    def _probe(self, batches: Any) -> dict[str, Any]:
        """The largest magnitudes of each layer's outputs, of the loss and of the gradients.

        Args:
            batches: One batch along a leading axis. With several processes these are its rows.
        """
        batch = keras.tree.map_structure(lambda x: x[0], batches)

        def objective(batch: Any) -> tuple[Any, Any]:
            self._seen.clear()
            with self._backend.local_rows(batch) as rows:
                count = self._count_items
                items = None if count is None else count(rows.batch, 1)
                loss, _, _ = self._forward(rows.batch, items, training=True)
            total = loss.sum if isinstance(loss, LossPair) else value_of(loss, counts_of(loss))
            return total, [value for _, value in self._seen]

        loss, layers, gradients, _ = self._backend.value_and_grad(objective, self._trainable, batch)
        return {
            "layers": layers,
            "loss": as_float(loss),
            "gradients": [_largest([g]) for g in gradients],
        }

    def _judge(self, found: dict[str, Any]) -> str | None:
        named = [(name, float(x)) for (name, _), x in zip(self._seen, found["layers"], strict=True)]
        for i, (name, value) in enumerate(named):
            if not np.isfinite(value):
                before = ", ".join(f"{n} {x:.3g}" for n, x in named[max(0, i - SHOWN) : i])
                return (
                    f"the first output that is not finite is that of {name}. Largest outputs "
                    f"of the layers before it: {before or 'none, it is the first layer'}."
                )
        if not np.isfinite(float(found["loss"])):
            return "all layers' outputs are finite but the loss is not: check it and the labels."
        pairs = zip(self._trainable, found["gradients"], strict=True)
        if bad := [v.path for v, x in pairs if not np.isfinite(float(x))]:
            rest = "" if len(bad) <= SHOWN else f" and of {len(bad) - SHOWN} more"
            return (
                "outputs and loss are finite, but not the gradients of "
                f"{', '.join(bad[::-1][:SHOWN])}{rest} (the last layers first)."
            )
        return None


def _largest(tensors: Sequence[Any]) -> Any:
    """The largest magnitude in float32; not finite if any element is not."""
    values = [ops.max(ops.abs(as_float(x))) if 0 not in x.shape else as_float(0.0) for x in tensors]
    total = values[0]
    for value in values[1:]:  # ops.maximum drops NaN on some backends
        total = ops.where(ops.isfinite(total), ops.where(value > total, value, total), total)
        total = ops.where(ops.isfinite(value), total, value)
    finite = ops.all(ops.stack([ops.all(ops.isfinite(as_float(x))) for x in tensors]))
    return ops.where(finite, total, as_float(float("inf")))


def _bad_inputs(batch: Any) -> str:
    """Describe the first array of a batch that is not finite; empty if all are."""
    for path, array in keras.tree.flatten_with_path(batch):
        if array.dtype.kind == "f" and not np.all(np.isfinite(array)):
            row = np.argwhere(~np.isfinite(array))[0]
            name = "/".join(map(str, path)) or "input"
            return f"array {name}, first at position {tuple(int(i) for i in row)}"
    return ""
