"""Custom ``train_step``, ``test_step`` and ``predict_step`` of a model, run as by Keras' ``fit``.

Such a step is opaque: it has its own optimizers and returns the values to log. Arguments that act
on losses and gradients therefore do not apply (``check_arguments``); data, events, logs,
checkpoints and evaluations work as usual.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from kbtrain.backends.protocol import Backend
from kbtrain.data import without_none
from kbtrain.errors import ConfigurationError
from kbtrain.model import build as building
from kbtrain.model.forward import restore_structure
from kbtrain.model.losses.pairs import as_float
from kbtrain.model.method_overrides import overrides
from kbtrain.utils import rng
from kbtrain.utils.layers import walk_layers

logger = logging.getLogger("kbtrain")


def optimizers_of(model: keras.Model) -> dict[str, keras.optimizers.Optimizer]:
    """The optimizers of a model besides ``model.optimizer``, by attribute name.

    Those of nested layers and models are prefixed with the layer's name.
    """
    known = {id(getattr(model, "optimizer", None))}
    found: dict[str, keras.optimizers.Optimizer] = {}
    for layer in walk_layers(model):
        prefix = "" if layer is model else f"{layer.name}."
        for attribute, value in list(vars(layer).items()):
            # Keras' private attributes have no entry of their own in a checkpoint.
            if attribute.startswith(("_self_", "_compile")) or attribute == "_layers":
                continue
            for path, item in _leaves(value, prefix + attribute):
                if isinstance(item, keras.optimizers.Optimizer) and id(item) not in known:
                    known.add(id(item))
                    found[path] = item
    return found


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _leaves(item, f"{path}.{i}")
    else:
        yield path, value


class ModelMetrics:
    """The metrics of a model that updates them in its custom steps; see ``metrics.MetricSet``."""

    def __init__(self, model: keras.Model) -> None:
        self._model = model
        self.names: set[str] = set()
        """Names that the step returns. Others are not logged, as in Keras."""

    def build(self, x: Any, y: Any, outputs: Any, sample_weight: Any, mask: Any) -> None:
        """Do nothing: the step creates its metrics, see ``build_by_step``."""

    def update(self, x: Any, y: Any, outputs: Any, sample_weight: Any, mask: Any) -> None:
        """Do nothing: the step updates its metrics."""

    def result(self) -> dict[str, float]:
        """Current values of the metrics that the step returns.

        A ``Mean`` that was never updated is left out: the step returned a value of its own under
        that name, such as a loss beside Keras' loss tracker.
        """
        values = _flat(self._model.get_metrics_result())
        for metric in self._model.metrics:
            if isinstance(metric, keras.metrics.Mean) and not ops.convert_to_numpy(metric.count):
                values.pop(metric.name, None)
        return {
            name: np.asarray(ops.convert_to_numpy(value)).tolist()
            for name, value in values.items()
            if name in self.names
        }

    def reset(self) -> None:
        """Reset them with ``model.reset_metrics``."""
        self._model.reset_metrics()

    adds_up = False

    @property
    def variables(self) -> list[keras.Variable]:
        """State of all metrics."""
        return list(self._model.metrics_variables)


def _flat(logs: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten the results of metrics that return a dict."""
    flat: dict[str, Any] = {}
    for name, value in logs.items():
        flat |= _flat(value) if isinstance(value, Mapping) else {str(name): value}
    return flat


def logged(logs: Any, source: str) -> dict[str, Any]:
    """The values that a step returned, as tensors by name.

    Raises:
        ConfigurationError: It is not a dict from names to numbers.
    """
    if not isinstance(logs, Mapping) or not logs:
        raise ConfigurationError(
            f"{source} must return a dict from names to numbers, such as "
            f"{{'loss': self.loss_tracker.result()}}. Received: {logs!r}."
        )
    values = {}
    for name, value in _flat(logs).items():
        try:
            values[name] = ops.stop_gradient(ops.convert_to_tensor(value))
        except (TypeError, ValueError):
            raise ConfigurationError(
                f"{source} must return numbers, but the value of {name!r} is not one. "
                f"Received: {type(value).__name__}."
            ) from None
    return values


def is_loss(name: str) -> bool:
    """Whether a value that a step returns is a loss and must be finite."""
    return name == "loss" or name.endswith("_loss")


