"""Getting a model ready: dtype policy, variables, and which parameters are decayed."""

from __future__ import annotations

import contextlib
import inspect
import logging
import re
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from kbtrain import registry
from kbtrain.args_kinds import thaw
from kbtrain.data import LabelKeys, LabelNames, ModelInputs, unpack, without_none
from kbtrain.data.batch import label_keys, nesting_hint
from kbtrain.data.structure import leaves_with_paths
from kbtrain.errors import ConfigurationError, DataError, causes, first_lines
from kbtrain.forward import as_given, as_taken, inputs_of
from kbtrain.keras_private import flatten_layers
from kbtrain.metrics import MetricSet
from kbtrain.outputs import is_tensor, only_tensors

logger = logging.getLogger("kbtrain")

NO_DECAY_LAYERS = (
    keras.layers.BatchNormalization,
    keras.layers.GroupNormalization,
    keras.layers.LayerNormalization,
    keras.layers.RMSNormalization,
    keras.layers.UnitNormalization,
)
NO_DECAY_NAMES = re.compile(
    r"bias|(^|/)(gamma|beta|scale)$|layernorm|rmsnorm|(^|/)norm($|/)|_norm($|/)"
)
# optim has the same two for those who train without kbtrain; a test keeps them equal.


def check_model(model: Any) -> keras.Model:
    """Make sure that ``model`` is one.

    Raises:
        ConfigurationError: It is something else.
    """
    if isinstance(model, keras.Model):
        return model
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    hint = " Build it first: pass model_init=... for a function." if callable(model) else ""
    raise ConfigurationError(f"model must be a keras.Model. Received: {kind}.{hint}")


def walk_layers(layer: keras.layers.Layer) -> Iterator[keras.layers.Layer]:
    """The layer and everything below it, each once, in a stable order."""
    yield from flatten_layers(layer)


def state_variables(model: keras.Model) -> list[keras.Variable]:
    """All variables of a model. Keras does not count the states of a stateful RNN among them."""
    states = [
        state
        for layer in walk_layers(model)
        if getattr(layer, "stateful", False)
        for state in keras.tree.flatten(getattr(layer, "states", None))
        if isinstance(state, keras.Variable)
    ]
    return list({id(v): v for v in [*model.variables, *states]}.values())


def take_in_new_values(model: keras.Model) -> None:
    """After variables were assigned from outside: what layers have computed from them is computed.

    ``Normalization`` keeps the mean and the deviation it divides by, as Keras' ``load_weights``
    knows.
    """
    for layer in walk_layers(model):
        if isinstance(layer, keras.layers.Normalization) and layer.built:
            layer.finalize_state()


def states_batch_size(model: keras.Model) -> int | None:
    """How many samples the states of stateful RNNs are for; None without any."""
    for layer in walk_layers(model):
        if getattr(layer, "stateful", False):
            for state in keras.tree.flatten(getattr(layer, "states", None)):
                if isinstance(state, keras.Variable) and len(state.shape):
                    return int(state.shape[0])
    return None


def advancing_variables(model: keras.Model) -> list[keras.Variable]:
    """What changes from one batch to the next in inference, too: seeds, and states of RNNs."""
    known = {id(v) for v in model.variables}
    return [
        v for v in state_variables(model) if id(v) not in known or v.name == "seed_generator_state"
    ]


def use_mixed_precision(model: keras.Model, policy: str) -> None:
    """Give every float32 layer a policy such as ``mixed_bfloat16``: only the arithmetic changes.

    A policy is captured when a layer is made, so the global one would come too late.
    """
    for layer in walk_layers(model):
        if layer.dtype_policy.name == "float32":
            layer.dtype_policy = policy


def computes_in_float16(model: keras.Model) -> bool:
    """Whether a layer with weights has the policy ``mixed_float16``, or the model itself."""
    return any(
        layer.dtype_policy.name == "mixed_float16"
        for layer in walk_layers(model)
        if layer is model or layer.trainable_variables
    )


@contextlib.contextmanager
def computing_in(model: keras.Model, policy: str | None) -> Iterator[None]:
    """Inside, layers with float32 weights compute by ``policy``; None changes nothing."""
    changed = [] if policy is None else list(walk_layers(model))
    mixed = ("float32", "mixed_bfloat16", "mixed_float16")
    before = [(layer, layer.dtype_policy) for layer in changed if layer.dtype_policy.name in mixed]
    for layer, _ in before:
        layer.dtype_policy = policy
    try:
        yield
    finally:
        for layer, own in before:
            layer.dtype_policy = own


