"""The evaluation step, written once for all backends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras

from kbtrain.backends.protocol import Backend
from kbtrain.backends.scopes import carry_over
from kbtrain.model.forward import Forward
from kbtrain.model.metrics import MetricSet
from kbtrain.model.over_shards import OverShards


def make_eval_step(
    backend: Backend,
    forward: Forward,
    advancing: Sequence[keras.Variable],
    metrics: MetricSet | None,
    select_outputs: Callable[[Any, Any], Any] | None,
) -> Callable[[Any], dict[str, Any]]:
    """Build the step of one evaluation batch.

    It changes only the metrics and the variables that advance from batch to batch. Other
    assignments of layers are discarded.

    Args:
        backend: The backend in use.
        forward: See ``Forward``.
        advancing: Seeds and states that carry over to the next batch.
        metrics: Metrics to update, if any.
        select_outputs: ``(outputs, batch) -> outputs for the host``; None returns no outputs.

    Returns:
        ``step(batch) -> {"loss", "outputs"}``, tensors on the device; the loss is a ``LossPair``
        or ``LossTerms``. Without labels there are only the outputs.
    """
    shards = OverShards(backend, metrics, ())

    def eval_step(batch: Any) -> dict[str, Any]:
        metrics_before = shards.begin_metrics()
        with backend.dropping() as scope, backend.local_rows(batch) as rows:
            loss, outputs, metric_inputs = forward(rows.batch, None, training=False)
            kept = None if select_outputs is None else select_outputs(outputs, rows.batch)
            kept = shards.gathered(kept, rows)
            if loss is not None:
                loss, metric_inputs = shards.forwarded(loss, metric_inputs, rows)
        # Includes metrics that a layer updates.
        carry_over(scope, [*advancing, *([] if metrics is None else metrics.variables)])
        if metrics is not None and metric_inputs is not None:
            metrics.update(*metric_inputs)
        if loss is not None:
            loss, _, states = shards.sum_all(loss, [], metrics_before)
            for variable, value in states:
                variable.assign(value)
        result: dict[str, Any] = {}
        if loss is not None:
            result["loss"] = loss
        if kept is not None:
            result["outputs"] = kept
        return result

    return eval_step
