"""The train step, written once for all backends in terms of Keras variables.

``loss -> gradients -> accumulate -> sum over processes -> clip -> finite check -> optimizer ->
metrics``. Nothing here waits for the device: results are returned as tensors and fetched when they
are logged. With several processes each computes its rows of a batch; everything after the sum is
the same on all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from kbtrain.backends.protocol import Backend
from kbtrain.backends.scopes import is_overwritten
from kbtrain.model.forward import Forward
from kbtrain.model.losses.output_losses import LossTerms, added_up, counts_of, means_of, value_of
from kbtrain.model.losses.pairs import LossPair, as_dtype_of, as_float, divisor, mean
from kbtrain.model.metrics import MetricSet
from kbtrain.model.over_shards import OverShards
from kbtrain.optimization.division import division_of
from kbtrain.optimization.loss_scale import can_be_told, told_of_overflow
from kbtrain.utils.float64 import float_dtype


def make_train_step(
    backend: Backend,
    forward: Forward,
    count_items: Callable[[Any, int], Any] | None,
    optimizer: keras.optimizers.Optimizer,
    trainable: Sequence[keras.Variable],
    metrics: MetricSet | None,
    max_grad_norm: float,
    on_nonfinite: str,
    halted: keras.Variable,
    has_terms: bool = False,
) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """Build the step of one optimizer update.

    The step takes a list of chunks, each ``{"single": micro_batch}`` or ``{"stacked": batch}``
    with micro-batches along a new leading axis (these run in one loop inside the step).

    The gradient is that of (sum of all losses) / (sum of all counts), independent of how samples
    are split into micro-batches. With several outputs each has its own count, summed in a pass
    before the first gradient. It is clipped by its global norm as in torch:
    ``g * min(1, max_norm / (norm + 1e-6))``. All arithmetic is float32, or float64 for variables
    in float64.

    A "gradient" that is a new value (``overwrite_with_gradient``: scales of float8 layers) is
    passed to the optimizer unchanged, the maximum over micro-batches, as in Keras.

    Args:
        backend: The backend in use.
        forward: See ``Forward``.
        count_items: Counts the labels in a batch (see ``kbtrain.model.forward.items_counter``)
            if the loss function needs the total of the whole update; else None.
        optimizer: A built Keras optimizer.
        trainable: The variables it was built with.
        metrics: Metrics to update, if any.
        max_grad_norm: Clip above this norm; 0 does not clip.
        on_nonfinite: ``"raise"`` freezes the weights at the first non-finite loss or gradient (the
            host raises when it reads the flag), ``"skip"`` skips that update, ``"ignore"`` applies
            it.
        halted: Integer variable, 1 from the first non-finite step on (``"raise"`` only).
        has_terms: Whether the loss may have several terms (see
            ``kbtrain.model.losses.output_losses``).

    Returns:
        ``step(chunks) -> {"loss", "grad_norm", "learning_rate", "finite", "extras"}``, scalars on
        the device. ``grad_norm`` is the norm before clipping, ``learning_rate`` the one used.
    """
    # A loss-scaling optimizer handles overflowing gradients itself, so only the loss is checked.
    scales_itself = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
    replaced = [is_overwritten(v) for v in trainable]
    division = division_of(optimizer)
    shards = OverShards(backend, metrics, trainable, division)
    updated = shards.owned(trainable)
    given_whole = shards.owned(replaced)
    # float8 layers calibrate to the gradients of Keras' loss, which is a mean. A loss scale also
    # assumes a mean: the gradient of a sum would overflow float16 needlessly.
    of_mean = scales_itself or any(replaced)
    state = [*updated, *optimizer.variables]
    trained = {id(v) for v in trainable}

    def differentiate(
        batch: Any, num_items: Any, counts: Mapping[str, Any] | None = None
    ) -> tuple[LossPair | LossTerms, Any, list[Any], list[Any]]:
        has_rows = True

        def objective(batch: Any) -> tuple[Any, Any]:
            nonlocal has_rows
            with backend.local_rows(batch) as rows:
                loss, _, metric_inputs = forward(rows.batch, num_items, training=True)
                assert loss is not None
                loss, metric_inputs = shards.forwarded(loss, metric_inputs, rows)
                has_rows = rows.size > 0
            if isinstance(loss, LossTerms):
                own = shards.sum_each(counts_of(loss)) if counts is None else counts
                value = value_of(loss, own)
                count = None
            else:
                value, count = loss.sum, loss.count
                if of_mean:
                    count = ops.stop_gradient(shards.sum(count))
                    value = mean(value, count)
            return optimizer.scale_loss(value), (loss, metric_inputs, count)

        _, (result, metric_inputs, count), gradients, updates = backend.value_and_grad(
            objective, trainable, batch
        )
        if of_mean and isinstance(result, LossPair):
            count = divisor(count)
            gradients = [
                g if whole else _times(as_float(g), count)
                for g, whole in zip(gradients, replaced, strict=True)
            ]
        return result, metric_inputs, gradients, shards.averaged(updates, has_rows)

    def is_running() -> Any:
        return ops.equal(halted, 0)

    def update_metrics(condition: Any, inputs: Any) -> None:
        if metrics is not None and inputs is not None:  # a batch without labels has none
            backend.run_if(condition, lambda: metrics.update(*inputs), metrics.variables)

    def accumulate(
        carry: dict[str, Any], batch: Any
    ) -> tuple[dict[str, Any], LossPair | LossTerms]:
        result, metric_inputs, new, updates = differentiate(
            batch, carry.get("num_items"), carry.get("counts")
        )
        total = result.sum if isinstance(result, LossPair) else value_of(result, counts_of(result))
        # Over several processes all take one decision, at the end: the update is rolled back.
        finite = ops.ones_like(total, "bool") if shards.several else ops.isfinite(total)
        usable = ops.logical_and(finite, is_running())
        if on_nonfinite == "ignore":
            usable = ops.ones_like(usable)
        backend.commit_if(usable, updates)
        update_metrics(usable, metric_inputs)
        total = [
            ops.maximum(t, g) if whole else t + as_float(g)
            for t, g, whole in zip(carry["gradients"], new, replaced, strict=True)
        ]
        return {**carry, "gradients": total}, result

    def over_chunks(
        function: Callable[[Any, Any], tuple[Any, Any]], carry: Any, chunks: list[dict[str, Any]]
    ) -> tuple[Any, Any]:
        """Run the function on all micro-batches and stack the results along one axis."""
        results = []
        for chunk in chunks:
            batches = chunk.get("stacked")
            if batches is None:
                batches = keras.tree.map_structure(lambda t: ops.expand_dims(t, 0), chunk["single"])
            carry, result = backend.scan(function, carry, batches)
            results.append(result)
        return carry, keras.tree.map_structure(lambda *t: ops.concatenate(t), *results)

    def count(carry: dict[str, Any], batch: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        # The compiler removes whatever the counts do not depend on, usually the whole model.
        with backend.dropping(), backend.local_rows(batch) as rows:
            loss, _, _ = forward(rows.batch, None, training=True)
            assert loss is not None
            loss, _ = shards.forwarded(loss, None, rows)
        return carry, counts_of(loss)

    def run_chunks(
        chunks: list[dict[str, Any]], num_items: Any
    ) -> tuple[LossPair | LossTerms, list[Any]]:
        carry: dict[str, Any] = {}
        if has_terms:
            _, counts = over_chunks(count, {}, chunks)
            if counts:
                sums = {name: ops.sum(each) for name, each in counts.items()}
                carry["counts"] = shards.sum_each(sums)
        carry["gradients"] = [ops.zeros(v.shape, float_dtype(v.value)) for v in trainable]
        if num_items is not None:
            carry["num_items"] = num_items
        carry, joined = over_chunks(accumulate, carry, chunks)
        if isinstance(joined, LossTerms):
            return added_up(joined), carry["gradients"]
        counts = joined.count
        extras = {
            name: mean(ops.sum(_times(values, counts)), ops.sum(counts))
            for name, values in joined.extras.items()
        }
        return LossPair(ops.sum(joined.sum), ops.sum(counts), extras), carry["gradients"]

    def train_step(chunks: list[dict[str, Any]]) -> dict[str, Any]:
        num_items = None
        if count_items is not None:
            num_items = shards.sum(sum(shards.counted(count_items, chunk) for chunk in chunks))
        metrics_before = shards.begin_metrics()
        metric_inputs: Any = None
        undo_if: Callable[[Any], None] | None = None
        updates: list[Any] = []
        if len(chunks) == 1 and "single" in chunks[0]:
            result, metric_inputs, gradients, updates = differentiate(
                chunks[0]["single"], num_items
            )
        else:
            (result, gradients), undo_if = backend.with_rollback(
                lambda: run_chunks(chunks, num_items)
            )
        if metrics_before is not None:
            updates = shards.assign_metrics(updates)
            if metrics is not None and metric_inputs is not None:
                metrics.update(*metric_inputs)
                metric_inputs = None
        result, gradients, metric_states = shards.sum_all(result, gradients, metrics_before)

        proper = [g for g, whole in zip(gradients, given_whole, strict=True) if not whole]
        norm = shards.global_norm(proper)
        if isinstance(result, LossTerms):
            loss, extras = value_of(result, counts_of(result)), means_of(result)
            per_item = as_dtype_of(1.0, norm)
        else:
            loss, extras = mean(result.sum, result.count), dict(result.extras)
            # The gradients are those of the scaled sum; a single factor yields the clipped mean.
            per_item = mean(1.0, as_dtype_of(result.count, norm))
        loss_scale = as_float(optimizer.scale_loss(1.0))
        norm = norm * per_item / as_dtype_of(loss_scale, norm)
        factor = per_item
        if max_grad_norm > 0:
            factor = factor * ops.minimum(max_grad_norm / (norm + 1e-6), 1.0)
        learning_rate = as_float(optimizer.learning_rate)
        finite = ops.isfinite(loss)
        usable = ops.isfinite(norm)
        for new_value, whole in zip(gradients, given_whole, strict=True):
            if whole:
                usable = ops.logical_and(usable, ops.all(ops.isfinite(new_value)))
        if any(replaced):
            usable = shards.agreed(usable)
        if not scales_itself:
            finite = ops.logical_and(finite, usable)
        elif division is not None and not can_be_told(optimizer):
            # The optimizer looks for an overflow in the gradients that it gets.
            factor = ops.where(usable, factor, np.nan)

        # A layer may assign its own weights: the optimizer updates the new values.
        own = [(v, value) for v, value in updates if id(v) in trained]
        updates = [(v, value) for v, value in updates if id(v) not in trained]

        def apply() -> None:
            for variable, value in own:
                variable.assign(value)
            with told_of_overflow(optimizer, usable):
                backend.apply_optimizer(optimizer, gradients, factor, updated)

        if on_nonfinite == "ignore":
            good = ops.ones_like(finite)
            apply()
        else:
            good = ops.logical_and(finite, is_running())
            backend.run_if(good, apply, state)
            if undo_if is not None:
                undo_if(ops.logical_not(good))
        shards.distribute()
        backend.commit_if(good, updates)
        backend.commit_if(good, metric_states)
        if metric_inputs is not None:
            update_metrics(good, metric_inputs)
        if on_nonfinite == "raise":
            bad = ops.cast(ops.logical_not(finite), halted.dtype)
            halted.assign(ops.maximum(halted.value, bad))
        return {
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": learning_rate,
            "finite": finite,
            "extras": extras | ({"loss_scale": loss_scale} if scales_itself else {}),
        }

    return train_step


def _times(tensor: Any, factor: Any) -> Any:
    return tensor * as_dtype_of(factor, tensor)
