"""The loss of several outputs: one ``(sum, count)`` for each, all the way to the end.

An update's loss is ``sum over outputs of weight * (sum of sums / sum of counts)``, and so is that
of an evaluation: exact for every output, whatever the micro-batches and their padding. A gradient
of it needs the counts of the whole update before the first micro-batch is differentiated
(``counts_of``), where one output alone can be divided at the end.

A loss that Keras adds up (``reduction="sum"``, a vector given to ``add_loss``) is divided by
nothing: its count is 0, and an update's is the sum over the update. An evaluation gives what
`Model.evaluate` gives, the mean over the samples of the sum of their batch, and so depends on the
batch size as it does there.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import keras
from keras import ops

from kbtrain.model.losses.keras_losses import is_summed, keras_loss_pair
from kbtrain.model.losses.pairing import OutputLoss
from kbtrain.model.losses.pairs import LossPair, as_dtype_of, as_float, divisor, mean
from kbtrain.utils.float64 import float_dtype


class Term(NamedTuple):
    """One addend of a loss, before its reduction: scalar tensors.

    Attributes:
        sum: The sum of the losses.
        count: What to divide by; 0 divides by nothing.
        weight: What it is multiplied with in the total.
    """

    sum: Any
    count: Any
    weight: Any


class LossTerms(NamedTuple):
    """A loss of several terms, before its reduction.

    Attributes:
        outputs: The terms of the outputs, by the name that their means are logged with.
        others: More terms, which are not logged.
        samples: Number of samples, which the extras are weighed by.
        extras: More named scalar tensors to average and log.
    """

    outputs: Mapping[str, Term]
    others: Mapping[str, Term]
    samples: Any
    extras: Mapping[str, Any] = {}

    def all(self) -> dict[str, Term]:
        """Every term by a name of its own."""
        named = {f"outputs/{name}": term for name, term in self.outputs.items()}
        return named | {f"others/{name}": term for name, term in self.others.items()}


class OutputLosses:
    """What the default ``compute_loss`` returns for several outputs.

    Attributes:
        pairs: ``(name, pair, weight, is summed)`` of each output that has a loss.
        samples: Samples in the batch.
        sum, count: The loss of this batch alone, as of one output: a ``compute_loss`` of a user's
            own can build on it, with the batch as the unit of the mean.
        extras: More named scalar tensors to average and log.
    """

    def __init__(self, pairs: Sequence[tuple[str, LossPair, Any, bool]], samples: int) -> None:
        self.pairs, self.samples = list(pairs), samples
        self.extras: Mapping[str, Any] = {}

    @property
    def sum(self) -> Any:
        """The weighted sum of the outputs' means, times the samples."""
        means = [_weighted(mean(*_shown(p, s)), w) for _, p, w, s in self.pairs]
        total = _sum(means)
        return total * as_dtype_of(self.count, total)

    @property
    def count(self) -> Any:
        """The samples."""
        return as_float(self.samples)

    def _replace(self, **changes: Any) -> LossPair:
        """As that of a ``LossPair``, which it becomes."""
        return LossPair(self.sum, self.count, self.extras)._replace(**changes)

    def terms(self, training: bool) -> LossTerms:
        """As the steps take it.

        Args:
            training: Whether sums are to be added up, not shown.
        """
        terms = {
            name: _term(pair, weight, summed, self.samples, training)
            for name, pair, weight, summed in self.pairs
        }
        alone = len(terms) == 1
        return LossTerms(
            {} if alone else {f"{name}_loss": term for name, term in terms.items()},
            terms if alone else {},
            as_float(self.samples),
            self.extras,
        )


def _weighted(value: Any, weight: Any) -> Any:
    return value if weight is None else value * as_dtype_of(weight, value)


def _sum(values: Sequence[Any]) -> Any:
    """Of scalars, float64 if any is."""
    dtype = float_dtype(*values)
    return sum(ops.cast(value, dtype) for value in values)


def _shown(pair: LossPair, summed: bool) -> tuple[Any, Any]:
    return pair.sum, ops.zeros_like(pair.count) if summed else pair.count


def _term(pair: LossPair, weight: Any, summed: bool, samples: int, training: bool) -> Term:
    total, count = _shown(pair, summed)
    if summed and not training:
        count = as_dtype_of(samples, total)
        total = total * count
    return Term(total, count, as_dtype_of(1.0 if weight is None else weight, total))


