"""The loss of a batch whose rows several processes share: it is added up before its reduction."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from kbtrain.model.losses.output_losses import LossTerms, Term
from kbtrain.model.losses.pairs import LossPair, as_dtype_of, mean


def summands(loss: LossPair | LossTerms) -> list[Any]:
    """The tensors of a loss to add up over processes, in the order of ``from_sums``.

    An extra is weighted by what it will be averaged over.
    """
    if isinstance(loss, LossPair):
        weight, own = loss.count, [loss.sum, loss.count]
    else:
        weight = loss.samples
        own = [x for term in loss.all().values() for x in (term.sum, term.count)] + [loss.samples]
    return [*own, *(v * as_dtype_of(weight, v) for v in loss.extras.values())]


def from_sums(loss: LossPair | LossTerms, sums: Iterator[Any]) -> LossPair | LossTerms:
    """The loss of the whole batch.

    Args:
        loss: The loss of this process's rows.
        sums: The sums of its ``summands``; as many as there are of these are taken.
    """
    if isinstance(loss, LossPair):
        total, count = next(sums), next(sums)
        return LossPair(total, count, _means(loss.extras, count, sums))

    def terms(mine: Mapping[str, Term]) -> dict[str, Term]:
        return {name: Term(next(sums), next(sums), term.weight) for name, term in mine.items()}

    outputs, others = terms(loss.outputs), terms(loss.others)
    samples = next(sums)
    return LossTerms(outputs, others, samples, _means(loss.extras, samples, sums))


def _means(extras: Mapping[str, Any], weight: Any, sums: Iterator[Any]) -> dict[str, Any]:
    return {name: mean(next(sums), weight) for name in extras}


def of_nothing(loss: LossPair | LossTerms) -> LossPair | LossTerms:
    """The loss of no rows, with a gradient of zero: a process without rows computes another's."""

    def zero(x: Any) -> Any:
        return x * as_dtype_of(0.0, x)

    if isinstance(loss, LossPair):
        return LossPair(zero(loss.sum), zero(loss.count), loss.extras)

    def terms(mine: Mapping[str, Term]) -> dict[str, Term]:
        return {n: Term(zero(t.sum), zero(t.count), t.weight) for n, t in mine.items()}

    return LossTerms(terms(loss.outputs), terms(loss.others), zero(loss.samples), loss.extras)