def make_train_step(
    backend: Backend,
    model: keras.Model,
    metrics: ModelMetrics,
    on_nonfinite: str,
    halted: keras.Variable,
    variables: Sequence[keras.Variable],
) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """Build the step of one update from the model's ``train_step``.

    Args:
        backend: The backend in use.
        model: The model.
        metrics: Receives the names that the step returns.
        on_nonfinite: With ``"raise"`` and ``"skip"``, a step that returns a non-finite loss is
            rolled back.
        halted: Integer variable, 1 from the first non-finite step on (``"raise"`` only).
        variables: All variables that the step may change.

    Returns:
        ``step(chunks) -> {"loss", "learning_rate", "finite", "extras"}``, where the extras are all
        values that the model's step returned. The loss is NaN if none has that name.
    """
    source = f"{type(model).__name__}.train_step"
    optimizer = None if optimizers_of(model) else getattr(model, "optimizer", None)

    def run(data: Any) -> tuple[dict[str, Any], Any]:
        # With several optimizers there is no single rate to log.
        rate = None if optimizer is None else as_float(optimizer.learning_rate)
        logs = logged(backend.run_train_step(model, data), source)
        metrics.names = set(logs)
        return logs, rate

    def train_step(chunks: list[dict[str, Any]]) -> dict[str, Any]:
        data = restore_structure(chunks[0]["single"])
        if on_nonfinite == "ignore":
            logs, rate = run(data)
        else:
            (logs, rate), undo_if = backend.reversible(lambda: run(data), variables)
        finite = ops.convert_to_tensor(True)
        for name, value in logs.items():
            if is_loss(name) and keras.backend.is_float_dtype(value.dtype):
                finite = ops.logical_and(finite, ops.all(ops.isfinite(value)))
        if on_nonfinite != "ignore":
            undo_if(ops.logical_not(ops.logical_and(finite, ops.equal(halted.value, 0))))
        if on_nonfinite == "raise":
            bad = ops.cast(ops.logical_not(finite), halted.dtype)
            halted.assign(ops.maximum(halted.value, bad))
        loss = as_float(logs.get("loss", float("nan")))
        result = {"loss": ops.mean(loss), "finite": finite, "extras": logs}
        return result if rate is None else {**result, "learning_rate": rate}

    return train_step


# --- building -------------------------------------------------------------------------------------


def is_complete(model: keras.Model) -> bool:
    """Whether all layers and optimizers of a model have their variables."""
    own = [getattr(model, "optimizer", None), *optimizers_of(model).values()]
    return building.parts_are_built(model) and all(o.built for o in own if o is not None)


def build_by_step(backend: Backend, model: keras.Model, batch: Any) -> None:
    """Run the model's ``train_step`` once to create its variables, without changing any value.

    A checkpoint can then be restored completely, including optimizers that are built when they
    are first applied.

    Args:
        backend: The backend in use.
        model: The model.
        batch: A NumPy batch as the loader returns it.
    """
    if is_complete(model):
        return
    random_state = rng.capture_random_state(backend)
    data = keras.tree.map_structure(ops.convert_to_tensor, without_none(batch))
    with _only_building([getattr(model, "optimizer", None), *optimizers_of(model).values()]):
        backend.try_train_step(model, restore_structure(data))
    rng.restore_random_state(backend, *random_state)


@contextlib.contextmanager
def _only_building(optimizers: Sequence[Any]) -> Iterator[None]:
    """Context in which optimizers are built but not applied, and no variable changes its value."""
    assign = keras.Variable.assign
    inherited = "assign" not in vars(keras.Variable)
    is_building = False

    def keep(variable: keras.Variable, value: Any) -> Any:
        return assign(variable, value) if is_building else value

    def only_build(optimizer: Any) -> Callable[..., None]:
        def apply(grads: Any, trainable_variables: Any = None) -> None:
            nonlocal is_building
            if not optimizer.built and trainable_variables is not None:
                is_building = True  # some state starts as a copy of a weight
                try:
                    optimizer.build(list(trainable_variables))
                finally:
                    is_building = False

        return apply

    present = [optimizer for optimizer in optimizers if optimizer is not None]
    for optimizer in present:
        vars(optimizer)["apply"] = only_build(optimizer)
    keras.Variable.assign = keep
    try:
        yield
    finally:
        if inherited:
            del keras.Variable.assign
        else:
            keras.Variable.assign = assign
        for optimizer in present:
            del vars(optimizer)["apply"]


# --- checks ---------------------------------------------------------------------------------------


def check_function(model: keras.Model, kind: str) -> None:
    """Check that the function around a step is not overridden.

    Args:
        model: The model.
        kind: "train", "test" or "predict".

    Raises:
        ConfigurationError: It is overridden.
    """
    if overrides(model, name := f"make_{kind}_function"):
        raise ConfigurationError(
            f"The model overrides {name}, which builds a loop of Keras' fit that the Trainer does "
            f"not use. Move its code to {kind}_step, or override Trainer.compute_loss."
        )
