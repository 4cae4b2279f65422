"""Evaluation and prediction: exact over the whole set, whatever the batch size."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import keras
import numpy as np

from kbtrain import persistence
from kbtrain.data import Batches, as_loader, batch_size, unpack
from kbtrain.errors import ConfigurationError, DataError
from kbtrain.evaluation_weights import swapped_in
from kbtrain.metrics import MetricSet

if TYPE_CHECKING:
    from kbtrain.trainer import Trainer

PADDING = -100
"""Fills up outputs and labels of different lengths, so that they can be put together."""


@dataclass
class EvalPrediction:
    """What ``compute_metrics`` receives, as NumPy arrays; unpacks as (predictions, label_ids).

    Attributes:
        predictions: The model's outputs for the whole set (nested as the model returns them).
        label_ids: The labels for the whole set.
        inputs: The inputs, if ``include_for_metrics`` has "inputs".
        losses: The mean loss of each sample's batch, if it has "loss".
    """

    predictions: Any
    label_ids: Any
    inputs: Any = None
    losses: np.ndarray | None = None

    def __iter__(self) -> Iterator[Any]:
        extra = [x for x in (self.inputs, self.losses) if x is not None]
        return iter((self.predictions, self.label_ids, *extra))


class PredictionOutput(NamedTuple):
    """Result of ``Trainer.predict``.

    Attributes:
        predictions: The model's outputs, in the order of the data set.
        label_ids: The labels, or None.
        metrics: Loss, metrics and speed; names begin with ``test_``.
    """

    predictions: Any
    label_ids: Any
    metrics: dict[str, float]


class EvalLoopOutput(NamedTuple):
    """Result of one pass over an evaluation set.

    Attributes:
        predictions: Outputs, or None if they were not asked for.
        label_ids: Labels, or None.
        metrics: Results with their prefix.
        num_samples: Number of samples seen.
    """

    predictions: Any
    label_ids: Any
    metrics: dict[str, float]
    num_samples: int


def evaluation_loop(
    trainer: Trainer, dataloader: Any, prefix: str, gather: bool, keep_outputs: bool = False
) -> EvalLoopOutput:
    """Pass once over a data set with the Trainer's model.

    Args:
        trainer: Whose model, metrics and callbacks.
        dataloader: Loader or iterable of batches.
        prefix: Put before every metric's name, with an underscore.
        gather: Copy outputs and labels to the host.
        keep_outputs: Return them; data without labels is welcome then.
    """
    bound, backend = trainer.bound, trainer.backend
    with backend.device_scope(trainer.args.use_cpu):
        loader = trainer.eval_dataloader = as_loader(dataloader)
        batches = Batches(loader)
        first = batches.peek()
        if first is None:
            raise DataError(
                "The evaluation data has no samples. Pass a data set with at least one."
            )
        bound.build(first)
        with_loss = not keep_outputs or unpack(first).y is not None
        metrics = bound.metrics if with_loss else None
        # In training the metrics are in the middle of adding up what the next log will say.
        saved = persistence.copies(bound.metric_variables) if trainer.is_in_train else None
        with swapped_in(trainer.optimizer if trainer.training_weights else None):
            output = run_evaluation(
                backend=backend,
                step=bound.eval_step(with_loss, gather),
                batches=batches,
                metrics=metrics,
                compute_metrics=trainer.compute_metrics,
                include=trainer.args.include_for_metrics,
                keep_outputs=keep_outputs,
                prefix=prefix,
                on_batch=lambda: trainer.fire("on_prediction_step"),
            )
        if saved is not None:
            persistence.put_back(bound.metric_variables, saved)
        return output


def run_evaluation(
    *,
    backend: ModuleType,
    step: Callable[[Any], dict[str, Any]],
    batches: Iterable[Any],
    metrics: MetricSet | None,
    compute_metrics: Callable[[EvalPrediction], Mapping[str, Any]] | None,
    include: Any,
    keep_outputs: bool,
    prefix: str,
    on_batch: Callable[[], None],
) -> EvalLoopOutput:
    """Pass over ``loader`` once.

    The loss is (sum of all sums) / (sum of all counts), added up in float64 on the host.

    Args:
        backend: A module of ``kbtrain.backends``.
        step: The compiled evaluation step.
        batches: The data, in order.
        metrics: Metrics the step updates; reset before, read after.
        compute_metrics: Called once with everything, on the host.
        include: Members of ``include_for_metrics``.
        keep_outputs: Return predictions and labels.
        prefix: Put before every name, with an underscore.
        on_batch: Called after each batch.
    """
    start = time.perf_counter()
    if metrics is not None:
        metrics.reset()
    sums: list[dict[str, Any]] = []
    host: list[dict[str, Any]] = []
    losses: list[np.ndarray] = []
    samples = count = 0
    for batch in batches:
        result = step(backend.to_device(batch))
        size = batch_size(batch)
        samples, count = samples + size, count + 1
        # Outputs leave the device batch by batch: an evaluation never fills its memory.
        if "outputs" in result:
            host.append(backend.to_host(result.pop("outputs")))
        if "sum" in result and "loss" in include:
            pair = backend.to_host((result["sum"], result["count"]))
            losses.append(np.full(size, pair[0] / max(pair[1], 1e-38), np.float32))
        if result:
            sums.append(result)
        if len(sums) >= 64:
            sums = [_add_up(backend.to_host(sums))]
        on_batch()
    values: dict[str, Any] = {}
    if sums:
        total = _add_up(backend.to_host(sums))
        values["loss"] = float(total["sum"] / total["count"]) if total["count"] else 0.0
        for name, value in total["extras"].items():
            values[name] = float(value)
        if metrics is not None:
            values |= metrics.result()
    gathered = _concatenate(host) if host else {}
    if compute_metrics is not None and "labels" in gathered:
        prediction = EvalPrediction(
            gathered["outputs"],
            gathered["labels"],
            gathered.get("inputs"),
            np.concatenate(losses) if losses else None,
        )
        values |= _checked(compute_metrics(prediction))
    seconds = time.perf_counter() - start
    prefixed = {_with_prefix(name, prefix): value for name, value in values.items()}
    prefixed |= speed(prefix, seconds, samples, count)
    return EvalLoopOutput(
        gathered.get("outputs") if keep_outputs else None,
        gathered.get("labels") if keep_outputs else None,
        prefixed,
        samples,
    )


def speed(prefix: str, seconds: float, samples: int, steps: int) -> dict[str, float]:
    """Runtime in seconds, samples and steps per second, rounded as in the reference."""
    seconds = max(seconds, 1e-9)
    return {
        f"{prefix}_runtime": round(seconds, 4),
        f"{prefix}_samples_per_second": round(samples / seconds, 3),
        f"{prefix}_steps_per_second": round(steps / seconds, 3),
    }


def _with_prefix(name: str, prefix: str) -> str:
    return name if name.startswith(f"{prefix}_") else f"{prefix}_{name}"


def _checked(values: Any) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        raise ConfigurationError(
            "compute_metrics must return a dict from names to numbers. "
            f"Received: {type(values).__name__}."
        )
    return {str(k): v.item() if isinstance(v, np.generic) else v for k, v in values.items()}


def _add_up(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Sums of sums and counts in float64; extras averaged by count."""
    sums = [np.float64(r["sum"]) for r in results]
    counts = [np.float64(r["count"]) for r in results]
    total = sum(counts)
    names = {name for r in results for name in r["extras"]}
    extras = {
        name: sum(np.float64(r["extras"][name]) * c for r, c in zip(results, counts, strict=True))
        / (total or 1.0)
        for name in sorted(names)
    }
    return {"sum": sum(sums), "count": total, "extras": extras}


def _concatenate(batches: list[dict[str, Any]]) -> dict[str, Any]:
    return keras.tree.map_structure(lambda *parts: _pad_and_concatenate(parts), *batches)


def _pad_and_concatenate(parts: tuple[np.ndarray, ...]) -> np.ndarray:
    """Concatenate along the first axis; other axes are filled up to the longest with -100."""
    arrays = [np.atleast_1d(part) for part in parts]
    if len({a.shape[1:] for a in arrays}) == 1:
        return np.concatenate(arrays)
    longest = tuple(np.max([a.shape[1:] for a in arrays], axis=0))
    result = np.full((sum(len(a) for a in arrays), *longest), PADDING, arrays[0].dtype)
    row = 0
    for array in arrays:
        result[(slice(row, row + len(array)), *map(slice, array.shape[1:]))] = array
        row += len(array)
    return result
