"""The loss of several outputs, with a separate ``(sum, count)`` for each until the final reduction.

The loss of an update, or of an evaluation, is
``sum over outputs of weight * (sum of sums / sum of counts)``. It is exact for every output,
independent of micro-batches and padding. Its gradient needs the counts of the whole update before
the first micro-batch is differentiated (``counts_of``); with a single output the division can wait
until the end.

A loss that Keras sums (``reduction="sum"``, a vector passed to ``add_loss``) is not divided: its
count is 0, and the loss of an update is the sum over the update. An evaluation reports what
``Model.evaluate`` reports, a mean over samples of their batch's sum, which depends on the batch
size.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import keras
from keras import ops

from kbtrain.backends.whole_batch import rows_in_all, sum_in_all
from kbtrain.model.losses.keras_losses import is_summed, keras_loss_pair
from kbtrain.model.losses.pairing import OutputLoss
from kbtrain.model.losses.pairs import LossPair, as_dtype_of, as_float, divisor, mean
from kbtrain.utils.float64 import float_dtype


class Term(NamedTuple):
    """One term of a loss before its reduction, as scalar tensors.

    Attributes:
        sum: The sum of the losses.
        count: The divisor; 0 for no division.
        weight: Its weight in the total.
    """

    sum: Any
    count: Any
    weight: Any


class LossTerms(NamedTuple):
    """A loss of several terms, before its reduction.

    Attributes:
        outputs: The terms of the outputs, keyed by the name under which their means are logged.
        others: Further terms, which are not logged.
        samples: Number of samples, by which the extras are weighted.
        extras: Additional named scalar tensors to average and log.
    """

    outputs: Mapping[str, Term]
    others: Mapping[str, Term]
    samples: Any
    extras: Mapping[str, Any] = {}

    def all(self) -> dict[str, Term]:
        """Every term, keyed by a unique name."""
        named = {f"outputs/{name}": term for name, term in self.outputs.items()}
        return named | {f"others/{name}": term for name, term in self.others.items()}


class OutputLosses:
    """The result of the default ``compute_loss`` for several outputs.

    Attributes:
        pairs: ``(name, pair, weight, is summed)`` of each output that has a loss.
        samples: Samples in the batch.
        sum, count: The loss of this batch alone, in the form of a single output, so that an
            overridden ``compute_loss`` can build on it; it is averaged over samples.
        extras: Additional named scalar tensors to average and log.
    """

    def __init__(self, pairs: Sequence[tuple[str, LossPair, Any, bool]], samples: int) -> None:
        self.pairs, self.samples = list(pairs), samples
        self.extras: Mapping[str, Any] = {}

    @property
    def sum(self) -> Any:
        """The weighted sum of the outputs' means, times the samples."""
        # A sum over all rows of the batch is added up from those of the processes.
        rows = rows_in_all(self.samples)
        terms = [
            _weighted(mean(*_shown(p, s)), w) * (rows if s else self.samples)
            for _, p, w, s in self.pairs
        ]
        return _sum(terms)

    @property
    def count(self) -> Any:
        """The samples."""
        return as_float(self.samples)

    def _replace(self, **changes: Any) -> LossPair:
        """The extras as in a ``LossPair``."""
        return LossPair(self.sum, self.count, self.extras)._replace(**changes)

    def terms(self, training: bool) -> LossTerms:
        """Convert to the form that the steps use.

        Args:
            training: Whether losses that Keras sums are summed over the update, instead of
                averaged for a report.
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
    """The common dtype of scalars: float64 if any has it."""
    dtype = float_dtype(*values)
    return sum(ops.cast(value, dtype) for value in values)


def _shown(pair: LossPair, summed: bool) -> tuple[Any, Any]:
    return pair.sum, ops.zeros_like(pair.count) if summed else pair.count


def _term(pair: LossPair, weight: Any, summed: bool, samples: int, training: bool) -> Term:
    total, count = _shown(pair, summed)
    if summed and not training:
        count = as_dtype_of(samples, total)
        total = total * as_dtype_of(rows_in_all(samples), total)
    return Term(total, count, as_dtype_of(1.0 if weight is None else weight, total))


def losses_of(rows: Sequence[OutputLoss], samples: int) -> LossPair | OutputLosses:
    """The losses of all outputs; a plain pair for a single output whose loss is a mean."""
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
    """The loss including ``model.losses``: regularizers and ``add_loss``.

    A vector is summed, as in Keras. A value per batch is a mean, weighted like the batch; values
    per sample are summed over the update.

    Args:
        loss: The loss of the batch.
        added: ``model.losses``.
        samples: Samples in the batch.
        training: Whether losses that Keras sums are summed over the update, instead of averaged
            for a report.
    """
    vectors = [v for v in added if is_per_sample(v, samples)]
    means = [ops.sum(as_float(v)) for v in added if not any(v is vector for vector in vectors)]
    # Of a sum over all rows of the batch a process has those of its rows.
    sums = [] if training else [ops.sum(as_float(v)) for v in vectors]
    more: dict[str, Term] = {}
    if isinstance(loss, LossPair):
        if means:
            total = as_dtype_of(_sum(means), loss.sum)
            loss = loss._replace(sum=loss.sum + total * loss.count)
        if sums:
            total = as_dtype_of(_sum(sums), loss.sum)
            loss = loss._replace(sum=loss.sum + total * sum_in_all(loss.count))
        if not training or not vectors:
            return loss
        more["loss"] = Term(loss.sum, loss.count, as_dtype_of(1.0, loss.sum))
        loss = LossTerms({}, {}, as_float(samples), loss.extras)
    elif means or sums:
        total = _sum([x * samples for x in means] + [x * rows_in_all(samples) for x in sums])
        more["added"] = Term(total, as_dtype_of(loss.samples, total), as_dtype_of(1.0, total))
    if training and vectors:
        each = _sum([ops.sum(as_float(value)) for value in vectors])
        zero, one = (as_dtype_of(x, each) for x in (0.0, 1.0))
        more["added for each sample"] = Term(each, zero, one)
    return loss._replace(others={**loss.others, **more})


def is_per_sample(value: Any, samples: int) -> bool:
    """Whether a tensor passed to ``add_loss`` has one value per sample."""
    return len(value.shape) > 0 and value.shape[0] == samples


def adds_losses(layer: keras.layers.Layer) -> bool:
    """Whether the code of a layer's class calls ``add_loss``."""
    own = [cls for cls in type(layer).__mro__ if not cls.__module__.startswith("keras.src")]
    functions = [inspect.unwrap(f) for cls in own for f in vars(cls).values() if callable(f)]
    return any("add_loss" in getattr(f, "__code__", _NO_CODE).co_names for f in functions)