def build_model(
    model: keras.Model,
    batch: Any,
    label_names: LabelNames = None,
    picks_columns: bool = False,
) -> Any:
    """Create the model's variables from the shapes of a batch, and check that the two fit.

    Args:
        model: A Keras model, built or not.
        batch: A batch as the loader gives it (NumPy).
        label_names: Keys of the labels in a batch that is a dict, if not the usual ones.
        picks_columns: The loss, or the model's own step, calls the model itself: a built one need
            not take the inputs of a batch as they are.

    Returns:
        What the model returns, as shapes; None if shapes alone are not enough to tell, or if the
        model is not to be called at all.

    Raises:
        DataError: The model does not accept such inputs.
    """
    if not has_call(model):
        return None
    x = unpack(batch, label_names).x
    specs = as_given(_specs(x))
    was_built = model.built
    try:
        with warnings.catch_warnings():
            # Keras' advice for a call that it cannot run on shapes. We try values next.
            warnings.filterwarnings("ignore", ".*looks like it has unbuilt state")
            outputs = model(as_taken(model, specs))
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
            f"The model {model.name!r} returns None. Let its call return tensors, or a dict with "
            "the key 'loss'."
        )
    return outputs


def has_call(layer: keras.layers.Layer) -> bool:
    """Whether a model can be called: one that has a loss or a step of its own need not."""
    return getattr(layer.call, "__func__", layer.call) is not keras.Model.call


def parts_are_built(model: keras.Model) -> bool:
    """Whether all layers of a model have their variables, whatever is said of the model itself."""
    layers = [layer for layer in walk_layers(model) if layer is not model]
    return all(layer.built or not has_call(layer) for layer in layers)


def build_by_loss(model: keras.Model, forward: Any, batch: Any) -> None:
    """Create the variables of a model without a ``call`` by computing its loss.

    Args:
        model: The model.
        forward: See ``kbtrain.step.Forward``.
        batch: A batch as the loader gives it (NumPy).

    Raises:
        ConfigurationError: The loss calls the model.
    """
    try:
        _run_once(lambda b: forward(b, None, training=False)[1], without_none(batch))
    except NotImplementedError as error:
        raise ConfigurationError(
            f"The model {model.name!r} has no call, so nothing but code of your own can compute "
            "its loss: override Trainer.compute_loss, which may call its layers, or give the "
            f"model a call. Keras says: {first_lines(error)}"
        ) from None


def _explain_missing_key(model: keras.Model, error: Exception, taken: Sequence[str]) -> None:
    """Say so if a model misses what was taken out of its inputs."""
    missing = [str(cause) for cause in causes(error) if isinstance(cause, KeyError)]
    for key in taken:
        if any(repr(key) in text for text in missing):
            raise DataError(
                f"The model {model.name!r} asks its inputs for {key!r}, which is not among them: "
                f"the keys {list(taken)} of a batch are its labels and sample weights. With "
                "label_names=[] in TrainingArguments all keys are inputs; label_names=['...'] "
                "names the keys of the labels; a tuple (inputs, labels) has every key of its "
                "inputs."
            ) from error


def input_shapes(batch: Any, label_names: LabelNames = None) -> Hashable:
    """Structure, shapes without the number of samples, and dtypes of a batch's inputs."""
    leaves = leaves_with_paths(unpack(batch, label_names).x)
    return tuple((path, np.shape(a)[1:], _dtype(a)) for path, a in leaves)


def _tensors_among_outputs(model: keras.Model, specs: Any) -> Any:
    """The outputs as shapes, None in place of what is no tensor, of a model with such; else None.

    Keras itself makes no model of one that returns None, a number or a text beside tensors, but
    it calls, trains and evaluates one.
    """
    found: list[Any] = []

    def call(inputs: Any) -> Any:
        outputs = model(as_taken(model, inputs))
        found[:] = [only_tensors(outputs)]
        return [leaf for leaf in keras.tree.flatten(outputs) if is_tensor(leaf)]

    try:
        tensors = _Function(call).compute_output_spec(specs)
    except Exception:  # the first one is to be explained
        return None
    leaves = keras.tree.flatten(found[0])
    if not len(leaves) > len(tensors) > 0:
        return None
    shapes = iter(tensors)
    leaves = [None if leaf is None else next(shapes) for leaf in leaves]
    return keras.tree.pack_sequence_as(found[0], leaves)


