"""A model's own ``train_step``, ``test_step``, ``predict_step``: run as Keras' ``fit`` runs them.

What such a step does with a batch is not known here: it has its own optimizers, and returns what is
logged. So nothing that the Trainer's step does with losses and gradients can hold
(``check_arguments``). What holds is all around it: data, events, logs, checkpoints, evaluations.
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
from kbtrain.model.forward import as_given
from kbtrain.model.losses.pairs import as_float
from kbtrain.model.own_methods import overrides
from kbtrain.utils import rng
from kbtrain.utils.layers import walk_layers

logger = logging.getLogger("kbtrain")


def optimizers_of(model: keras.Model) -> dict[str, keras.optimizers.Optimizer]:
    """The optimizers beside ``model.optimizer`` that a model keeps, by the names of the attributes.

    Those of the layers and models in it have the name of the layer in front.
    """
    known = {id(getattr(model, "optimizer", None))}
    found: dict[str, keras.optimizers.Optimizer] = {}
    for layer in walk_layers(model):
        prefix = "" if layer is model else f"{layer.name}."
        for attribute, value in list(vars(layer).items()):
            # What Keras keeps for itself has no place of its own in a checkpoint.
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
    """The metrics of a model that updates them in steps of its own; see ``metrics.MetricSet``."""

    def __init__(self, model: keras.Model) -> None:
        self._model = model
        self.names: set[str] = set()
        """Names that the step returns: what it does not return is not logged, as in Keras."""

    def build(self, x: Any, y: Any, outputs: Any, sample_weight: Any, mask: Any) -> None:
        """Nothing: the step creates what it needs, see ``build_by_step``."""

    def update(self, x: Any, y: Any, outputs: Any, sample_weight: Any, mask: Any) -> None:
        """Nothing: the step does it."""

    def result(self) -> dict[str, float]:
        """Current values of those that the step returns.

        A mean that nothing was added to says nothing: what the step returns under its name, such as
        a loss beside the one Keras keeps for a compiled model, is a number of the step's own.
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
        """Reset them the way the model does."""
        self._model.reset_metrics()

    @property
    def variables(self) -> list[keras.Variable]:
        """State of all metrics."""
        return list(self._model.metrics_variables)


def _flat(logs: Mapping[str, Any]) -> dict[str, Any]:
    """A metric that returns a dict adds its own names."""
    flat: dict[str, Any] = {}
    for name, value in logs.items():
        flat |= _flat(value) if isinstance(value, Mapping) else {str(name): value}
    return flat


def logged(logs: Any, source: str) -> dict[str, Any]:
    """What a step returned, as tensors by name.

    Raises:
        ConfigurationError: It is no dict from names to numbers.
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
                f"{source} returned something that is no number under the name {name!r}. "
                f"Received: {type(value).__name__}."
            ) from None
    return values


def is_loss(name: str) -> bool:
    """Whether a value that a step returns is a loss, which is to be finite."""
    return name == "loss" or name.endswith("_loss")


def make_train_step(
    backend: Backend,
    model: keras.Model,
    metrics: ModelMetrics,
    on_nonfinite: str,
    halted: keras.Variable,
    variables: Sequence[keras.Variable],
) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """Build the step of one update by the model's ``train_step``; see ``step.make_train_step``.

    Args:
        backend: The backend in use.
        model: The model.
        metrics: Is told what the step returns.
        on_nonfinite: Everything is as it was before a step that returned a loss that is not
            finite, with ``"raise"`` and ``"skip"``.
        halted: Integer variable, 1 from the first non-finite step on (``"raise"`` only).
        variables: Everything the step may change.

    Returns:
        ``step(chunks) -> {"loss", "learning_rate", "finite", "extras"}``; the extras are all that
        the model's step returned. The loss is NaN where there is none of that name.
    """
    source = f"{type(model).__name__}.train_step"
    optimizer = None if optimizers_of(model) else getattr(model, "optimizer", None)

    def run(data: Any) -> tuple[dict[str, Any], Any]:
        # Where there are several, none is the one whose rate could be logged.
        rate = None if optimizer is None else as_float(optimizer.learning_rate)
        logs = logged(backend.run_train_step(model, data), source)
        metrics.names = set(logs)
        return logs, rate

    def train_step(chunks: list[dict[str, Any]]) -> dict[str, Any]:
        data = as_given(chunks[0]["single"])
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


# --- getting ready --------------------------------------------------------------------------------


def is_complete(model: keras.Model) -> bool:
    """Whether all layers and optimizers of a model have their variables."""
    own = [getattr(model, "optimizer", None), *optimizers_of(model).values()]
    return building.parts_are_built(model) and all(o.built for o in own if o is not None)


def build_by_step(backend: Backend, model: keras.Model, batch: Any) -> None:
    """Run the model's ``train_step`` for the variables it creates; no value changes.

    So a checkpoint can be put into everything that there will be: optimizers, say, that are built
    when they are first applied.

    Args:
        backend: The backend in use.
        model: The model.
        batch: A batch as the loader gives it (NumPy).
    """
    if is_complete(model):
        return
    random_state = rng.capture_random_state(backend)
    data = keras.tree.map_structure(ops.convert_to_tensor, without_none(batch))
    with _only_building([getattr(model, "optimizer", None), *optimizers_of(model).values()]):
        backend.try_train_step(model, as_given(data))
    rng.restore_random_state(backend, *random_state)


@contextlib.contextmanager
def _only_building(optimizers: Sequence[Any]) -> Iterator[None]:
    """Inside, optimizers are built and not applied, and no variable changes its value."""
    assign = keras.Variable.assign
    inherited = "assign" not in vars(keras.Variable)
    is_building = False

    def keep(variable: keras.Variable, value: Any) -> Any:
        return assign(variable, value) if is_building else value

    def only_build(optimizer: Any) -> Callable[..., None]:
        def apply(grads: Any, trainable_variables: Any = None) -> None:
            nonlocal is_building
            if not optimizer.built and trainable_variables is not None:
                is_building = True  # state may begin as the value of a weight
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


# --- what cannot hold -----------------------------------------------------------------------------


def check_function(model: keras.Model, kind: str) -> None:
    """Make sure that the function around a step is Keras' own.

    Args:
        model: The model.
        kind: "train", "test" or "predict".

    Raises:
        ConfigurationError: It is overridden.
    """
    if overrides(model, name := f"make_{kind}_function"):
        raise ConfigurationError(
            f"The model overrides {name}, which makes a loop of Keras' fit that the Trainer does "
            f"not use. Put what it does into {kind}_step, or override Trainer.compute_loss."
        )
