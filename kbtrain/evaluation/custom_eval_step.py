"""The evaluation step of a model with a custom ``test_step`` or ``predict_step``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import keras

from kbtrain.backends.protocol import Backend
from kbtrain.backends.scopes import carry_over
from kbtrain.model.forward import Forward, restore_structure
from kbtrain.model.method_overrides import MethodOverrides
from kbtrain.model.metrics import MetricSet

if TYPE_CHECKING:
    pass
from kbtrain.model.custom_steps import ModelMetrics, logged


def make_custom_eval_step(
    backend: Backend,
    model: keras.Model,
    own: MethodOverrides,
    forward: Forward | None,
    predict: Forward,
    advancing: Sequence[keras.Variable],
    metrics: MetricSet | None,
    select_outputs: Callable[[Any, Any], Any] | None,
) -> Callable[[Any], dict[str, Any]]:
    """Build the step of one evaluation batch from ``test_step`` and ``predict_step``.

    It changes only the metrics and the variables that advance from batch to batch. Other
    assignments are discarded.

    Args:
        backend: The backend in use.
        model: The model.
        own: Which steps the model overrides; for the others the defaults are used.
        forward: Computes loss and outputs, see ``kbtrain.model.forward.Forward``; None if no loss
            is needed.
        predict: Whether to compute only outputs.
        advancing: Seeds and states that carry over to the next batch.
        metrics: Metrics to update, if any.
        select_outputs: ``(outputs, batch) -> outputs for the host``; None returns no outputs.

    Returns:
        ``step(batch)`` as from ``kbtrain.evaluation.eval_step.make_eval_step``, with the "logs"
        that ``test_step`` returned in place of the loss.
    """
    name = type(model).__name__

    def evaluated(batch: Any) -> tuple[dict[str, Any], Any, Any]:
        if forward is None or not own.test_step:
            run = predict if forward is None else forward
            loss, outputs, inputs = run(batch, None, training=False)
            return {} if loss is None else {"loss": loss}, outputs, inputs
        logs = logged(backend.run_test_step(model, restore_structure(batch)), f"{name}.test_step")
        if isinstance(metrics, ModelMetrics):
            metrics.names = set(logs)
        outputs = None
        if select_outputs is not None and not own.predict_step:
            outputs = predict(batch, None, training=False)[1]
        return {"logs": logs}, outputs, None

    def eval_step(batch: Any) -> dict[str, Any]:
        result: dict[str, Any]
        with backend.dropping() as scope:
            if own.predict_step and forward is None:
                result, outputs, inputs = {}, None, None
            else:
                result, outputs, inputs = evaluated(batch)
            if select_outputs is not None:
                if own.predict_step:
                    outputs = backend.run_predict_step(model, restore_structure(batch))
                result["outputs"] = select_outputs(outputs, batch)
        carry_over(scope, [*advancing, *([] if metrics is None else metrics.variables)])
        if metrics is not None and inputs is not None:
            metrics.update(*inputs)
        return result

    return eval_step
