"""The evaluation step, and its compiled versions."""

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

    It changes the metrics, and what advances from batch to batch. All else that layers assign is
    forgotten.

    Args:
        backend: The backend in use.
        forward: See ``Forward``.
        advancing: Seeds and states that the next batch goes on with.
        metrics: Metrics to update, if any.
        select_outputs: ``(outputs, batch) -> what goes to the host``; None sends nothing.

    Returns:
        ``step(batch) -> {"loss", "outputs"}``, tensors on the device: a ``LossPair`` or
        ``LossTerms``. A batch without labels has only the outputs.
    """

    def eval_step(batch: Any) -> dict[str, Any]:
        with backend.dropping() as scope:
            loss, outputs, metric_inputs = forward(batch, None, training=False)
            kept = None if select_outputs is None else select_outputs(outputs, batch)
        # A metric that a layer updates is one of these.
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
