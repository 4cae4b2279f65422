"""What an evaluation or a prediction returns."""

from __future__ import annotations

from typing import Any, NamedTuple


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