def _runs_on_values(model: keras.Model, x: Any) -> bool:
    """Some models cannot be run on shapes alone (Python control flow on values)."""
    try:
        values = keras.tree.map_structure(keras.ops.convert_to_tensor, x)
        outputs = model(as_taken(model, as_given(values)))
    except Exception:
        return False
    return any(keras.ops.is_tensor(leaf) for leaf in keras.tree.flatten(outputs))


def _keras_dtype(array: Any) -> str:
    name = _dtype(array)
    return "string" if name == "object" else keras.backend.standardize_dtype(name)


def _dtype(array: Any) -> str:
    return str(getattr(array, "dtype", np.asarray(array).dtype))


def decay_parameter_names(model: keras.Model) -> list[str]:
    """Paths of the trainable variables that weight decay applies to.

    Not decayed: everything inside a normalization layer, biases, scales and offsets, and whatever
    is named like a norm (``.../layernorm/...``, ``norm``, ``..._norm``), as in the reference.
    """
    inside_norm = {
        id(variable)
        for layer in walk_layers(model)
        if isinstance(layer, NO_DECAY_LAYERS)
        for variable in layer.trainable_variables
    }
    return [
        variable.path
        for variable in model.trainable_variables
        if id(variable) not in inside_norm and not NO_DECAY_NAMES.search(variable.path.lower())
    ]


def check_optimizer(optimizer: Any, source: str) -> None:
    """Make sure that what a package or an overridden method offers as an optimizer is one.

    Raises:
        ConfigurationError: It is something else.
    """
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise ConfigurationError(
            f"{source} must make a keras.optimizers.Optimizer. "
            f"Received: {type(optimizer).__name__}."
        )


def exclude_from_decay(optimizer: keras.optimizers.Optimizer, model: keras.Model) -> None:
    """Tell the optimizer which variables of ``model`` are not decayed."""
    decayed = set(decay_parameter_names(model))
    excluded = [v for v in model.trainable_variables if v.path not in decayed]
    if excluded:
        optimizer.exclude_from_weight_decay(var_list=excluded)


def set_parameter_groups(
    optimizer: keras.optimizers.Optimizer, model: keras.Model, groups: Sequence[Mapping[str, Any]]
) -> None:
    """Give the optimizer its parameter groups, if there are any.

    Args:
        optimizer: An optimizer without state; one inside of others is found.
        model: The built model: groups may name types of its layers.
        groups: ``args.parameter_groups``.

    Raises:
        ConfigurationError: The optimizer knows no groups, or a group is wrong.
    """
    if not groups:
        return
    while hasattr(optimizer, "inner_optimizer"):
        optimizer = optimizer.inner_optimizer
    if not hasattr(optimizer, "set_parameter_groups"):
        kind = f"{type(optimizer).__module__}.{type(optimizer).__name__}"
        raise ConfigurationError(
            "parameter_groups needs an optimizer with a method set_parameter_groups, such as those "
            f"of optim. Received: {kind}."
        )
    try:
        optimizer.set_parameter_groups(thaw(groups), model)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(str(error)) from None


def with_average(
    optimizer: keras.optimizers.Optimizer, options: Mapping[str, Any] | None
) -> keras.optimizers.Optimizer:
    """The optimizer inside one that averages the weights, or itself without ``args.ema``.

    Raises:
        ConfigurationError: No package offers averages, or one refuses the options.
    """
    if options is None:
        return optimizer
    factory = registry.find(registry.WRAPPERS, "ema", "ema")
    return registry.call_with_known(factory, {"inner_optimizer": optimizer}, dict(options), "ema")


def build_optimizer_state(
    optimizer: keras.optimizers.Optimizer, model: keras.Model, has_groups: bool
) -> None:
    """Create the optimizer's variables.

    Raises:
        ConfigurationError: The variables do not fit the parameter groups or another argument, or
            the optimizer has a state for other ones.
    """
    if optimizer.built:
        _check_state_fits(optimizer, model)
        return
    try:
        optimizer.build(model.trainable_variables)
    except ValueError as error:
        if has_groups:
            raise ConfigurationError(str(error)) from None
        raise ConfigurationError(f"{type(optimizer).__name__}: {error}") from error
    if has_groups and hasattr(optimizer, "parameter_groups_table"):
        logger.info("Parameter groups:\n%s", optimizer.parameter_groups_table())


