"""The loss of an evaluation set: sums and counts accumulated on the host, in float64."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from kbtrain.model.losses.output_losses import LossTerms, Term
from kbtrain.model.losses.pairs import LossPair

logger = logging.getLogger("kbtrain")


class Totals:
    """Accumulates the sums and counts of the losses, batch by batch, in float64.

    With several outputs, each has its own sum and count.
    """

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._counts: dict[str, float] = {}
        self._weights: dict[str, float] = {}
        self._logged: dict[str, str] = {}
        self._samples = 0.0
        self._extras: dict[str, float] = {}

    def add(self, loss: LossPair | LossTerms) -> None:
        """Add the losses of several batches, arrays ``(batches,)``."""
        if isinstance(loss, LossPair):
            samples = self._add("loss", loss.sum, loss.count)
        else:
            for name, term in loss.all().items():
                self._add(name, term.sum, term.count)
                self._weights[name] = float(term.weight[0])
            self._logged |= {f"outputs/{name}": name for name in loss.outputs}
            samples = np.asarray(loss.samples, np.float64).tolist()
        self._samples = _add_each(self._samples, samples)
        for name, values in loss.extras.items():
            weighted = values.astype(np.float64) * samples
            self._extras[name] = _add_each(self._extras.get(name, 0.0), weighted.tolist())

    def _add(self, name: str, sums: Any, counts: Any) -> list[float]:
        # One by one: np.sum adds in an order that depends on the length.
        numbers: list[float] = counts.astype(np.float64).tolist()
        self._sums[name] = _add_each(self._sums.get(name, 0.0), sums.astype(np.float64).tolist())
        self._counts[name] = _add_each(self._counts.get(name, 0.0), numbers)
        return numbers

    def result(self) -> dict[str, float]:
        """The loss, the mean loss of each output, and the means of the extras by name.

        Sums are returned where the count is 0.
        """
        means = {name: total / (self._counts[name] or 1.0) for name, total in self._sums.items()}
        loss = sum(self._weights.get(name, 1.0) * value for name, value in means.items())
        if not any(self._counts.values()):
            logger.warning(
                "No label of the evaluation counts: all are ignored or padded. The loss is %s.",
                loss,
            )
        extras = {n: value / (self._samples or 1.0) for n, value in sorted(self._extras.items())}
        return {"loss": loss, **{self._logged[n]: means[n] for n in means if n in self._logged}} | (
            extras
        )


def losses_of_batches(loss: LossPair | LossTerms) -> Any:
    """The mean loss of each batch, ``(batches,)``."""
    if isinstance(loss, LossPair):
        return _divided(loss)
    return sum(term.weight * _divided(term) for term in loss.all().values())


def _divided(term: LossPair | Term) -> Any:
    return term.sum / np.maximum(term.count, 1e-38)


def _add_each(total: float, values: list[float]) -> float:
    for value in values:
        total += value
    return total
