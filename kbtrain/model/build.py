"""Building a model and its metrics from the shapes of a batch, and checking that both fit."""

from __future__ import annotations

import contextlib
import inspect
import logging
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from kbtrain.data import LabelKeys, LabelNames, ModelInputs, unpack, without_none
from kbtrain.data.batch import label_keys, nesting_hint
from kbtrain.data.tree import leaves_with_paths
from kbtrain.errors import ConfigurationError, DataError, causes, first_lines
from kbtrain.model.forward import inputs_of, restore_structure, unwrap_single_input
from kbtrain.model.losses.pairing import is_tensor, only_tensors
from kbtrain.model.metrics import MetricSet
from kbtrain.utils.layers import walk_layers

logger = logging.getLogger("kbtrain")

# optim has the same two for those who train without kbtrain; a test keeps them equal.


def check_model(model: Any) -> keras.Model:
    """Check that ``model`` is a ``keras.Model``.

    Raises:
        ConfigurationError: It is not.
    """
    if isinstance(model, keras.Model):
        return model
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    hint = " Build it first: pass model_init=... for a function." if callable(model) else ""
    raise ConfigurationError(f"model must be a keras.Model. Received: {kind}.{hint}")


def build_model(
    model: keras.Model,
    batch: Any,
    label_names: LabelNames = None,
    picks_columns: bool = False,
) -> Any:
    """Create the model's variables from the shapes of a batch, and check that the batch fits.

    Args:
        model: A Keras model, built or not.
        batch: A NumPy batch as the loader returns it.
        label_names: Keys of the labels in a batch that is a dict, if not the usual ones.
        picks_columns: Whether user code (a loss or a custom step) calls the model: a built model
            then need not accept the inputs of a batch as they are.

    Returns:
        The model's outputs as shapes; None if they cannot be inferred from shapes alone, or if the
        model has no ``call``.

    Raises:
        DataError: The model does not accept these inputs.
    """
    if not has_call(model):
        return None
    x = unpack(batch, label_names).x
    specs = restore_structure(_specs(x))
    was_built = model.built
    try:
        with warnings.catch_warnings():
            # Keras warns if it cannot run a call on shapes; values are tried next.
            warnings.filterwarnings("ignore", ".*looks like it has unbuilt state")
            outputs = model(unwrap_single_input(model, specs))
    except Exception as error:
        if (outputs := _tensors_among_outputs(model, specs)) is not None:
            return outputs
        if _runs_on_values(model, x):
            return None
        _explain_missing_key(model, error, label_keys(label_names).taken(batch))
        if was_built and not isinstance(error, ValueError | TypeError):
            raise
        if picks_columns and (was_built and isinstance(x, Mapping) or parts_are_built(model)):
            return None
        shapes = keras.tree.map_structure(lambda a: f"{_dtype(a)}{list(np.shape(a))}", x)
        raise DataError(
            f"The model {model.name!r} does not accept the inputs of the data: {shapes}. "
            f"Keras says: {first_lines(error)}{nesting_hint(batch)}"
        ) from None
    if outputs is None:
        raise ConfigurationError(
            f"The model {model.name!r} returns None. Its call must return tensors, or a dict with "
            "the key 'loss'."
        )
    return outputs


def has_call(layer: keras.layers.Layer) -> bool:
    """Whether a model defines ``call``; one with a custom loss or step need not."""
    return getattr(layer.call, "__func__", layer.call) is not keras.Model.call


def parts_are_built(model: keras.Model) -> bool:
    """Whether all layers of a model are built, regardless of ``model.built``."""
    layers = [layer for layer in walk_layers(model) if layer is not model]
    return all(layer.built or not has_call(layer) for layer in layers)


def build_by_loss(model: keras.Model, forward: Any, batch: Any) -> None:
    """Create the variables of a model without a ``call`` by computing its loss.

    Args:
        model: The model.
        forward: See ``kbtrain.model.forward.Forward``.
        batch: A NumPy batch as the loader returns it.

    Raises:
        ConfigurationError: The loss calls the model.
    """
    try:
        _run_once(lambda b: forward(b, None, training=False)[1], without_none(batch))
    except NotImplementedError as error:
        raise ConfigurationError(
            f"The model {model.name!r} has no call method, so only custom code can compute its "
            "loss: override Trainer.compute_loss, which may call its layers, or define call. "
            f"Keras says: {first_lines(error)}"
        ) from None


def _explain_missing_key(model: keras.Model, error: Exception, taken: Sequence[str]) -> None:
    """Raise an explanation if the model needs a key that was separated as a label."""
    missing = [str(cause) for cause in causes(error) if isinstance(cause, KeyError)]
    for key in taken:
        if any(repr(key) in text for text in missing):
            raise DataError(
                f"The model {model.name!r} reads {key!r} from its inputs, which do not contain it: "
                f"the keys {list(taken)} of a batch are its labels and sample weights. With "
                "label_names=[] in TrainingArguments all keys are inputs; label_names=['...'] "
                "names the keys of the labels; in a tuple (inputs, labels) all keys of the inputs "
                "are kept."
            ) from error


def input_shapes(batch: Any, label_names: LabelNames = None) -> Hashable:
    """Structure, shapes without the number of samples, and dtypes of a batch's inputs."""
    leaves = leaves_with_paths(unpack(batch, label_names).x)
    return tuple((path, np.shape(a)[1:], _dtype(a)) for path, a in leaves)