def _check_state_fits(optimizer: keras.optimizers.Optimizer, model: keras.Model) -> None:
    """A given optimizer keeps its state from fit to fit; that is of no use for another model.

    Variables of this one may have been frozen or unfrozen since.
    """
    while hasattr(optimizer, "inner_optimizer"):
        optimizer = optimizer.inner_optimizer
    trained = getattr(optimizer, "_trainable_variables", None) or model.trainable_variables
    own = {id(v) for v in model.variables}
    if trained and not any(id(v) in own for v in trained):
        unknown = [v.path for v in model.trainable_variables]
        raise ConfigurationError(
            f"The optimizer ({type(optimizer).__name__}) was used for other variables already: it "
            f"has no state for {unknown[0]!r}. Make a new one for this model (Keras optimizers "
            "belong to one set of variables)."
        )


def build_metrics(metrics: MetricSet, forward: Any, batch: Any) -> None:
    """Create the metrics' variables from the shapes of a batch, without computing anything.

    A loss or metric that looks at values is run on the batch once instead.

    Args:
        metrics: What is built.
        forward: See ``kbtrain.step.Forward``.
        batch: A batch as the loader gives it (NumPy).
    """

    def build(batch: Any) -> Any:
        _, outputs, inputs = forward(batch, None, training=False)
        if inputs is not None:
            metrics.build(*inputs)
        return outputs

    _run_once(build, without_none(batch))


def build_compiled(model: keras.Model, batch: Any) -> None:
    """Create the state of what a model was compiled with, for a step of its own that uses it.

    Keras makes it from the shapes of the first outputs. What a model's step does not use may not
    fit them: then there is none.

    Args:
        model: The model.
        batch: A batch as the loader gives it (NumPy).
    """
    takes_training = "training" in inspect.signature(model.compute_loss).parameters
    named = {"training": False} if takes_training else {}

    def run(method: Callable[..., Any], kwargs: Any) -> Callable[[Any], Any]:
        def build(batch: Any) -> Any:
            x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(as_given(batch))
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
    """Run a function on the shapes of a batch; on the batch, where it looks at values."""
    try:
        _Function(function).compute_output_spec(_specs(batch))
    except Exception:
        function(keras.tree.map_structure(keras.ops.convert_to_tensor, batch))


class _Function(keras.Operation):
    """A function that Keras can run on shapes alone."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        super().__init__()
        self._function = function

    def call(self, batch: Any) -> Any:
        return self._function(batch)


def model_inputs(model: Any, keys: LabelKeys) -> ModelInputs:
    """The shapes that a model takes: a functional model's, or those another one was built for."""
    inputs = inputs_of(model)
    if inputs is not None:
        tensors = {t.name: t for t in keras.tree.flatten(inputs)}
        if isinstance(inputs, dict) and len(inputs) == len(tensors):
            tensors = inputs  # the keys are what data goes by
        return ModelInputs([(str(name), t.shape) for name, t in tensors.items()], keys)
    config = model.get_build_config() or {}
    built_for = config.get("input_shape")
    # Those of one batch: of its sizes only their number must be the same in the next one.
    named = built_for.items() if isinstance(built_for, Mapping) else [("x", built_for)]
    ranks = [(str(name), _rank(shape)) for name, shape in named]
    return ModelInputs([(name, (None,) * rank) for name, rank in ranks if rank], keys)


def _rank(shape: Any) -> int:
    """Number of axes; 0 for what is no shape."""
    is_shape = isinstance(shape, tuple) and all(n is None or isinstance(n, int) for n in shape)
    return len(shape) if is_shape else 0


def input_names(model: Any) -> frozenset[str] | None:
    """The names under which a model takes its inputs; None if it does not say.

    A functional model does. What a subclass of ``keras.Model`` does with a dict only its code says.
    """
    inputs = inputs_of(model)
    if inputs is None:
        return None
    if isinstance(inputs, dict):
        return frozenset(str(name) for name in inputs)
    return frozenset(tensor.name for tensor in keras.tree.flatten(inputs))
