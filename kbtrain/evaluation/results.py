"""Results of an evaluation and of a prediction."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from kbtrain.utils.html import notebook_table, number


class Results(dict[str, Any]):
    """The results of an evaluation: a dict, which a notebook shows as a table.

    A copy and what is pickled are plain dicts.
    """

    __slots__ = ()

    def _repr_html_(self) -> str:
        return notebook_table("Evaluation", {name: number(value) for name, value in self.items()})

    def __reduce__(self) -> tuple[type, tuple[dict[str, Any]]]:
        return dict, (dict(self),)


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

    def _repr_html_(self) -> str:
        arrays = {"predictions": self.predictions, "label_ids": self.label_ids}
        values = {name: _outlined(value) for name, value in arrays.items()}
        values |= {name: number(value) for name, value in self.metrics.items()}
        return notebook_table("PredictionOutput", values)


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


def _outlined(value: Any) -> str:
    """Shape and dtype of an array, in the structure it is in."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {value.shape}"
    if isinstance(value, dict):
        return ", ".join(f"{name}: {_outlined(one)}" for name, one in value.items())
    if isinstance(value, list | tuple):
        return f"{len(value)} of {_outlined(value[0])}" if value else "none"
    return type(value).__name__ if value is not None else "None"
