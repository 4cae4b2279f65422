"""Keras metrics on the device, with the semantics of ``Model.compile``.

``metrics`` are updated without sample weights and ``weighted_metrics`` with them; padding and
ignored labels count in neither. Metrics owned by a layer or by the model are reported as well.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import keras
import numpy as np
from keras import ops

from kbtrain.errors import ConfigurationError, DataError, first_lines
from kbtrain.model.losses.pairing import beside_tensors, is_tensor
from kbtrain.model.losses.pairs import RESERVED_NAMES, as_dtype_of, as_float, check_name
from kbtrain.utils.fallback import PrivateApi


class MetricSet(Protocol):
    """The interface of metrics that steps and evaluations use.

    The arguments of ``build`` and ``update`` have the structure of the outputs; ``masks`` holds,
    for each output, a mask that is False at positions to leave out, or None.
    """

    def build(self, x: Any, y: Any, outputs: Any, sample_weight: Any, masks: Sequence[Any]) -> None:
        """Create all variables. Called once, outside the compiled step."""

    def update(
        self, x: Any, y: Any, outputs: Any, sample_weight: Any, masks: Sequence[Any]
    ) -> None:
        """Add one batch. Traced as part of the step."""

    def result(self) -> dict[str, float]:
        """Current values, fetched to the host."""

    def reset(self) -> None:
        """Discard the accumulated state."""

    @property
    def variables(self) -> list[keras.Variable]:
        """The state, on the device."""

    @property
    def adds_up(self) -> bool:
        """Whether the state of a batch is the sum of the states of its parts."""


class CompiledMetrics:
    """The metrics a model was compiled with, and those owned by it and its layers.

    Args:
        model: The model.
    """

    def __init__(self, model: keras.Model) -> None:
        self._model = self._compiled = model
        self._reset_values: list[list[np.ndarray]] = []
        self._returned: dict[str, keras.Variable] = {}
        self._counts_tensors = False  # metrics have no entry for an output that is None

    def _sets(self) -> list[Any]:
        """The object in which Keras combines all metrics passed to ``compile``."""
        return [m for m in self._compiled.metrics if _is_compiled_set(m)]

    def _kept(self) -> list[keras.metrics.Metric]:
        """Metrics owned by the model and its layers, without Keras' loss trackers."""
        losses = getattr(self._model, "_compile_loss", None)
        own = {id(metric) for metric in getattr(losses, "metrics", ())}
        return [
            metric
            for metric in self._model.metrics
            if not _is_compiled_set(metric)
            and id(metric) not in own
            and metric.name not in RESERVED_NAMES
        ]

    def build(self, x: Any, y: Any, outputs: Any, sample_weight: Any, masks: Sequence[Any]) -> None:
        """Let Keras create the metrics from the shapes of the first batch."""
        unbuilt = [each for each in self._sets() if not each.built]
        try:
            returned = self._first(unbuilt, x, y, outputs, sample_weight, masks)
        except Exception:
            if all(map(is_tensor, keras.tree.flatten(outputs))):
                raise
            for each in unbuilt:
                each.built = False
            self._counts_tensors = True
            returned = self._first(unbuilt, x, y, outputs, sample_weight, masks)
        known = {metric.name for metric in self._kept()} | set(RESERVED_NAMES)
        for each in self._sets():
            for name in each.result():
                check_name(name, "metrics has")
                known.add(name)
        for name, value in returned.items():
            if name not in known and getattr(value, "shape", ()) == ():
                self._returned[name] = _last_value(name)
        self.reset()

    def update(
        self, x: Any, y: Any, outputs: Any, sample_weight: Any, masks: Sequence[Any]
    ) -> None:
        """Add one batch."""
        with _masked([m for each in self._sets() for m in each.metrics], outputs, masks):
            returned = self._add(x, y, outputs, sample_weight)
        for name, variable in self._returned.items():
            if name in returned:
                variable.assign(ops.cast(returned[name], variable.dtype))

    def _first(
        self,
        unbuilt: Sequence[Any],
        x: Any,
        y: Any,
        outputs: Any,
        sample_weight: Any,
        masks: Sequence[Any],
    ) -> dict[str, Any]:
        """Build the sets that are not built yet, then add a batch to all of them."""
        fitted = self._fitted(y, outputs)
        for each in unbuilt:
            try:
                each.build(*fitted)
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise ConfigurationError(
                    "The metrics do not match the model's outputs and labels. Pass a list "
                    "for one output, or a dict keyed by output for several. "
                    f"Keras says: {first_lines(error)}"
                ) from None
        with _masked([m for each in self._sets() for m in each.metrics], outputs, masks):
            return self._add(x, y, outputs, sample_weight)

    def _fitted(self, y: Any, outputs: Any) -> tuple[Any, Any]:
        """Labels and outputs in the structure of the metrics."""
        if not self._counts_tensors:
            return y, outputs
        return beside_tensors(outputs, y), beside_tensors(outputs, outputs)

    def _add(self, x: Any, y: Any, outputs: Any, sample_weight: Any) -> dict[str, Any]:
        """Add one batch through the model's ``compute_metrics`` and return its result.

        It updates the metrics the model was compiled with, not those passed to the Trainer.
        """
        returned: dict[str, Any] = {}
        if type(self._model).compute_metrics is not keras.Model.compute_metrics:
            returned = dict(self._model.compute_metrics(x, y, outputs, sample_weight) or {})
            if self._compiled is self._model:
                return returned
        if self._counts_tensors:
            sample_weight = beside_tensors(outputs, sample_weight)
        for each in self._sets():
            each.update_state(*self._fitted(y, outputs), sample_weight)
        return returned

    def result(self) -> dict[str, float]:
        """Current values by name.

        A layer's metric is left out if it was never updated: the layer uses it in another mode of
        training.
        """
        values: dict[str, float] = {}
        for each in self._sets():
            with _in_float64(each.metrics):
                for name, value in each.result().items() if each.built else ():
                    _add_result(values, name, value)
        for metric, before in zip(self._kept(), self._reset_values, strict=False):
            if not all(map(np.array_equal, _values(metric), before)):
                with _in_float64([metric]):
                    _add_result(values, metric.name, metric.result())
        for name, variable in self._returned.items():
            _add_result(values, name, variable.value)
        return values

    def reset(self) -> None:
        """Reset every metric."""
        for metric in [*self._sets(), *self._kept()]:
            metric.reset_state()
        for variable in self._returned.values():
            variable.assign(ops.zeros((), variable.dtype))
        self._reset_values = [_values(metric) for metric in self._kept()]

    def objects(self) -> list[keras.metrics.Metric]:
        """The metrics one by one."""
        return [*(m for each in self._sets() for m in each.metrics), *self._kept()]

    @property
    def adds_up(self) -> bool:
        """Whether all metrics are Keras' own, which add up sums and counts of samples."""
        return not self._returned and all(map(_adds_up, self.objects()))

    @property
    def variables(self) -> list[keras.Variable]:
        """State of all metrics."""
        kept = [v for metric in [*self._sets(), *self._kept()] for v in metric.variables]
        return [*kept, *self._returned.values()]


