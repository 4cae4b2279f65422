"""What a train step adds up over the processes that share its batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import keras
from keras import ops

from kbtrain.backends.protocol import Backend, Updates
from kbtrain.backends.rows import LocalRows, gather_rows, has_rows
from kbtrain.backends.scopes import is_overwritten
from kbtrain.errors import ConfigurationError
from kbtrain.model.losses.output_losses import LossTerms
from kbtrain.model.losses.over_shards import from_sums, of_nothing, summands
from kbtrain.model.losses.pairs import LossPair
from kbtrain.model.metrics import MetricSet


class Owners(Protocol):
    """Which process updates which variable (see ``kbtrain.optimization.division``)."""

    @property
    def rank(self) -> int:
        """Index of this process."""

    def owners(self, variables: Sequence[keras.Variable]) -> list[int]:
        """The rank of the owner of each variable."""

    def distribute(self, variables: Sequence[keras.Variable]) -> None:
        """Give each variable the value that its owner has."""


class OverShards:
    """Adds up results, gradients and states over processes. With one it changes nothing.

    Args:
        backend: The backend in use.
        metrics: The metrics that the step updates, if any.
        trainable: The variables that it differentiates.
        division: Which process needs the gradient of which variable; None if each needs all.
    """

    def __init__(
        self,
        backend: Backend,
        metrics: MetricSet | None,
        trainable: Sequence[keras.Variable],
        division: Owners | None = None,
    ) -> None:
        self._backend, self._metrics = backend, metrics
        self._replaced = [is_overwritten(v) for v in trainable]
        own = [] if metrics is None or not metrics.adds_up else metrics.variables
        self._added_up = {id(v) for v in own}
        self.several = backend.shards() > 1
        self._trainable = list(trainable)
        self._division = division
        self._owners = None if division is None else division.owners(trainable)
        self._rank = 0 if division is None else division.rank

    def counted(self, count: Callable[[Any, int], Any], chunk: Mapping[str, Any]) -> Any:
        """The number of labels in this process's rows of a chunk."""
        ((kind, batch),) = chunk.items()
        with self._backend.local_rows(batch) as rows:
            found = count(rows.batch, 1 if kind == "single" else 2)
            return found if rows.size else ops.zeros_like(found)

    def sum(self, value: Any) -> Any:
        """The sum of one tensor."""
        return self._backend.all_sum([value])[0]

    def sum_each(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The sum of each of several tensors."""
        return dict(zip(values, self._backend.all_sum(list(values.values())), strict=True))

    def forwarded(
        self, loss: LossPair | LossTerms, metric_inputs: Any, rows: LocalRows
    ) -> tuple[LossPair | LossTerms, Any]:
        """The results of a forward pass, without those of rows that do not count.

        Metrics that are not sums over samples get the rows of all processes.
        """
        if not self.several:
            return loss, metric_inputs
        gathers = self._metrics is not None and not self._metrics.adds_up
        if gathers and metric_inputs is not None:
            metric_inputs = gather_rows(
                self._backend.shards(), self._backend.all_gather, metric_inputs, rows
            )
        elif not rows.size:
            metric_inputs = None
        return (loss if rows.size else of_nothing(loss)), metric_inputs

    def averaged(self, updates: Updates, counts: bool) -> list[tuple[keras.Variable, Any]]:
        """What layers assign, averaged over the processes whose rows count.

        Statistics of a batch that a layer computes from its rows differ. Integers (the states of
        seeds) are the same on all.
        """
        if not self.several:
            return list(updates)
        own = [
            (v, x)
            for v, x in updates
            if keras.backend.is_float_dtype(v.dtype) and id(v) not in self._added_up
        ]
        if not own:
            return list(updates)
        factor = 1.0 if counts else 0.0
        weight = ops.convert_to_tensor(factor, "float32")
        *sums, total = self._backend.all_sum(
            [*(ops.cast(x, v.dtype) * ops.cast(factor, v.dtype) for v, x in own), weight]
        )
        means = {
            id(v): value / ops.cast(total, value.dtype)
            for (v, _), value in zip(own, sums, strict=True)
        }
        return [(v, means.get(id(v), x)) for v, x in updates]

    def gathered(self, outputs: Any, rows: LocalRows) -> Any:
        """The outputs of all rows of the batch.

        Raises:
            ConfigurationError: An output has no row for each sample.
        """
        if not self.several or outputs is None:
            return outputs
        for leaf in keras.tree.flatten(outputs):
            if ops.is_tensor(leaf) and not has_rows(leaf, rows):
                raise ConfigurationError(
                    "With several processes, what an evaluation returns must have one row for each "
                    "sample, along its first axis. Received from the model, or from "
                    f"preprocess_logits_for_metrics: shape {tuple(leaf.shape)} for a batch of "
                    f"{rows.rows} samples. Leave it out (ignore_keys), or compute it in "
                    "compute_metrics."
                )
        return gather_rows(self._backend.shards(), self._backend.all_gather, outputs, rows)

    def assign_metrics(self, updates: Updates) -> list[tuple[keras.Variable, Any]]:
        """Assign what layers gave their metrics; return the other updates."""
        for variable, value in updates:
            if id(variable) in self._added_up:
                variable.assign(value)
        return [(v, x) for v, x in updates if id(v) not in self._added_up]

    def begin_metrics(self) -> list[Any] | None:
        """Set the metrics to zero, so that they hold what this update adds; return their states.

        None if they need not be added up.
        """
        if not self.several or self._metrics is None or not self._metrics.adds_up:
            return None
        before = [ops.copy(v.value) for v in self._metrics.variables]
        for variable, value in zip(self._metrics.variables, before, strict=True):
            variable.assign(ops.zeros_like(value))
        return before

    def sum_all(
        self,
        result: LossPair | LossTerms,
        gradients: Sequence[Any],
        metrics_before: list[Any] | None,
    ) -> tuple[LossPair | LossTerms, list[Any], list[tuple[keras.Variable, Any]]]:
        """Add up the loss, the gradients and what the metrics gained, in one reduction.

        Args:
            result: The loss of this process's rows.
            gradients: The gradients of it.
            metrics_before: The result of ``begin_metrics``.

        Returns:
            The loss, the gradients (of the variables that this process updates), and the new
            states of the metrics, which are not assigned yet.
        """
        if not self.several:
            return result, list(gradients), []
        variables: Sequence[keras.Variable] = []
        if metrics_before is not None and self._metrics is not None:
            variables = self._metrics.variables
        gained = [ops.copy(v.value) for v in variables]
        for variable, value in zip(variables, metrics_before or [], strict=True):
            variable.assign(value)
        own = summands(result)
        proper = [g for g, whole in zip(gradients, self._replaced, strict=True) if not whole]
        if self._owners is None:
            sums = iter(self._backend.all_sum([*own, *gained, *proper]))
        else:
            owners = [o for o, whole in zip(self._owners, self._replaced, strict=True) if not whole]
            mine = self._backend.sum_to_owners(proper, owners)
            sums = iter([*self._backend.all_sum([*own, *gained]), *mine])
        result = from_sums(result, sums)
        states = [
            (v, value + next(sums))
            for v, value in zip(variables, metrics_before or [], strict=True)
        ]
        new = [
            self._largest(g) if whole else next(sums)
            for g, whole in zip(gradients, self._replaced, strict=True)
        ]
        return result, self.owned(new), states

    def owned(self, values: Sequence[Any]) -> list[Any]:
        """Of values for all trained variables, those of the variables that this process updates."""
        if self._owners is None:
            return list(values)
        return [x for x, owner in zip(values, self._owners, strict=True) if owner == self._rank]

    def global_norm(self, gradients: Sequence[Any]) -> Any:
        """The norm of all gradients, from those of this process."""
        if self._owners is None:
            return self._backend.global_norm(gradients)
        wide = any(keras.backend.standardize_dtype(v.dtype) == "float64" for v in self._trainable)
        dtype = "float64" if wide else "float32"
        norm = self._backend.global_norm(gradients) if gradients else ops.zeros((), dtype)
        return ops.sqrt(self.sum(ops.square(ops.cast(norm, dtype))))

    def agreed(self, condition: Any) -> Any:
        """Whether a condition holds on all processes that update different variables."""
        if self._owners is None:
            return condition
        return ops.equal(self.sum(ops.cast(ops.logical_not(condition), "int32")), 0)

    def distribute(self) -> None:
        """Give each variable the value that its owner has computed."""
        if self._division is not None:
            self._division.distribute(self._trainable)

    def _largest(self, value: Any) -> Any:
        return ops.max(self._backend.all_gather([value])[0], axis=0)
