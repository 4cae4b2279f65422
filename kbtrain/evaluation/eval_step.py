"""The evaluation step, written once for all backends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras

from kbtrain.backends.protocol import Backend
from kbtrain.backends.scopes import carry_over
from kbtrain.model.forward import Forward
from kbtrain.model.metrics import MetricSet


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

    def eval_step(batch: Any) -> dict[str, Any]:
        with backend.dropping() as scope:
            loss, outputs, metric_inputs = forward(batch, None, training=False)
            kept = None if select_outputs is None else select_outputs(outputs, batch)
        # Includes metrics that a layer updates.
        carry_over(scope, [*advancing, *([] if metrics is None else metrics.variables)])
        if metrics is not None and metric_inputs is not None:
            metrics.update(*metric_inputs)
        result: dict[str, Any] = {}
        if loss is not None:
            result["loss"] = loss
        if kept is not None:
            result["outputs"] = kept
        return result

    return eval_step