_NO_CODE = compile("", "", "exec")


# --- in the steps ---------------------------------------------------------------------------------


def counts_of(loss: LossPair | LossTerms) -> dict[str, Any]:
    """The divisor of each term; empty for a loss that can be divided at the end."""
    if isinstance(loss, LossPair):
        return {}
    return {name: term.count for name, term in loss.all().items()}


def value_of(loss: LossTerms, counts: Mapping[str, Any]) -> Any:
    """The total loss: of a batch with its own counts, of a micro-batch its share of the update."""
    terms = loss.all().items()
    return _sum([term.weight * (term.sum / divisor(counts[name])) for name, term in terms])


def added_up(loss: LossTerms) -> LossTerms:
    """Reduce the terms of several batches, stacked along an axis, to those of all together."""

    def add(terms: Mapping[str, Term]) -> dict[str, Term]:
        return {n: Term(ops.sum(t.sum), ops.sum(t.count), t.weight[0]) for n, t in terms.items()}

    samples = ops.sum(loss.samples)
    extras = {
        n: mean(ops.sum(v * as_dtype_of(loss.samples, v)), samples) for n, v in loss.extras.items()
    }
    return LossTerms(add(loss.outputs), add(loss.others), samples, extras)


def means_of(loss: LossTerms) -> dict[str, Any]:
    """The values logged besides the total: the extras and the mean loss of each output."""
    return {**loss.extras, **{n: mean(t.sum, t.count) for n, t in loss.outputs.items()}}