class ListedMetrics(CompiledMetrics):
    """The metrics passed to the Trainer, as if the model were compiled with them.

    Args:
        model: The model.
        metrics: A metric or a list for a model with one output; for several outputs a dict from
            output name to these, or a list with one entry per output.
        weighted_metrics: In the same form, updated with the sample weights.

    Raises:
        ConfigurationError: A name is unknown to Keras, or an entry is not a metric.
    """

    def __init__(self, model: keras.Model, metrics: Any, weighted_metrics: Any = None) -> None:
        super().__init__(model)
        for item in keras.tree.flatten([metrics, weighted_metrics]):
            _check_metric(item)
        objects = keras.tree.flatten([metrics, weighted_metrics])
        objects = [item for item in objects if isinstance(item, keras.metrics.Metric)]
        if twice := [m.name for i, m in enumerate(objects) if any(m is o for o in objects[:i])]:
            raise ConfigurationError(
                f"One metric object is given twice ({twice[0]!r}): each batch would be added to it "
                "twice. Create a separate object for each place."
            )
        self._compiled = _Holder(name="metrics")
        self._compiled.output_names = getattr(model, "output_names", None)
        self._compiled.compile(
            optimizer=None, metrics=_listed(metrics), weighted_metrics=_listed(weighted_metrics)
        )


class _Holder(keras.Model):  # type: ignore[misc]
    """A model that has only metrics."""


def _listed(metrics: Any) -> Any:
    return metrics if metrics is None or keras.tree.is_nested(metrics) else [metrics]


def _is_compiled_set(metric: keras.metrics.Metric) -> bool:
    result: bool = metric.name == "compile_metrics"
    return result


def _last_value(name: str) -> keras.Variable:
    """Carries a value out of the step that ``compute_metrics`` returns and no metric holds."""
    return keras.Variable(
        "zeros", shape=(), dtype="float32", trainable=False, name=name.replace("/", "_")
    )


def _values(metric: keras.metrics.Metric) -> list[np.ndarray]:
    return [np.array(ops.convert_to_numpy(v.value)) for v in metric.variables]


@contextlib.contextmanager
def _in_float64(metrics: Iterable[keras.metrics.Metric]) -> Iterator[None]:
    """Context in which means are divided on the host, in float64."""
    means = [m for m in metrics if type(m).result is keras.metrics.Mean.result]
    for metric in means:
        vars(metric)["result"] = functools.partial(_mean_on_host, metric)
    try:
        yield
    finally:
        for metric in means:
            vars(metric).pop("result", None)


