"""Keras metrics on the device: one interface for a given list and for a compiled model."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, Protocol

import keras
from keras import ops
from keras.src.backend.common.masking import set_keras_mask  # no public door, see kbtrain.loss

from kbtrain.errors import ConfigurationError, DataError, first_lines
from kbtrain.loss import as_float, check_name


class MetricSet(Protocol):
    """What the step and the evaluation need of metrics."""

    def build(self, x: Any, y: Any, outputs: Any, sample_weight: Any, mask: Any) -> None:
        """Create all variables; called once, outside the compiled step."""

    def update(self, x: Any, y: Any, outputs: Any, sample_weight: Any, mask: Any) -> None:
        """Add one batch; traced into the step. Where ``mask`` is False nothing counts."""

    def result(self) -> dict[str, float]:
        """Current values, read on the host."""

    def reset(self) -> None:
        """Forget everything that was added."""

    @property
    def variables(self) -> list[keras.Variable]:
        """The state, which lives on the device."""


class ListedMetrics:
    """Metrics given as a name, a ``keras.metrics.Metric``, a list of these, or a dict per output.

    Args:
        metrics: For a model with one output a metric or a list; for several outputs a dict from
            output name to these, or a list with one entry per output.

    Raises:
        ConfigurationError: A name Keras does not know, or two metrics with one name.
    """

    def __init__(self, metrics: Any) -> None:
        self._spec = metrics
        self._flat: list[tuple[Any, keras.metrics.Metric]] | None = None
        for item in keras.tree.flatten(metrics):
            _check_metric(item)

    def build(self, x: Any, y: Any, outputs: Any, sample_weight: Any, mask: Any) -> None:
        """Resolve the names, which may depend on the shapes, and create the variables."""
        if self._flat is None:
            pairs = list(self._select(y, outputs))
            flat = [
                (key, _as_metric(item, labels, out))
                for key, items, labels, out in pairs
                for item in (items if isinstance(items, list | tuple) else [items])
                if item is not None
            ]
            names = [self._name(key, metric) for key, metric in flat]
            for name in names:
                check_name(name, "metrics has")
            if twice := sorted({n for n in names if names.count(n) > 1}):
                raise ConfigurationError(
                    f"Two metrics have the same name {twice[0]!r}; give one another `name=`."
                )
            self._flat = flat  # only now: whoever tries again after an error is to get it again
        for metric, labels, out, weights in self._calls(y, outputs, sample_weight, mask):
            _first_update(metric, labels, out, weights)
        self.reset()

    def _select(self, y: Any, outputs: Any) -> Any:
        spec = self._spec
        if isinstance(spec, Mapping):
            for key, items in spec.items():
                if not isinstance(outputs, Mapping) or key not in outputs:
                    raise ConfigurationError(
                        f"metrics has an entry for the output {key!r}, which the model does not "
                        f"have. Received: metrics for {list(spec)}."
                    )
                yield key, items, y[key], outputs[key]
        elif isinstance(outputs, list | tuple):
            for i, (items, labels, out) in enumerate(zip(spec, y, outputs, strict=True)):
                yield i, items, labels, out
        else:
            yield None, spec, y, outputs

    @staticmethod
    def _name(key: Any, metric: keras.metrics.Metric) -> str:
        return metric.name if key is None else f"{key}_{metric.name}"

    def _metrics(self) -> list[tuple[Any, keras.metrics.Metric]]:
        return self._flat or []

    def update(self, x: Any, y: Any, outputs: Any, sample_weight: Any, mask: Any) -> None:
        """Add one batch."""
        for metric, labels, out, weights in self._calls(y, outputs, sample_weight, mask):
            metric.update_state(labels, out, **weights)

    def _calls(self, y: Any, outputs: Any, sample_weight: Any, mask: Any) -> Any:
        """Each metric with its labels, outputs, and weights if it gets any (as keywords)."""
        whole = mask is not None and sample_weight is None
        if mask is not None:
            sample_weight = _masked_weight(sample_weight, mask)
        for key, metric in self._metrics():
            labels, out, weight = y, outputs, sample_weight
            if key is not None:
                labels, out = y[key], outputs[key]
                weight = sample_weight[key] if _is_nested(sample_weight) else sample_weight
            if whole and "int" in str(metric.dtype):  # one that counts wants whole weights
                weight = ops.cast(weight, metric.dtype)
            yield metric, labels, out, {} if weight is None else {"sample_weight": weight}

    def result(self) -> dict[str, float]:
        """Current values by name; a metric that returns a dict adds its own names."""
        values: dict[str, float] = {}
        for key, metric in self._metrics():
            _add_result(values, self._name(key, metric), metric.result())
        return values

    def reset(self) -> None:
        """Reset every metric."""
        for _, metric in self._metrics():
            metric.reset_state()

    @property
    def variables(self) -> list[keras.Variable]:
        """State of all metrics."""
        return [v for _, metric in self._metrics() for v in metric.variables]


class CompiledMetrics:
    """The metrics of a compiled model, through ``Model.compute_metrics``."""

    def __init__(self, model: keras.Model) -> None:
        self._model = model

    def _metrics(self) -> list[keras.metrics.Metric]:
        # Keras' own running mean of the loss is among them; the trainer has an exact one.
        return [m for m in self._model.metrics if m.name != "loss"]

    def build(self, x: Any, y: Any, outputs: Any, sample_weight: Any, mask: Any) -> None:
        """Let Keras create the metrics from the shapes of the first batch."""
        self.update(x, y, outputs, sample_weight, mask)
        self.reset()

    def update(self, x: Any, y: Any, outputs: Any, sample_weight: Any, mask: Any) -> None:
        """Add one batch."""
        if mask is not None:
            # The metrics of compile(metrics=...) get no weights, but every mean honours a mask.
            set_keras_mask(outputs, mask)
        self._model.compute_metrics(x, y, outputs, sample_weight)

    def result(self) -> dict[str, float]:
        """Current values by name."""
        values: dict[str, float] = {}
        for metric in self._metrics():
            result = metric.result()
            if isinstance(result, Mapping):
                for name, value in result.items():
                    _add_result(values, name, value)
            else:
                _add_result(values, metric.name, result)
        return values

    def reset(self) -> None:
        """Reset every metric."""
        for metric in self._metrics():
            metric.reset_state()

    @property
    def variables(self) -> list[keras.Variable]:
        """State of all metrics."""
        return [v for metric in self._metrics() for v in metric.variables]


def _first_update(metric: keras.metrics.Metric, labels: Any, outputs: Any, weights: Any) -> None:
    """Add a batch to one metric; labels that do not fit are explained."""
    try:
        metric.update_state(labels, outputs, **weights)
    except Exception as error:
        fn = getattr(metric, "_fn", None)  # of a function given as a metric
        if not (fn or type(metric)).__module__.startswith("keras."):
            raise  # a user's own metric: the error is theirs to see as it is
        shapes = keras.tree.map_structure(
            lambda t: f"{keras.backend.standardize_dtype(t.dtype)}{list(t.shape)}",
            [labels, outputs],
        )
        raise DataError(
            f"The metric {metric.name!r} does not fit labels {shapes[0]} and model outputs "
            f"{shapes[1]}. Keras says: {first_lines(error)}"
        ) from None


def _masked_weight(sample_weight: Any, mask: Any) -> Any:
    """Weights that are zero where ``mask`` is False."""
    mask = as_float(mask)
    if sample_weight is None:
        return mask
    weight = as_float(sample_weight)
    while len(weight.shape) > len(mask.shape) and weight.shape[-1] == 1:
        weight = ops.squeeze(weight, -1)
    while len(weight.shape) < len(mask.shape):
        weight = ops.expand_dims(weight, -1)
    return mask * weight


def _is_nested(value: Any) -> bool:
    return isinstance(value, Mapping | list | tuple)


def _add_result(values: dict[str, float], name: str, result: Any) -> None:
    if isinstance(result, Mapping):
        for inner, value in result.items():
            _add_result(values, inner, value)
        return
    array = ops.convert_to_numpy(result)
    values[name] = array.item() if array.ndim == 0 else array.tolist()


def _check_metric(item: Any) -> None:
    if isinstance(item, type):
        raise ConfigurationError(
            f"metrics takes objects, not classes. Received: {item!r}. Write {item.__name__}()."
        )
    if item is None or isinstance(item, keras.metrics.Metric) or callable(item):
        return
    if isinstance(item, str):
        if item.lower() in ("accuracy", "acc"):
            return
        try:
            keras.metrics.get(item)
        except ValueError:
            known = sorted(n for n in dir(keras.metrics) if n[0].isupper() and n != "Metric")
            close = difflib.get_close_matches(item, known, n=1, cutoff=0.5)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ConfigurationError(
                f"metrics: {item!r} is not a metric of Keras.{hint} Known: {', '.join(known)}."
            ) from None
        return
    raise ConfigurationError(
        "metrics takes names, keras.metrics.Metric objects and functions (y_true, y_pred). "
        f"Received: {item!r}"
    )


def _as_metric(item: Any, y: Any, outputs: Any) -> keras.metrics.Metric:
    if isinstance(item, keras.metrics.Metric):
        return item
    if isinstance(item, str) and item.lower() in ("accuracy", "acc"):
        return _accuracy(item, y, outputs)
    metric = keras.metrics.get(item) if isinstance(item, str) else item
    if isinstance(metric, keras.metrics.Metric):
        metric.name = item  # "mae" is logged as "mae", as in `Model.compile`
        return metric
    name = item if isinstance(item, str) else getattr(item, "__name__", "metric")
    return keras.metrics.MeanMetricWrapper(metric, name=name)


def _accuracy(name: str, y: Any, outputs: Any) -> keras.metrics.Metric:
    """Resolve "accuracy": binary, sparse or categorical, by the shapes, as in ``Model.compile``."""
    if outputs.shape[-1] == 1:
        return keras.metrics.BinaryAccuracy(name=name)
    if len(y.shape) < len(outputs.shape) or y.shape[-1] == 1:
        return keras.metrics.SparseCategoricalAccuracy(name=name)
    return keras.metrics.CategoricalAccuracy(name=name)