def _tensors_among_outputs(model: keras.Model, specs: Any) -> Any:
    """The outputs as shapes, with None for those that are not tensors; None if all are tensors.

    Keras cannot infer the shapes of a model that returns None, a number or a string beside
    tensors, but it calls, trains and evaluates one.
    """
    found: list[Any] = []

    def call(inputs: Any) -> Any:
        outputs = model(unwrap_single_input(model, inputs))
        found[:] = [only_tensors(outputs)]
        return [leaf for leaf in keras.tree.flatten(outputs) if is_tensor(leaf)]

    try:
        tensors = _Function(call).compute_output_spec(specs)
    except Exception:  # the caller explains the first error
        return None
    leaves = keras.tree.flatten(found[0])
    if not len(leaves) > len(tensors) > 0:
        return None
    shapes = iter(tensors)
    leaves = [None if leaf is None else next(shapes) for leaf in leaves]
    return keras.tree.pack_sequence_as(found[0], leaves)


def _runs_on_values(model: keras.Model, x: Any) -> bool:
    """Whether the model runs on values, for models with Python control flow on values."""
    try:
        values = keras.tree.map_structure(keras.ops.convert_to_tensor, x)
        outputs = model(unwrap_single_input(model, restore_structure(values)))
    except Exception:
        return False
    return any(keras.ops.is_tensor(leaf) for leaf in keras.tree.flatten(outputs))


def _keras_dtype(array: Any) -> str:
    name = _dtype(array)
    return "string" if name == "object" else keras.backend.standardize_dtype(name)


def _dtype(array: Any) -> str:
    return str(getattr(array, "dtype", np.asarray(array).dtype))


def build_metrics(metrics: MetricSet, forward: Any, batch: Any) -> None:
    """Create the metrics' variables from the shapes of a batch, without computing anything.

    A loss or metric that needs values is run on the batch once instead.

    Args:
        metrics: The metrics to build.
        forward: See ``kbtrain.model.forward.Forward``.
        batch: A NumPy batch as the loader returns it.
    """

    def build(batch: Any) -> Any:
        _, outputs, inputs = forward(batch, None, training=False)
        if inputs is not None:
            metrics.build(*inputs)
        return outputs

    _run_once(build, without_none(batch))


def build_compiled(model: keras.Model, batch: Any) -> None:
    """Build the compiled loss and metrics for a custom step that uses them.

    Keras builds them from the shapes of the first outputs. Those that the step does not use may
    not fit these shapes and are left unbuilt.

    Args:
        model: The model.
        batch: A NumPy batch as the loader returns it.
    """
    takes_training = "training" in inspect.signature(model.compute_loss).parameters
    named = {"training": False} if takes_training else {}

    def run(method: Callable[..., Any], kwargs: Any) -> Callable[[Any], Any]:
        def build(batch: Any) -> Any:
            x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(restore_structure(batch))
            outputs = model(x, training=False)
            method(x, y, outputs, sample_weight, **kwargs)
            return outputs

        return build

    for method, kwargs in ((model.compute_metrics, {}), (model.compute_loss, named)):
        with contextlib.suppress(Exception):
            _Function(run(method, kwargs)).compute_output_spec(_specs(without_none(batch)))


def _specs(batch: Any) -> Any:
    return keras.tree.map_structure(
        lambda a: keras.KerasTensor(np.shape(a), _keras_dtype(a)), batch
    )


def _run_once(function: Callable[[Any], Any], batch: Any) -> None:
    """Run a function on the shapes of a batch, or on the batch if it needs values."""
    try:
        _Function(function).compute_output_spec(_specs(batch))
    except Exception:
        function(keras.tree.map_structure(keras.ops.convert_to_tensor, batch))


class _Function(keras.Operation):  # type: ignore[misc]
    """Wraps a function so that Keras can run it on shapes alone."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        super().__init__()
        self._function = function

    def call(self, batch: Any) -> Any:
        return self._function(batch)


def model_inputs(model: Any, keys: LabelKeys) -> ModelInputs:
    """The input shapes of a functional model, or those that another model was built for."""
    inputs = inputs_of(model)
    if inputs is not None:
        tensors = {t.name: t for t in keras.tree.flatten(inputs)}
        if isinstance(inputs, dict) and len(inputs) == len(tensors):
            tensors = inputs  # data is matched by key
        return ModelInputs([(str(name), t.shape) for name, t in tensors.items()], keys)
    config = model.get_build_config() or {}
    built_for = config.get("input_shape")
    # The shapes of one batch: only their ranks must be the same in the next one.
    named = built_for.items() if isinstance(built_for, Mapping) else [("x", built_for)]
    ranks = [(str(name), _rank(shape)) for name, shape in named]
    return ModelInputs([(name, (None,) * rank) for name, rank in ranks if rank], keys)


def _rank(shape: Any) -> int:
    """Number of axes; 0 if ``shape`` is not a shape."""
    is_shape = isinstance(shape, tuple) and all(n is None or isinstance(n, int) for n in shape)
    return len(shape) if is_shape else 0


def input_names(model: Any) -> frozenset[str] | None:
    """The input names of a functional model; None for a subclass, which may read any key."""
    inputs = inputs_of(model)
    if inputs is None:
        return None
    if isinstance(inputs, dict):
        return frozenset(str(name) for name in inputs)
    return frozenset(tensor.name for tensor in keras.tree.flatten(inputs))