def _mean_on_host(metric: Any) -> Any:
    total, count = (ops.convert_to_numpy(v.value) for v in (metric.total, metric.count))
    return np.float64(total) / np.float64(count) if count else np.zeros(())


@contextlib.contextmanager
def _masked(
    metrics: Iterable[keras.metrics.Metric], outputs: Any, masks: Sequence[Any]
) -> Iterator[None]:
    """Context in which metric updates apply the masks and explain shapes that do not fit.

    Args:
        metrics: The metrics; the output passed to an update identifies its mask.
        outputs: The model's outputs.
        masks: One for each output, or None.
    """
    leaves = keras.tree.flatten(outputs)
    by_output = {id(output): mask for output, mask in zip(leaves, masks, strict=True)}
    changed = list({id(metric): metric for metric in metrics}.values())
    for metric in changed:
        vars(metric)["update_state"] = _update_of(metric, by_output)
    try:
        yield
    finally:
        for metric in changed:
            vars(metric).pop("update_state", None)


def _update_of(metric: keras.metrics.Metric, masks: Mapping[int, Any]) -> Callable[..., None]:
    def update_state(y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        mask = masks.get(id(y_pred))
        if mask is not None:
            whole = sample_weight is None and "int" in str(metric.dtype)
            sample_weight = _masked_weight(sample_weight, mask)
            if whole:  # one that counts wants whole weights
                sample_weight = ops.cast(sample_weight, metric.dtype)
        weights = {} if sample_weight is None else {"sample_weight": sample_weight}
        try:
            if mask is not None and _is_mean_of_function(metric):
                _add_elements(metric, y_true, y_pred, sample_weight)
            else:
                type(metric).update_state(metric, y_true, y_pred, **weights)
        except Exception as error:
            fn = getattr(metric, "_fn", None)  # of a function given as a metric
            if not (getattr(fn or type(metric), "__module__", "") or "").startswith("keras."):
                raise  # a custom metric: the user should see the original error
            raise DataError(
                f"The metric {metric.name!r} does not fit labels {_shape(y_true)} and model "
                f"outputs {_shape(y_pred)}. Keras says: {first_lines(error)}"
            ) from None

    return update_state


def _adds_up(metric: keras.metrics.Metric) -> bool:
    """Whether Keras adds up a metric over samples; a user's function may be a mean of a batch."""
    parts = [type(metric).update_state, getattr(metric, "_fn", None)]
    return all(
        f is None or (getattr(f, "__module__", "") or "").startswith("keras.") for f in parts
    )


def _is_mean_of_function(metric: keras.metrics.Metric) -> bool:
    wrapper = keras.metrics.MeanMetricWrapper
    return isinstance(metric, wrapper) and type(metric).update_state is wrapper.update_state


def _add_elements_fast(metric: Any, y_true: Any, y_pred: Any, weight: Any) -> None:
    """Add each element separately.

    Keras first averages each sample over the padded length of its batch, which would give tokens
    in short batches more weight.
    """
    values = metric._fn(y_true, y_pred, **metric._fn_kwargs)
    if len(values.shape) != len(weight.shape):
        type(metric).update_state(metric, y_true, y_pred, sample_weight=weight)
        return
    weight = ops.broadcast_to(weight, values.shape)
    keras.metrics.Mean.update_state(metric, ops.reshape(values, (-1,)), ops.reshape(weight, (-1,)))


_add_elements = PrivateApi(
    "Asking a metric for the values of its elements",
    "keras",
    _add_elements_fast,
    lambda metric, y_true, y_pred, weight: type(metric).update_state(
        metric, y_true, y_pred, sample_weight=weight
    ),
    "Token metrics are averaged per sample first, as in Keras' evaluation.",
)


def _shape(tensor: Any) -> str:
    if not hasattr(tensor, "shape"):
        return f"{tensor!r}"
    return f"{keras.backend.standardize_dtype(tensor.dtype)}{list(tensor.shape)}"


def _masked_weight(sample_weight: Any, mask: Any) -> Any:
    """Weights that are zero where ``mask`` is False."""
    if sample_weight is None:
        return as_float(mask)
    weight = as_float(sample_weight)
    mask = as_dtype_of(mask, weight)
    while len(weight.shape) > len(mask.shape) and weight.shape[-1] == 1:
        weight = ops.squeeze(weight, -1)
    while len(weight.shape) < len(mask.shape):
        weight = ops.expand_dims(weight, -1)
    return mask * weight


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
            f"metrics must contain objects, not classes. Received: {item!r}. Use {item.__name__}()."
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
        "metrics must contain names, keras.metrics.Metric objects or functions (y_true, y_pred). "
        f"Received: {item!r}"
    )
