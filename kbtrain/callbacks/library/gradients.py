"""Gradients of a batch on demand, beside the training: they change nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from kbtrain.data import counting_leaf, map_structure, unpack, with_none, without_none
from kbtrain.errors import ConfigurationError
from kbtrain.model.forward import items_counter
from kbtrain.model.losses.output_losses import counts_of, value_of
from kbtrain.model.losses.pairs import LossPair, divisor
from kbtrain.model.over_shards import OverShards
from kbtrain.model.wrappers import gradient_checkpointing
from kbtrain.utils import rng


class GradientProbe:
    """Computes gradients of the mean loss of a batch for the current weights.

    Dropout and the like draw the numbers of the next update: nothing is assigned, and the random
    state is put back. The function is compiled once for each shape and set of trainable variables;
    the results are read by the host, so it is for one batch in many.

    Args:
        trainer: The Trainer, during ``fit``.

    Raises:
        ConfigurationError: The model has its own ``train_step``, or its weights are divided.
    """

    def __init__(self, trainer: Any, owner: str) -> None:
        self._trainer = trainer
        if trainer.bound.overridden.train_step:
            raise ConfigurationError(
                f"{owner} needs the gradient of the loss, and {type(trainer.model).__name__} has "
                "a train_step of its own: leave the callback out."
            )
        if any(trainer.backend.owned_blocks(v) is not None for v in trainer.model.variables):
            raise ConfigurationError(
                f"{owner} reads whole gradients, and here weights are divided among devices: leave "
                "the callback out, or train without dividing them."
            )
        self._compiled: Callable[[Any], Any] | None = None
        self._for: list[int] = []

    def __call__(self, batch: Any) -> dict[str, np.ndarray]:
        """The gradients by path of the variable.

        Args:
            batch: A micro-batch, NumPy arrays in the structure of the data set.
        """
        backend = self._trainer.backend
        trainable = self._trainer.model.trainable_variables
        if self._compiled is None or self._for != [id(v) for v in trainable]:
            self._for = [id(v) for v in trainable]
            self._compiled = backend.compile_step(
                self._step(trainable), self._trainer.bound.variables()
            )
        rows = map_structure(lambda x: x[None], without_none(batch))
        with gradient_checkpointing.switched_off(), rng.random_state_kept(backend):
            found = backend.to_host(self._compiled(backend.to_device(rows)))
        return {
            v.path: np.asarray(g, np.float64 if g.dtype == np.float64 else np.float32)
            for v, g in zip(trainable, found, strict=True)
        }

    def _step(self, trainable: list[keras.Variable]) -> Callable[[Any], Any]:
        trainer = self._trainer
        backend, bound = trainer.backend, trainer.bound
        count_items = items_counter(trainer.compute_loss_func, bound.label_names)
        shards = OverShards(backend, None, trainable)

        def step(batches: Any) -> Any:
            batch = keras.tree.map_structure(lambda x: x[0], batches)

            def objective(batch: Any) -> tuple[Any, Any]:
                with backend.local_rows(batch) as rows:
                    items = None if count_items is None else count_items(rows.batch, 1)
                    loss, _, _ = bound.forward(rows.batch, items, training=True)
                    loss, _ = shards.forwarded(loss, None, rows)
                if isinstance(loss, LossPair):
                    return loss.sum, loss.count
                return value_of(loss, shards.sum_each(counts_of(loss))), None

            _, count, gradients, _ = backend.value_and_grad(objective, trainable, batch)
            if shards.several:
                gradients = backend.all_sum(gradients)
            if count is None:
                return gradients
            count = divisor(shards.sum(count) if shards.several else count)
            return [g / keras.ops.cast(count, g.dtype) for g in gradients]

        return step


def rows_of(trainer: Any, batch: Any) -> int:
    """The number of samples of a micro-batch."""
    leaf = counting_leaf(*unpack(with_none(batch), trainer.bound.label_names))
    return int(leaf.shape[0])


def newest_batches(trainer: Any) -> list[Any]:
    """The micro-batches of the newest update, NumPy arrays; empty before the first."""
    found = trainer.current_run.newest(None)["batch"]
    return [] if found is None else list(found)