def losses_of(rows: Sequence[OutputLoss], samples: int) -> LossPair | OutputLosses:
    """The losses of all outputs; of one alone the pair, if its loss is a mean."""
    pairs = []
    for row in rows:
        pair = keras_loss_pair(row.loss, row.label, row.output, row.sample_weight)
        pairs.append((row.name, pair, row.weight, is_summed(row.loss)))
    if len(pairs) > 1 or pairs[0][3]:
        return OutputLosses(pairs, samples)
    _, pair, weight, _ = pairs[0]
    return pair if weight is None else pair._replace(sum=_weighted(pair.sum, weight))


def with_added(
    loss: LossPair | LossTerms, added: Sequence[Any], samples: int, training: bool
) -> LossPair | LossTerms:
    """The loss with what layers add to it: regularizers, and ``add_loss``.

    A vector is summed, as in Keras. One value for a batch is a mean, weighed like the batch; one
    value for each sample is summed over the update.

    Args:
        loss: The loss of the batch.
        added: ``model.losses``.
        samples: Samples in the batch.
        training: Whether sums are to be added up, not shown.
    """
    vectors = [v for v in added if training and is_per_sample(v, samples)]
    means = [ops.sum(as_float(v)) for v in added if not any(v is vector for vector in vectors)]
    more: dict[str, Term] = {}
    if isinstance(loss, LossPair):
        if means:
            total = as_dtype_of(_sum(means), loss.sum)
            loss = loss._replace(sum=loss.sum + total * loss.count)
        if not vectors:
            return loss
        more["loss"] = Term(loss.sum, loss.count, as_dtype_of(1.0, loss.sum))
        loss = LossTerms({}, {}, as_float(samples), loss.extras)
    elif means:
        total = _sum(means)
        count = as_dtype_of(loss.samples, total)
        more["added"] = Term(total * count, count, as_dtype_of(1.0, total))
    if vectors:
        each = _sum([ops.sum(as_float(value)) for value in vectors])
        zero, one = (as_dtype_of(x, each) for x in (0.0, 1.0))
        more["added for each sample"] = Term(each, zero, one)
    return loss._replace(others={**loss.others, **more})


def is_per_sample(value: Any, samples: int) -> bool:
    """Whether something given to ``add_loss`` has one value for each sample."""
    return len(value.shape) > 0 and value.shape[0] == samples


def adds_losses(layer: keras.layers.Layer) -> bool:
    """Whether the code of a layer's class has a call of ``add_loss``."""
    own = [cls for cls in type(layer).__mro__ if not cls.__module__.startswith("keras.src")]
    functions = [inspect.unwrap(f) for cls in own for f in vars(cls).values() if callable(f)]
    return any("add_loss" in getattr(f, "__code__", _NO_CODE).co_names for f in functions)


_NO_CODE = compile("", "", "exec")


# --- in the steps ---------------------------------------------------------------------------------


def counts_of(loss: LossPair | LossTerms) -> dict[str, Any]:
    """What each term is divided by; nothing for a loss that can be divided at the end."""
    if isinstance(loss, LossPair):
        return {}
    return {name: term.count for name, term in loss.all().items()}


def value_of(loss: LossTerms, counts: Mapping[str, Any]) -> Any:
    """The total: of a batch with its own counts, of a micro-batch its part of the update's."""
    terms = loss.all().items()
    return _sum([term.weight * (term.sum / divisor(counts[name])) for name, term in terms])


def added_up(loss: LossTerms) -> LossTerms:
    """The terms of several batches along an axis, of all together."""

    def add(terms: Mapping[str, Term]) -> dict[str, Term]:
        return {n: Term(ops.sum(t.sum), ops.sum(t.count), t.weight[0]) for n, t in terms.items()}

    samples = ops.sum(loss.samples)
    extras = {
        n: mean(ops.sum(v * as_dtype_of(loss.samples, v)), samples) for n, v in loss.extras.items()
    }
    return LossTerms(add(loss.outputs), add(loss.others), samples, extras)


def means_of(loss: LossTerms) -> dict[str, Any]:
    """What is logged besides the total: the extras, and the mean of each output's loss."""
    return {**loss.extras, **{n: mean(t.sum, t.count) for n, t in loss.outputs.items()}}
