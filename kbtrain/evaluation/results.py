"""Results of an evaluation and of a prediction."""

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
        predictions: Outputs, or None if they were not requested.
        label_ids: Labels, or None.
        metrics: Results with prefixed names.
        num_samples: Number of samples evaluated.
    """

    predictions: Any
    label_ids: Any
    metrics: dict[str, float]
    num_samples: int
